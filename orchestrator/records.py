"""The words of the run contract: roles, exit codes, environment names, errors and records.

What it is
    The vocabulary that `orchestrator.contract` puts into files. Import it from there.

What it does not do
    No I/O; standard library only.
"""

from __future__ import annotations

import json
import time
from enum import IntEnum, StrEnum
from typing import Any, Self

from orchestrator.errors import OrchestrateError
from orchestrator.frozen import asdict, dataclass, field, fields


class Env(StrEnum):
    """Environment variables that cross a process boundary."""

    RUN_DIR = "ORCHESTRATE_RUN_DIR"
    JOB_ID = "ORCHESTRATE_JOB_ID"  # the scheduler's id of this job, whatever the scheduler
    ATTEMPT = "ORCHESTRATE_ATTEMPT"
    NONCE = "ORCHESTRATE_NONCE"
    RUNTIME_URL = "ORCHESTRATE_RUNTIME_URL"
    RUNTIME_API_KEY_FILE = "ORCHESTRATE_RUNTIME_API_KEY_FILE"
    RUNTIME_API_KEY = "ORCHESTRATE_RUNTIME_API_KEY"
    RESTARTS = "ORCHESTRATE_RESTARTS"  # how often the scheduler has requeued this job, "0" at first
    PYTHON = "ORCHESTRATE_PYTHON"  # interpreter of the jobs


class Role(StrEnum):
    """The parts of a run; each value is also a folder name in the run directory."""

    LAUNCHER = "launcher"
    RUNTIME = "runtime"
    TRAINING = "training"


class Exit(IntEnum):
    """Exit codes with a meaning of their own (sysexits.h where one fits)."""

    OK = 0
    USAGE = 64  # EX_USAGE: the configuration or the command line is wrong
    NO_INPUT = 66  # EX_NOINPUT: a file that was named is missing
    PEER_GONE = 69  # EX_UNAVAILABLE: the other job died or never became ready
    SOFTWARE = 70  # EX_SOFTWARE: the training stopped itself (collapse alarm, failed probe)
    REQUEUE = 85  # checkpoint written, please requeue: the batch shell asks the scheduler
    AGAIN = 86  # of the runtime's wrapper: the server died, the stub starts a new life in the same job


class Outcome(StrEnum):
    """How a run, or one attempt of a job, ended."""

    SUCCESS = "success"
    FAILED = "failed"
    CANCELLED = "cancelled"
    TIMEOUT = "timeout"
    REQUEUED = "requeued"
    PEER_GONE = "peer_gone"


class ContractError(OrchestrateError):
    """Root of this module's errors.

    ContractError
    ├── WaitTimeout     the deadline passed before the awaited thing appeared
    ├── PeerGone        the process that was to produce it is known to be dead
    ├── Superseded      a later attempt has taken over; this process must stop
    └── NotARun         the directory is no run directory
    """


class WaitTimeout(ContractError):
    """What was awaited did not appear before the deadline."""


class PeerGone(ContractError):
    """The process that was to produce what we wait for is known to be dead."""


class Superseded(ContractError):
    """A later attempt of the same role has taken its number; the earlier one must stop writing."""


class NotARun(ContractError):
    """The directory holds no run."""


# --- records -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Record:
    """Base of everything published as JSON. Fields are only ever added, always with a default."""

    schema: int = 1

    def to_json(self) -> str:
        """A field a line: indenting all of it would be done in Python, and take ten times as long."""
        fields = [
            f"  {json.dumps(n)}: {json.dumps(v, sort_keys=True)}" for n, v in sorted(asdict(self).items())
        ]
        return "{\n" + ",\n".join(fields) + "\n}\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Parse; unknown fields (a later version's) are dropped. Raises ValueError when it is no record."""
        data = json.loads(text)
        if not isinstance(data, dict):
            raise ValueError(f"expected a JSON object for {cls.__name__}")
        known = {f.name for f in fields(cls)}
        try:
            return cls(**{k: v for k, v in data.items() if k in known})
        except TypeError as error:
            raise ValueError(f"incomplete {cls.__name__}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class ReadyFlag(Record):
    """`runtime_ready.flag`: a runtime server answered its own health check at this address."""

    run_id: str
    attempt: int
    job_id: str
    nonce: str
    host: str
    pid: int
    url: str


@dataclass(frozen=True, kw_only=True)
class ServerRecord(Record):
    """`runtime/servers/<name>.json`: one server of a fleet, said by itself once it answers its own health
    check at this address. Empty again when it stops in order; of one that was killed it stays, a hint."""

    run_id: str
    name: str
    attempt: int
    job_id: str
    nonce: str
    host: str
    pid: int
    url: str
    places: int = 0  # sandboxes that it can have at once
    at: float = field(default_factory=time.time)


@dataclass(frozen=True, kw_only=True)
class CompleteFlag(Record):
    """`training_complete.flag`: the training is over for good; written after `result.json`."""

    run_id: str
    attempt: int
    nonce: str
    outcome: str


@dataclass(frozen=True, kw_only=True)
class Result(Record):
    """`result.json`: what came of the run. `metrics` is the last word of the trainer, flat numbers."""

    run_id: str
    attempt: int
    job_id: str
    outcome: str
    reason: str
    exit_code: int
    metrics: dict[str, float] = field(default_factory=dict)
    finished_at: float = field(default_factory=time.time)


@dataclass(frozen=True, kw_only=True)
class Evaluation(Record):
    """`training/evaluation.json`: what an evaluation found; until it is `complete`, what it is about to do.

    `tasks` were sampled `samples` times each. `judged` episodes count; `lost` ones infrastructure took every
    time, and nobody scored them. `pass_at` has for each k the estimate (`value`), its standard error over the
    tasks (`stderr`; null of a single task), and how many `tasks` had k judged samples. `by_task` has `task`,
    `samples` that were judged, and `successes`.
    """

    run_id: str
    attempt: int
    tasks: int
    samples: int
    complete: bool = False
    judged: int = 0
    lost: int = 0
    pass_at: dict[str, dict[str, float | None]] = field(default_factory=dict)
    reward_mean: float | None = None
    by_task: list[dict[str, Any]] = field(default_factory=list)
    temperature: float = 1.0
    greedy: bool = False
    seed: int = 0
    engine: str = ""
    model: str = ""
    checkpoint: str = ""  # folder of the checkpoint; "": the model itself
    step: int | None = None  # of the checkpoint
    weights: str = ""  # sha256 of the model's safetensors, in the order of their names
    data: str = ""
    data_digest: str = ""  # sha256 of the file; of a built-in family, of its rows as JSON
    versions: dict[str, str] = field(default_factory=dict)
    at: float = field(default_factory=time.time)


@dataclass(frozen=True, kw_only=True)
class JobStatus(Record):
    """`<role>/status.json`: where the present attempt of one job stands, said by the job itself.

    phase is one of starting, waiting, running, draining, ended; outcome is empty until it is ended.
    """

    run_id: str
    role: str
    attempt: int
    job_id: str
    nonce: str
    host: str
    pid: int
    phase: str
    outcome: str = ""
    reason: str = ""
    exit_code: int | None = None
    at: float = field(default_factory=time.time)


@dataclass(frozen=True, kw_only=True)
class Saving(Record):
    """`training/saving.json`: how long this trainer needs for a checkpoint, in seconds, as far as it was seen
    in all lives of the run. The job around it asks for one early enough for that."""

    save_s: float = 0.0  # the longest save, until it was durable
    busy_s: float = 0.0  # the longest stretch in which a request for one has to wait: an update


@dataclass(frozen=True, kw_only=True)
class Submission(Record):
    """One entry of a journal of submissions. state: intent → submitted → confirmed (or failed).

    The launcher's journal is in the manifest; a job that submits a successor, its own or its peer's, keeps
    one of its own (`RunDirectory.submissions`). `number` counts the submissions of a role.
    """

    role: str
    token: str
    state: str
    job_id: str = ""
    scheduler: str = ""
    number: int = 1
    at: float = field(default_factory=time.time)


@dataclass(frozen=True, kw_only=True)
class Settings(Record):
    """What the jobs themselves need to know of the configuration; all times in seconds.

    The launcher copies these out of `config.yaml` into `Manifest.settings`, so that a job reads them
    without loading the schema. An empty command means the built-in one.
    """

    ready_timeout: float = 600.0  # until the runtime must have become ready
    peer_grace: float = 60.0  # training goes on so long without an answer from the runtime
    stop_timeout: float = 25.0  # from TERM to KILL of the command; below the scheduler's own KillWait
    start_policy: str = "release-on-ready"  # or "after"
    on_timeout: str = "requeue"  # requeue | array | chain | stop
    max_restarts: int = 3
    signal_lead: float = 90.0  # the warning comes so long before the time limit, or up to a minute earlier
    runtime_max_restarts: int = 0  # how often the runtime may live again; 0: its death ends the run
    failover_timeout: float = 0.0  # training waits so much longer for a runtime known to be coming back
    runtime_nodes: int = 1  # servers of the runtime job, one on each node
    runtime_ready_nodes: int = 1  # of which so many must answer before the training starts
    runtime_cpus: int = 0  # per node; 0: not known
    launcher: str = "none"  # or torchrun: one process per GPU, on every node
    nodes: int = 1  # of the training job, as the two below
    processes: int = 1  # per node
    cpus: int = 0  # per node; 0: not known
    runtime_command: list[str] = field(default_factory=list)
    training_command: list[str] = field(default_factory=list)
    sweep_command: list[str] = field(default_factory=list)  # removes what a killed server left on its node
    checkpoint_dir: str = ""  # where the trainer keeps its checkpoints; "": in the run directory
    checkpoint_signal: str = "USR1"  # how the trainer is told that the walltime is near
    heartbeat_every: float = 10.0
    look_every: float = 0.5  # between looks at the run directory
    query_every: float = 0.0  # between questions to the scheduler; 0: 1 s for local, else 15 s


@dataclass(frozen=True, kw_only=True)
class Manifest(Record):
    """`run.json`: what was launched. Written by the launcher only."""

    run_id: str
    scheduler: str
    scheduler_args: dict[str, str] = field(default_factory=dict)
    attempt: int = 1
    created_at: float = field(default_factory=time.time)
    user: str = ""
    host: str = ""
    command: list[str] = field(default_factory=list)
    config_name: str = ""
    version: str = ""
    commit: str = ""
    dirty: bool = False
    mode: str = "run"  # run | runtime-only | runtime-url
    environment: dict[str, str] = field(default_factory=dict)
    submissions: list[dict[str, Any]] = field(default_factory=list)
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)  # `JobSpec` by role, to submit it again
    lives_before: dict[str, int] = field(default_factory=dict)  # attempts by role that count for no limit
    settings: dict[str, Any] = field(default_factory=dict)  # fields of `Settings`
    launcher: dict[str, Any] = field(default_factory=dict)  # the process that submits: `processes.Process`

    def job_settings(self) -> Settings:
        """The settings of the jobs; what the launcher left out has its default."""
        return Settings.from_json(json.dumps(self.settings))

    def job_id(self, role: str) -> str:
        """The id of the role's last submission that reached the scheduler, or ""."""
        ids = [s["job_id"] for s in self.submissions if s["role"] == role and s.get("job_id")]
        return ids[-1] if ids else ""


@dataclass(frozen=True, kw_only=True)
class Event(Record):
    """One line of the timeline. `what` is dotted, role first: `runtime.ready`, `training.step`."""

    role: str
    what: str
    at: float = field(default_factory=time.time)
    attempt: int = 0
    host: str = ""
    data: dict[str, Any] = field(default_factory=dict)
