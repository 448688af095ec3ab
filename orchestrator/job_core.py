"""What both jobs of a run share: attempt, status record, events, heartbeat, environment of the command.

What it is
    `Attempt` is one life of one job. It takes its number, says where it stands (`status.json`, the
    timeline) until a later attempt supersedes it, and finds the scheduler that the launcher used.

What it does not do
    No decisions: `job_runtime` and `job_training` make them.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from orchestrator.contract import (
    Env,
    Exit,
    Heartbeat,
    JobStatus,
    NotARun,
    Outcome,
    Role,
    RunDirectory,
    Superseded,
    WaitTimeout,
    read_bytes,
    wait_for,
)
from orchestrator.schedulers import OVER, QUEUED, Scheduler, SchedulerError, open_scheduler
from orchestrator.schedulers.inside import open_inside

T = TypeVar("T")

STOPPED = "the job got SIGTERM: it was cancelled, preempted, or its node shuts down"
ORPHANED = "the batch shell of the job was killed"
_OVER_S = 10.0
TIMED_OUT = "the time limit of the job was reached"


@dataclass(frozen=True)
class Ending:
    """How an attempt ends: what is recorded, and the exit code of the wrapper."""

    outcome: Outcome
    reason: str
    exit_code: int
    sure: bool = True
    """False when the scheduler did not say whether this is the end of the job, or only of this life."""


class Attempt:
    """One life of one job. `number` counts from 1, `nonce` is unique to this life."""

    def __init__(self, run: RunDirectory, role: Role, number: int, nonce: str) -> None:
        manifest = run.read_manifest()
        if manifest is None:
            raise NotARun(f"{run.root} is not a run directory: its run.json is missing or cannot be read")
        self.run, self.role, self.number, self.nonce = run, role, number, nonce
        self.manifest, self.settings = manifest, manifest.job_settings()
        self.job_id = os.environ.get(Env.JOB_ID, "")
        self.events = run.events_of(role, f"{role}-job")
        self.events.attempt = number
        self.scheduler = self._scheduler()
        self.inside = open_inside(self.scheduler)

    @classmethod
    def take(cls, run: RunDirectory, role: Role) -> Attempt:
        """A new attempt. Raises ContractError, OSError."""
        nonce = os.environ.get(Env.NONCE) or secrets.token_hex(16)
        return cls(run, role, run.take_attempt(role, nonce), nonce)

    @classmethod
    def reopen(cls, run: RunDirectory, role: Role, nonce: str) -> Attempt | None:
        """The attempt that this life took; a new one when it was killed before it had any.

        None when a new one would supersede an attempt that may be alive.
        """
        latest = run.latest_attempt(role)
        for number in range(latest, 0, -1):
            token = read_bytes(run.attempts / f"{role}-{number}" / "token")
            if token.decode(errors="replace").strip() == nonce:
                return cls(run, role, number, nonce)
        status = run.read(run.status(role), JobStatus)
        if latest and (status is None or status.attempt < latest or status.phase != "ended"):
            return None
        return cls(run, role, run.take_attempt(role, nonce), nonce)

    @property
    def peer(self) -> Role:
        return Role.TRAINING if self.role == Role.RUNTIME else Role.RUNTIME

    def _scheduler(self) -> Scheduler | None:
        """None when the job was started by hand: then no scheduler knows anything about it."""
        if not self.job_id:
            return None
        args = self.manifest.scheduler_args
        try:
            return open_scheduler(self.manifest.scheduler, Path(args.get("runs_dir") or self.run.root.parent))
        except SchedulerError as error:
            self.say("scheduler_unavailable", problem=str(error))
            return None

    # --- its lives ---

    @property
    def restarts(self) -> int:
        """How often the scheduler has requeued this job."""
        text = os.environ.get(Env.RESTARTS, "")
        return int(text) if text.isdigit() else 0

    @property
    def earlier(self) -> int:
        """Lives of this role before this one that count: those since the last launch."""
        return self.number - 1 - self.manifest.lives_before.get(self.role, 0)

    @property
    def is_task(self) -> bool:
        """Whether this job is one task of an array, of which the next one goes on."""
        return "_" in self.job_id

    @property
    def interactive(self) -> bool:
        """Whether a person started it, by hand or in an allocation of their own: it never requeues that."""
        if self.scheduler is None:
            return True
        manifest = self.run.read_manifest() or self.manifest
        mine = [s for s in manifest.submissions if s["role"] == self.role]
        if any(s["state"] == "intent" for s in mine[-1:]):
            return False  # the launcher is still writing down what has started already
        return self.job_id.partition("_")[0] not in {s.get("job_id") for s in mine}

    def returns(self) -> bool | None:
        """Whether the scheduler has another life for this job after this one; None: it does not say."""
        if self.inside is None or self.interactive:
            return False
        answer = self.inside.returns(self.job_id, self.restarts)
        self.say("asked_if_it_returns", answer=answer)
        return answer

    def stopped(self, warned: bool, orphaned: bool = False) -> Ending:
        """How a life ends that got TERM: requeued from outside, out of time, cancelled, or without a stub."""
        if returns := self.returns():
            return Ending(Outcome.REQUEUED, "the scheduler has requeued the job", 143)
        if orphaned:
            return Ending(Outcome.FAILED, ORPHANED, Exit.SOFTWARE)
        if warned:
            return Ending(Outcome.TIMEOUT, TIMED_OUT, 143)
        return Ending(Outcome.CANCELLED, STOPPED, 143, sure=returns is not None)

    # --- what it says ---

    def say(self, what: str, **data: Any) -> None:
        """An event. A full or hanging disk must not end a job that can still end orderly."""
        with contextlib.suppress(OSError):
            self.events.add(what, **data)

    def begin_in_logs(self) -> None:
        """A line with a time in each log: a requeued job appends to those of its earlier lives, and lines
        without a time would be taken for theirs."""
        self.say("began_again")
        line = f"{datetime.now(UTC).isoformat()} attempt {self.number} of the {self.role} job begins"
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                print(line, file=stream, flush=True)

    def status(self, phase: str, ending: Ending | None = None, reason: str = "") -> None:
        """Publish the status record. Raises Superseded when a later attempt owns it.

        Only the last word must get through; a disk that hiccups before it does not end a job.
        """
        self.check()
        record = JobStatus(
            run_id=self.run.run_id,
            role=self.role,
            attempt=self.number,
            job_id=self.job_id,
            nonce=self.nonce,
            host=socket.gethostname(),
            pid=os.getpid(),
            phase=phase,
            outcome=ending.outcome if ending else "",
            reason=ending.reason if ending else reason,
            exit_code=ending.exit_code if ending else None,
        )
        try:
            self.run.publish(self.run.status(self.role), record)
        except OSError as error:
            if ending is not None:
                raise
            print(f"status {phase} was not written: {error}", file=sys.stderr, flush=True)
        self.say(phase, **({"outcome": ending.outcome, "reason": ending.reason} if ending else {}))

    def requeued(self, ending: Ending) -> None:
        """Say, once, that another life follows; that one may have begun by now and own the record."""
        status = self.run.read(self.run.status(self.role), JobStatus)
        said = status is not None and status.nonce == self.nonce and status.phase == "ended"
        with contextlib.suppress(Superseded):
            if not said:
                self.status("ended", ending)

    def look(self, look: Callable[[], T | None]) -> T | None:
        """What a look at the run shows; nothing, when the filesystem hiccups: the next look decides."""
        try:
            return look()
        except OSError as error:
            print(f"the run directory cannot be read just now: {error}", file=sys.stderr, flush=True)
            return None

    def check(self) -> None:
        self.run.check_attempt(self.role, self.number)

    @property
    def superseded(self) -> bool:
        try:
            self.check()
        except Superseded:
            return True
        return False

    @contextlib.contextmanager
    def beating(self) -> Iterator[None]:
        with Heartbeat(self.run.heartbeat(self.role), self.settings.heartbeat_every):
            yield

    # --- what it gives and takes ---

    def environment(self) -> dict[str, str]:
        """The environment of the command: ours, and who this attempt is."""
        return dict(os.environ) | {
            Env.RUN_DIR.value: str(self.run.root),
            Env.JOB_ID.value: self.job_id,
            Env.ATTEMPT.value: str(self.number),
            Env.NONCE.value: self.nonce,
        }

    def cancel_peer(self, why: str) -> str:
        """Cancel the other job if it has not started: nobody else would, and it could wait for ever.

        Returns its id when it was cancelled and is over, "" otherwise.

        A peer that runs is left alone: it sees our record, and ends in its own order.
        """
        manifest = self.run.read_manifest()
        job_id = manifest.job_id(self.peer) if manifest else ""
        if self.scheduler is None or not job_id:
            return ""
        try:
            info = self.scheduler.query([job_id]).get(job_id)
            if info is not None and info.state in QUEUED:
                self.scheduler.cancel([job_id])
                self.say("cancelled_peer", job_id=job_id, why=why)
                return job_id if self._is_over(job_id) else ""
        except SchedulerError as error:
            self.say("cancel_failed", job_id=job_id, problem=str(error))
        return ""

    def _is_over(self, job_id: str) -> bool:
        """True once the scheduler says so; it is given a few seconds."""
        scheduler = self.scheduler

        def check() -> bool | None:
            info = scheduler.query([job_id]).get(job_id) if scheduler else None
            return True if info is not None and info.state in OVER else None

        with contextlib.suppress(WaitTimeout):
            return wait_for(check, f"the end of job {job_id}", _OVER_S)
        return False


def wrapper_code(code: int) -> int:
    """Exit code of the wrapper for the exit code of its command: never 0, never a signal's."""
    return code if 0 < code < 128 else int(Exit.SOFTWARE)
