"""How long a checkpoint takes, said to the job around us, which asks for one before the walltime ends.

What it is
    `SaveTimes` keeps the longest save and the longest stretch in which a request for one has to wait, over
    all lives of a run, in `training/saving.json` (`orchestrator.records.Saving`).

How to use it
    times = SaveTimes(run); times.worked(3.2); times.saved(11.5)

What it does not do
    It decides no lead (`orchestrator.walltime.needed` does). A file that cannot be written just now stays as
    it is: no training fails of that.
"""

from __future__ import annotations

import contextlib
import threading

from orchestrator.contract import RunDirectory, Saving
from orchestrator.frozen import replace


class SaveTimes:
    """One writer: rank 0. Saves are told from the thread that writes them."""

    def __init__(self, run: RunDirectory) -> None:
        self._run, self._lock = run, threading.Lock()
        self.longest = run.read(run.saving, Saving) or Saving()

    def saved(self, seconds: float) -> None:
        """A checkpoint lies there, so long after it was begun."""
        self._note(seconds, 0.0)

    def worked(self, seconds: float) -> None:
        """So long a request for a checkpoint had to wait, or would have had to."""
        self._note(0.0, seconds)

    def _note(self, save_s: float, busy_s: float) -> None:
        with self._lock:
            before = self.longest
            self.longest = replace(
                before, save_s=max(before.save_s, save_s), busy_s=max(before.busy_s, busy_s)
            )
            if self.longest != before:
                with contextlib.suppress(OSError):
                    self._run.publish(self._run.saving, self.longest)
