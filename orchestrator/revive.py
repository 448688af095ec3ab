"""The last resort of a training whose runtime is gone: it submits another runtime job.

What it is
    A crashed server is started again by its own wrapper, a requeued or lost job by the scheduler. When none
    of them can (the job is over for good), only the training job is left. `Reviver.revive` submits the same
    runtime script as a new job, if the run had one that served, it did not end on purpose, and
    `runtime.max_restarts` allows another life.

What it does not do
    It does not wait for the new runtime; `peer.RuntimeWatch` does.
"""

from __future__ import annotations

from orchestrator.command import reaping
from orchestrator.contract import JobStatus, Outcome, ReadyFlag, Role
from orchestrator.job_core import Attempt
from orchestrator.peer import Peer
from orchestrator.schedulers import OVER, SchedulerError
from orchestrator.successor import submit_successor

_ON_PURPOSE = (Outcome.CANCELLED, Outcome.SUCCESS, Outcome.PEER_GONE)
_TRIES = 3


class Reviver:
    """Of one training job. `peer` is its runtime."""

    def __init__(self, attempt: Attempt, peer: Peer) -> None:
        self.attempt, self.peer = attempt, peer
        self.tries = 0

    def revive(self, why: str) -> bool:
        """True while the runtime may still come back: a job was submitted, or is about to be."""
        if not self.may():
            return False
        scheduler, job_id = self.attempt.scheduler, self.peer.job_id
        assert scheduler is not None  # `may` has seen to it
        with reaping:
            if scheduler.query([job_id], fresh=True)[job_id].state not in OVER:
                return True  # it still ends; two of them must not overlap
            try:
                new = submit_successor(self.attempt.run, Role.RUNTIME, Role.TRAINING, scheduler)
            except (SchedulerError, OSError) as error:
                self.tries += 1
                self.attempt.say("runtime_not_resubmitted", why=why, problem=str(error))
                return True
        self.attempt.say("runtime_resubmitted", why=why, job_id=new, instead_of=job_id)
        return True

    def may(self) -> bool:
        attempt, run, settings = self.attempt, self.attempt.run, self.attempt.settings
        if settings.failover_timeout <= 0 or attempt.manifest.mode != "run" or self.tries >= _TRIES:
            return False
        if attempt.scheduler is None or attempt.interactive or not self.peer.job_id:
            return False
        latest = run.latest_attempt(Role.RUNTIME)
        lives = latest - attempt.manifest.lives_before.get(Role.RUNTIME, 0)
        served = run.read(run.ready_flag, ReadyFlag)
        if served is None or not 0 < lives <= settings.runtime_max_restarts:
            return False
        status = run.read(run.status(Role.RUNTIME), JobStatus)
        return status is None or status.phase != "ended" or status.outcome not in _ON_PURPOSE
