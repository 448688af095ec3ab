"""The run contract: everything that the parts of a run say to each other through files.

What it is
    One run is one directory on a shared filesystem. The launcher, the runtime job and the training
    job never talk directly; they publish records here, and each file has one writer. This module names
    every file (`RunDirectory`), every record, and every environment variable that crosses a process,
    and holds the operations that are safe on NFS, Lustre and GPFS: atomic publish, tolerant
    read, waiting with a deadline and a liveness check, attempts that fence out their predecessors,
    heartbeats judged on the observer's own clock, and the event timeline.

How to use it
    run = RunDirectory(path); run.publish(run.ready_flag, ReadyFlag(...)); run.read(run.ready_flag, ReadyFlag)

What it does not do
    No network, no scheduler, no configuration. It imports the standard library only, because job
    stubs, the server and the trainer all import it. A flag is only a hint: the truth is an HTTP
    `/health` that answers with the same run id and nonce.

Rules it keeps (docs/design.md, "The run directory")
    one writer per file; write beside, fsync, rename, fsync the directory; files that others wait for
    are created empty at launch; no flock, no modification times compared between hosts; a reader
    that finds an empty or half-written file has found nothing yet.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, Self, TypeVar

from orchestrator.durable import (
    append_line,
    fsync_directory,
    host_name,
    publish_bytes,
    read_bytes,
    read_json_lines,
)
from orchestrator.frozen import asdict, replace
from orchestrator.records import (
    CompleteFlag,
    ContractError,
    Env,
    Evaluation,
    Event,
    Exit,
    JobStatus,
    Manifest,
    NotARun,
    Outcome,
    PeerGone,
    ReadyFlag,
    Record,
    Result,
    Role,
    Saving,
    ServerRecord,
    Settings,
    Submission,
    Superseded,
    WaitTimeout,
)
from orchestrator.waiting import MISSED_BEATS, Heartbeat, Pulse, wait_for

__all__ = [
    "MISSED_BEATS",
    "CompleteFlag",
    "ContractError",
    "Env",
    "Evaluation",
    "Event",
    "EventLog",
    "Exit",
    "Heartbeat",
    "JobStatus",
    "Manifest",
    "NotARun",
    "Outcome",
    "PeerGone",
    "Pulse",
    "ReadyFlag",
    "Record",
    "Result",
    "Role",
    "RunDirectory",
    "Saving",
    "ServerRecord",
    "Settings",
    "Submission",
    "Superseded",
    "WaitTimeout",
    "append_line",
    "publish_bytes",
    "read_bytes",
    "read_json_lines",
    "wait_for",
]

R = TypeVar("R", bound=Record)


# --- the run directory -------------------------------------------------------------------------------


class _At:
    """A path below the root, joined when it is asked for: most are not, and many objects name one run."""

    def __init__(self, below: str) -> None:
        self.below = below

    def __get__(self, run: RunDirectory, kind: type[RunDirectory]) -> Path:
        return run.root / self.below


class RunDirectory:
    """One run as one object: a property per file, so that no path is ever joined at a call site."""

    # written by the launcher
    config = _At("config.yaml")
    provenance = _At("config.provenance.json")
    manifest = _At("run.json")
    code = _At("code")
    patch = _At("code.patch")
    env_file = _At("env.sh")
    # written by the runtime server (address and key) and by the runtime job (status)
    runtime_url = _At("runtime_url.txt")
    runtime_api_key = _At("runtime_api_key.txt")
    ready_flag = _At("runtime_ready.flag")
    runtime = _At("runtime")
    servers = _At("runtime/servers")  # each file of it written by the server that it names,
    targets = _At("runtime/targets")  # and of this
    # written by the training job; metrics, summary and below by the trainer in it
    complete_flag = _At("training_complete.flag")
    result = _At("result.json")
    training = _At("training")
    metrics = _At("training/metrics.jsonl")
    summary = _At("training/summary.json")
    checkpoint_request = _At("training/checkpoint.request")
    saving = _At("training/saving.json")
    checkpoints = _At("training/checkpoints")
    rollouts = _At("training/rollouts")
    tensorboard = _At("training/tensorboard")
    evaluation = _At("training/evaluation.json")
    judged = _At("training/judged")  # each file of it written by the life that it names
    evaluated = _At("training/evaluated")  # the weights that are evaluated; the launcher's
    # one file per writer, merged on reading
    events = _At("events")
    attempts = _At("attempts")
    history = _At("history")

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root).absolute()

    def __repr__(self) -> str:
        return f"RunDirectory({str(self.root)!r})"

    @property
    def run_id(self) -> str:
        """The directory's own name: `YYYYMMDD_HHMMSS_<id>`."""
        return self.root.name

    def script(self, role: str) -> Path:
        """What was submitted for this role, resubmittable by hand."""
        return self.root / f"{role}.sbatch"

    def status(self, role: str) -> Path:
        """`JobStatus` of one job, written by that job."""
        return self.root / role / "status.json"

    def heartbeat(self, role: str) -> Path:
        """The changing nonce of one job."""
        return self.root / role / "heartbeat"

    def server(self, name: str) -> Path:
        """`ServerRecord` of one server of a fleet."""
        return self.servers / f"{name}.json"

    def server_heartbeat(self, name: str) -> Path:
        return self.servers / f"{name}.heartbeat"

    def target(self, name: str) -> Path:
        """Where Prometheus finds one server: a file of its `file_sd_configs`."""
        return self.targets / f"{name}.json"

    def judged_by(self, attempt: int, rank: int) -> Path:
        """Episodes that one process of one life has judged (an evaluation's)."""
        return self.judged / f"attempt-{attempt}.rank-{rank}.jsonl"

    def submissions(self, role: str) -> Path:
        """Journal of what this role's job has submitted: a successor of its own, or of its peer."""
        return self.root / role / "submissions.jsonl"

    def earlier(self, number: int) -> Path:
        """Folder with what an earlier life of this run left: its result, configuration and scripts."""
        return self.history / str(number)

    def out(self, role: str, job_id: str) -> Path:
        return self.root / f"{role}_{job_id}.out"

    def err(self, role: str, job_id: str) -> Path:
        return self.root / f"{role}_{job_id}.err"

    # --- life ---

    @classmethod
    def create(cls, runs_dir: Path, label: str = "") -> Self:
        """Make a new run directory (0700) with every awaited file empty. Raises OSError."""
        name = time.strftime("%Y%m%d_%H%M%S") + "_" + (label or os.urandom(3).hex())
        run = cls(runs_dir / name)
        runs_dir.mkdir(parents=True, exist_ok=True)
        run.root.mkdir(mode=0o700)
        for folder in (run.runtime, run.servers, run.training, run.events, run.attempts):
            folder.mkdir()
        for awaited in run.awaited():
            os.close(os.open(awaited, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        fsync_directory(run.root)
        return run

    @classmethod
    def open(cls, root: str | os.PathLike[str]) -> Self:
        """An existing run. Raises NotARun when the directory has no manifest."""
        run = cls(root)
        if not run.manifest.is_file():
            raise NotARun(
                f"{run.root} is not a run directory (no run.json in it). `orchestrate list` shows the runs."
            )
        return run

    def awaited(self) -> list[Path]:
        """Files that another process waits for: created empty, so that no client caches their absence."""
        roles = (Role.RUNTIME, Role.TRAINING)
        return [
            self.runtime_url,
            self.runtime_api_key,
            self.ready_flag,
            self.complete_flag,
            self.result,
            self.checkpoint_request,
            self.saving,
            *(self.submissions(r) for r in roles),
            *(self.status(r) for r in roles),
            *(self.heartbeat(r) for r in roles),
        ]

    # --- records ---

    def publish(self, path: Path, record: Record | str, mode: int = 0o644) -> None:
        """Publish a record (or a line of text, for url and key) atomically."""
        text = record.to_json() if isinstance(record, Record) else record.rstrip("\n") + "\n"
        publish_bytes(path, text.encode(), mode)

    def read(self, path: Path, kind: type[R]) -> R | None:
        """The record, or None when it is not there yet, empty, or half-written."""
        try:
            return kind.from_json(read_bytes(path).decode())
        except ValueError:
            return None

    def read_manifest(self) -> Manifest | None:
        """The manifest with every submission of the run in it, also those that its jobs made."""
        if (manifest := self.read(self.manifest, Manifest)) is None:
            return None
        roles = (Role.RUNTIME, Role.TRAINING)
        more = [row for role in roles for row in read_json_lines(self.submissions(role))]
        everything = sorted([*manifest.submissions, *more], key=lambda entry: entry.get("number", 1))
        return replace(manifest, submissions=everything)

    def read_servers(self) -> list[ServerRecord]:
        """What the servers of this run's fleet say, those of an earlier attempt included: hints, no more."""
        paths = sorted(self.servers.glob("*.json"))
        found = [self.read(path, ServerRecord) for path in paths]
        return [record for record in found if record is not None and record.run_id == self.run_id]

    def read_text(self, path: Path) -> str:
        """A published line; "" when it is not there yet."""
        return read_bytes(path).decode(errors="replace").strip()

    def events_of(self, role: str, writer: str = "") -> EventLog:
        """The timeline file of one writer. `writer` tells two processes of one role apart."""
        return EventLog(self.events / f"{writer or role}.jsonl", role)

    def events_of_caller(self, name: str) -> EventLog:
        """A timeline file of this call alone: several people may act on one run at once, from any host."""
        writer = f"{name}-{host_name()}-{os.getpid()}-{time.time_ns()}"
        return self.events_of(Role.LAUNCHER, writer)

    def timeline(self) -> list[Event]:
        """Every event of every writer, in order of time."""
        rows = [row for path in sorted(self.events.glob("*.jsonl")) for row in read_json_lines(path)]
        events = [event for row in rows if (event := _event(row)) is not None]
        return sorted(events, key=lambda e: e.at)

    def cancel_asked(self) -> bool:
        """Whether somebody asked for the end of the run, and nobody resumed it since."""
        asked = [e.what for e in self.timeline() if e.what in ("launcher.cancel", "launcher.resumed")]
        return asked[-1:] == ["launcher.cancel"]

    # --- attempts ---

    def take_attempt(self, role: str, token: str) -> int:
        """Take the next attempt number of a role: `mkdir` is atomic, and a token settles a retried one.

        A token must be unique to the process life. Returns the number, from 1.
        """
        for number in range(self.latest_attempt(role) + 1, 10_000):
            folder = self.attempts / f"{role}-{number}"
            try:
                folder.mkdir()
            except FileExistsError:
                if read_bytes(folder / "token").decode().strip() != token:
                    continue
            publish_bytes(folder / "token", token.encode())
            return number
        raise ContractError(f"{role} of {self.run_id} was started 10,000 times; look at its logs")

    def latest_attempt(self, role: str) -> int:
        """The highest attempt taken, 0 before the first."""
        numbers = [p.name.rpartition("-")[2] for p in self.attempts.glob(f"{role}-*")]
        return max((int(n) for n in numbers if n.isdigit()), default=0)

    def end_unstarted(self, job_id: str, outcome: Outcome, reason: str, exit_code: int) -> None:
        """Write result and complete flag for a training job that can no longer start and write them.

        Only for the one who made sure of that: the scheduler says that the job is over. A result that is
        there already stays.
        """
        if self.read(self.result, Result) is not None:
            return
        attempt = self.latest_attempt(Role.TRAINING)
        result = Result(
            run_id=self.run_id,
            attempt=attempt,
            job_id=job_id,
            outcome=outcome,
            reason=reason,
            exit_code=exit_code,
        )
        self.publish(self.result, result)
        self.publish(
            self.complete_flag, CompleteFlag(run_id=self.run_id, attempt=attempt, nonce="", outcome=outcome)
        )

    def check_attempt(self, role: str, attempt: int) -> None:
        """Raise Superseded when a later attempt of this role exists."""
        latest = self.latest_attempt(role)
        if latest > attempt:
            raise Superseded(f"attempt {attempt} of {role} was superseded by attempt {latest}")


# --- the timeline ------------------------------------------------------------------------------------


class EventLog:
    """Appends events to a file that only this process writes."""

    def __init__(self, path: Path, role: str, attempt: int = 0) -> None:
        self.path, self.role, self.attempt = path, role, attempt

    def add(self, what: str, **data: Any) -> None:
        """Append one event, e.g. `log.add("ready", url=url)`; the role is put in front of the name."""
        event = Event(
            role=self.role,
            what=f"{self.role}.{what}",
            attempt=self.attempt,
            host=host_name(),
            data=data,
        )
        append_line(self.path, json.dumps(asdict(event), sort_keys=True, default=str))


def _event(row: dict[str, Any]) -> Event | None:
    try:
        return Event.from_json(json.dumps(row))
    except ValueError:
        return None
