"""The files of one local job: what the scheduler and the job's supervisor say to each other.

What it is
    Each job is a folder `<runs_dir>/.local/jobs/<id>/`. The folder is built beside and renamed into place,
    so that a job id is taken atomically and never names half a job.

        spec.json       what was submitted; written once, by `submit`
        script          copy of the batch script: later edits change nothing, as under Slurm
        state.json      where the job stands; written by the supervisor only
        requests/       one small file per request, removed once the supervisor has acted on it
        wake            a FIFO: a byte in it means "look at your requests"
        waiters/        ids of jobs that wait for this one to leave the queue
        supervisor.log  what the supervisor itself had to say (normally nothing)

What it does not do
    It decides nothing, and starts nothing but a supervisor. Local means this machine: the pids in
    `state.json` and the FIFO have no meaning elsewhere.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.durable import publish_bytes, read_bytes
from orchestrator.identity import Process
from orchestrator.records import Record
from orchestrator.schedulers import QUEUED, JobSpec, JobState

_PACKAGE_ROOT = Path(__file__).absolute().parents[2]


@dataclass(frozen=True, kw_only=True)
class JobRecord(Record):
    """`state.json`. `raw` is the word that Slurm would use; times are this machine's wall clock."""

    job_id: str
    state: str
    raw: str
    reason: str = ""
    exit_code: int | None = None
    restarts: int = 0
    supervisor: dict[str, Any] = field(default_factory=dict)
    keeper: dict[str, Any] = field(default_factory=dict)
    script_pid: int = 0
    started_at: float = 0.0
    ended_at: float = 0.0

    @property
    def over(self) -> bool:
        return self.state == JobState.ENDED

    @property
    def queued(self) -> bool:
        return self.state in QUEUED

    def alive(self) -> bool | None:
        """Whether a process still looks after the job: True, False, or None where it cannot be seen."""
        answers = {Process(**who).alive() for who in (self.supervisor, self.keeper) if who}
        return True if True in answers else None if None in answers else False


@dataclass(frozen=True, kw_only=True)
class LocalSpec(Record):
    """`spec.json`: a JobSpec, and how this scheduler treats it."""

    job: dict[str, Any]
    kill_wait_s: float
    requeue_delay_s: float

    def spec(self) -> JobSpec:
        paths = {name: Path(self.job[name]) for name in ("script", "run_dir")}
        return JobSpec(**{**self.job, **paths})

    @classmethod
    def of(cls, spec: JobSpec, kill_wait_s: float, requeue_delay_s: float) -> LocalSpec:
        job = dataclasses.asdict(spec) | {"script": str(spec.script), "run_dir": str(spec.run_dir)}
        return cls(job=job, kill_wait_s=kill_wait_s, requeue_delay_s=requeue_delay_s)


class JobFiles:
    """The folder of one job: a property per file."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.spec_file = root / "spec.json"
        self.script = root / "script"
        self.state_file = root / "state.json"
        self.requests = root / "requests"
        self.wake_fifo = root / "wake"
        self.waiters = root / "waiters"
        self.log = root / "supervisor.log"

    @property
    def job_id(self) -> str:
        return self.root.name

    def sibling(self, job_id: str) -> JobFiles:
        return JobFiles(self.root.parent / job_id)

    def create(self, spec: LocalSpec, script: bytes) -> None:
        """Build the folder; whoever calls renames it into place afterwards."""
        self.root.mkdir(mode=0o700)
        self.requests.mkdir()
        self.waiters.mkdir()
        os.mkfifo(self.wake_fifo, 0o600)
        publish_bytes(self.script, script, 0o500)
        publish_bytes(self.spec_file, spec.to_json().encode(), 0o600)

    def spec(self) -> LocalSpec:
        """Raises ValueError when there is no job here."""
        return LocalSpec.from_json(read_bytes(self.spec_file).decode())

    def record(self) -> JobRecord | None:
        with contextlib.suppress(ValueError):
            return JobRecord.from_json(read_bytes(self.state_file).decode())
        return None

    def publish(self, record: JobRecord) -> None:
        publish_bytes(self.state_file, record.to_json().encode(), 0o600)

    # --- requests ---

    def post(self, verb: str, argument: str = "") -> Path:
        """Leave a request and wake the supervisor. The file is the truth, the wake-up only a hint."""
        path = self.requests / f"{time.time_ns():020d}-{uuid.uuid4().hex}.json"
        publish_bytes(path, json.dumps([verb, argument]).encode(), 0o600)
        self.wake()
        return path

    def wake(self) -> None:
        """Put a byte into the FIFO; nobody listening (the job is over) is no error."""
        with contextlib.suppress(FileNotFoundError):
            try:
                descriptor = os.open(self.wake_fifo, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return
                raise
            with contextlib.suppress(BlockingIOError):  # full: it will wake anyway
                os.write(descriptor, b"!")
            os.close(descriptor)

    def pending_requests(self) -> list[Path]:
        """Request files, oldest first; removing one acknowledges it."""
        return sorted(self.requests.glob("*.json"))


def read_request(path: Path) -> tuple[str, str]:
    """(verb, argument) of a request file."""
    verb, argument = json.loads(read_bytes(path))
    return str(verb), str(argument)


def start_supervisor(files: JobFiles) -> None:
    """Returns when the supervisor has published the job's state. It gets only variables that it uses."""
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    subprocess.run(
        [sys.executable, "-P", "-m", "orchestrator.schedulers.local_job", str(files.root)],
        check=True,
        capture_output=True,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=30,
        env=environment | {"PYTHONPATH": str(_PACKAGE_ROOT)},
    )
