"""The scheduler port: the one narrow door between a run and whatever starts its jobs.

What it is
    `Scheduler` is a protocol of eight verbs, `JobSpec` is what goes in and `JobInfo` is what comes out.
    `open_scheduler` finds the class behind a kind of scheduler; the classes live beside this file.

How to use it
    scheduler = open_scheduler("local", runs_dir)
    job_id = scheduler.submit(spec); scheduler.query([job_id])[job_id].state

What it does not do
    No records and no run directory (`orchestrator.launch` writes those). Nothing here assumes that the
    scheduler's commands exist on this machine: an implementation may carry them elsewhere. It imports
    the standard library only.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from orchestrator.errors import OrchestrateError
from orchestrator.frozen import dataclass

__all__ = [
    "OVER",
    "QUEUED",
    "JobInfo",
    "JobSpec",
    "JobState",
    "OwnJob",
    "RequeueRefused",
    "Scheduler",
    "SchedulerError",
    "SubmissionUnknown",
    "open_scheduler",
]


class SchedulerError(OrchestrateError):
    """A scheduler refused, or could not be asked. The message says what it was and what to do next."""


class RequeueRefused(SchedulerError):
    """This job, or this site, does not requeue: go on in another way."""


class SubmissionUnknown(SchedulerError):
    """The answer to a submission was lost, and the job cannot be seen (yet). It may exist, or appear."""


class JobState(StrEnum):
    """What a scheduler says about a job. How a job *ended* is said by its own record, not here."""

    PENDING = "pending"
    HELD = "held"
    RUNNING = "running"
    ENDED = "ended"
    UNKNOWN = "unknown"  # the scheduler did not answer: nobody may conclude anything from it
    GONE = "gone"  # the scheduler answered, and no longer knows the job


QUEUED = (JobState.PENDING, JobState.HELD)
OVER = (JobState.ENDED, JobState.GONE)


@dataclass(frozen=True)
class JobSpec:
    """One job to submit. Secrets are in files that `script` reads, never in here."""

    role: str
    name: str
    script: Path
    """Absolute path of `<role>.sbatch` in the run directory; it takes no arguments."""
    run_dir: Path
    out: str
    """Path of standard output; `%j` stands for the job id. Opened in append mode."""
    err: str
    env: dict[str, str]
    """The job's whole environment beyond what the scheduler sets itself; an allow-list, no secrets."""
    time_limit_s: int
    signal: str
    """`NAME@SECONDS`: the signal that the batch shell gets so long before the time limit."""
    token: str
    """Unique to this submission; `find` knows the job by it when the answer to a submit was lost."""
    args: list[str]
    """Resource arguments as this scheduler spells them."""
    held: bool = False
    after: str | None = None
    """Id of a job that must have started first."""
    requeue: bool = True


@dataclass(frozen=True)
class JobInfo:
    """A scheduler's answer about one job."""

    job_id: str
    state: JobState
    reason: str = ""
    exit_code: int | None = None
    host: str = ""
    raw: str = ""
    dependency: str = ""
    """What a pending job waits for, as the scheduler spells it."""
    time_left_s: int | None = None
    """Seconds to the time limit of a running job, where the scheduler tells."""
    task: str = ""
    """The array task that this is about, when `job_id` is an array's."""


@dataclass(frozen=True)
class OwnJob:
    """A job of ours as its label says: run, role and token stand in the job itself (Slurm: its comment)."""

    info: JobInfo
    run_id: str
    role: str
    token: str
    run_dir: str = ""
    """Working directory of the job, where the scheduler tells it."""


class Scheduler(Protocol):
    """What a run asks of a scheduler. Every method may raise SchedulerError, `query` only for misuse:
    when the scheduler does not answer, each job's state is UNKNOWN."""

    name: str

    def submit(self, spec: JobSpec) -> str:
        """Submit and return the job id."""
        ...

    def release(self, job_id: str) -> None:
        """Let a held job start. Releasing a job that is not held changes nothing."""
        ...

    def query(self, job_ids: Sequence[str], *, fresh: bool = False) -> dict[str, JobInfo]:
        """The state of each job asked for; every id has an entry.

        An answer may be a few seconds old, unless it is to be `fresh`: before a decision that is final.
        """
        ...

    def cancel(self, job_ids: Sequence[str]) -> None:
        """Ask the jobs to end: a signal that they can trap, then force. Returns without waiting."""
        ...

    def signal(self, job_id: str, name: str) -> None:
        """Send a signal by name, like USR1, to the batch shell of a running job."""
        ...

    def requeue(self, job_id: str) -> None:
        """End the job's present life and queue it again under the same id. Raises RequeueRefused."""
        ...

    def find(self, token: str) -> str | None:
        """Id of the job that was submitted with this token, or None."""
        ...

    def mine(self) -> list[OwnJob]:
        """Every job of this user that carries our label and is not over, whichever run it belongs to.

        An array counts by its tasks. Raises SchedulerError when the scheduler does not answer: an empty
        list is a fact, never a guess.
        """
        ...


def open_scheduler(kind: str, runs_dir: Path) -> Scheduler:
    """The scheduler of this kind. `local` keeps its state in `<runs_dir>/.local`.

    Raises SchedulerError where it cannot be used.
    """
    if kind == "local":
        from orchestrator.schedulers.local import LocalScheduler

        return LocalScheduler(runs_dir.absolute() / ".local")
    if kind == "slurm":
        from orchestrator.schedulers.slurm import SlurmScheduler

        return SlurmScheduler.here()
    raise SchedulerError(f"there is no scheduler {kind!r}; scheduler.kind is slurm or local")
