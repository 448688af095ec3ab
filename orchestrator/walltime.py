"""When the time limit of a job is near, also where the scheduler's warning was lost or is never sent.

What it is
    `Walltime.probe` is for a `peer.Watcher`: it asks the scheduler, rarely, how long the job has left, and
    returns a reason once that is no more than the lead of the warning. A limit may be changed while
    the job runs, so the answer is asked for again before it counts.

What it does not do
    It reads no clock of another machine and ends nothing.
"""

from __future__ import annotations

import time

from orchestrator.command import reaping
from orchestrator.schedulers import Scheduler

_LONGEST_S, _AGAIN_S = 600.0, 60.0


class Walltime:
    """`lead_s` is how long before the end it speaks."""

    def __init__(self, scheduler: Scheduler | None, job_id: str, lead_s: float) -> None:
        self.scheduler, self.job_id, self.lead_s = scheduler, job_id, lead_s
        self._ask_at = 0.0

    def probe(self) -> str | None:
        """Why the end is near; None while it is not, or nobody knows."""
        now = time.monotonic()
        if self.scheduler is None or now < self._ask_at:
            return None
        with reaping:
            left = self.scheduler.query([self.job_id], fresh=True)[self.job_id].time_left_s
        if left is not None and left <= self.lead_s:
            return f"{left} s are left of the walltime"
        self._ask_at = now + (_AGAIN_S if left is None else min(max(left - self.lead_s, 1.0), _LONGEST_S))
        return None
