"""Answers about jobs, kept for a moment, so that several watchers of a run ask the controller once.

What it is
    The first answers are kept for half a second, and longer, up to some seconds, while nothing
    changes. Any request of ours expires all of it: after a release or a cancel one wants to see it.

What it does not do
    It keeps no answer that was none: UNKNOWN is asked again each time. Standard library only.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from orchestrator.schedulers import JobInfo, JobState


class Cache:
    """Safe to use from several threads. Times in seconds."""

    def __init__(
        self, shortest_s: float = 0.5, longest_s: float = 5.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.shortest_s, self.longest_s, self._clock = shortest_s, longest_s, clock
        self._lock = threading.Lock()
        self._kept: dict[str, tuple[JobInfo, float, float]] = {}  # answer, until, how long it was kept

    def of(self, job_ids: Sequence[str]) -> dict[str, JobInfo]:
        """The answers that are still good."""
        now = self._clock()
        with self._lock:
            kept = {job_id: self._kept[job_id] for job_id in job_ids if job_id in self._kept}
        return {job_id: info for job_id, (info, until, _) in kept.items() if now < until}

    def put(self, found: dict[str, JobInfo]) -> dict[str, JobInfo]:
        """Keep new answers; returns them."""
        now = self._clock()
        with self._lock:
            for job_id, info in found.items():
                if info.state != JobState.UNKNOWN:
                    keep = self._how_long(job_id, info)
                    self._kept[job_id] = (info, now + keep, keep)
        return found

    def _how_long(self, job_id: str, info: JobInfo) -> float:
        before = self._kept.get(job_id)
        if before is None or (before[0].state, before[0].reason) != (info.state, info.reason):
            return self.shortest_s
        return min(max(before[2] * 1.5, self.shortest_s), self.longest_s)

    def expire(self) -> None:
        with self._lock:
            self._kept.clear()
