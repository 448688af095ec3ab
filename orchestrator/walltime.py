"""When the time limit of a job is near, also where the scheduler's warning was lost, never sent, or too late.

What it is
    `Walltime.probe` is for a `peer.Watcher`: it asks the scheduler, rarely, how long the job has left, and
    returns a reason once that is no more than the lead of the warning. A limit may be changed while
    the job runs, so the answer is asked for again before it counts. `needed` is the lead that a trainer's
    measured saves ask for: a scheduler's own warning has a fixed one, so a longer one is kept by this clock.

How to use it
    clock = Walltime(scheduler, job_id, lead_s=90, limit_s=14400); clock.raise_lead(needed(saving, 25, 14400))
    with Watcher(clock.probe, 5.0, wake): ...

What it does not do
    It reads no clock of another machine and ends nothing.
"""

from __future__ import annotations

import time

from orchestrator.command import reaping
from orchestrator.contract import Saving
from orchestrator.schedulers import Scheduler, SchedulerError

_LONGEST_S, _AGAIN_S = 600.0, 60.0
MARGIN_S = 5.0
"""Of a lead, kept for writing down how the life ended."""
SAFETY = 2.0
"""The next save may take so many times the longest one until now: filesystems have bad hours."""


def needed(saving: Saving, stop_timeout_s: float, limit_s: float) -> float:
    """The lead, in seconds, in which a checkpoint gets written for sure: the work that a request has to wait
    for, the save itself with a reserve, and an end in order. 0 before a save was measured.

    At most half of the time limit: a job that was asked at once would write checkpoints and train nothing.
    """
    if not saving.save_s:
        return 0.0
    wanted = SAFETY * saving.save_s + saving.busy_s + stop_timeout_s + MARGIN_S
    return min(wanted, limit_s / 2) if limit_s else wanted


class Walltime:
    """`lead_s` is how long before the end it speaks, `limit_s` the time limit as it was submitted."""

    def __init__(self, scheduler: Scheduler | None, job_id: str, lead_s: float, limit_s: float = 0.0) -> None:
        self.scheduler, self.job_id, self.lead_s, self.limit_s = scheduler, job_id, lead_s, limit_s
        self.left_s: float | None = None
        """How long was left when it spoke."""
        self._ask_at, self._raised, self._begun = 0.0, False, time.monotonic()

    def raise_lead(self, lead_s: float) -> bool:
        """Speak earlier from now on; a shorter lead changes nothing. Whether it was raised."""
        if lead_s <= self.lead_s:
            return False
        self.lead_s, self._ask_at, self._raised = lead_s, 0.0, True
        return True

    def probe(self) -> str | None:
        """Why the end is near; None while it is not, or nobody knows."""
        now = time.monotonic()
        if self.scheduler is None or now < self._ask_at:
            return None
        left = self._left(self.scheduler, now)
        if left is not None and left <= self.lead_s:
            self.left_s = left
            return f"{left:.0f} s are left of the walltime"
        self._ask_at = now + (_AGAIN_S if left is None else min(max(left - self.lead_s, 1.0), _LONGEST_S))
        return None

    def _left(self, scheduler: Scheduler, now: float) -> float | None:
        """What the scheduler says. Where it says nothing its own warning has to do, unless that is too late:
        then what our own clock says, which began a little after the job."""
        try:
            with reaping:
                left = scheduler.query([self.job_id], fresh=True)[self.job_id].time_left_s
        except SchedulerError:
            if not self._raised:
                raise
            left = None
        if left is None and self._raised and self.limit_s:
            return self.limit_s - (now - self._begun)
        return left
