"""The shape of `config.yaml`: every key that a run understands, its type, its default and its meaning.

What it is
    Typed sections (`orchestrator.typed`), strict: an unknown key is an error. The launcher resolves its
    layers into one `Config`, freezes it into the run directory, and the server and the trainer read it
    from there; so the schema is part of the run contract. The reference page of the keys is generated from
    it.

What it does not do
    No reading of files and no layers (`orchestrator.config` does); no heavy import.
"""

from typing import Annotated, Literal

from orchestrator.quantities import Mebibytes, Seconds, parse_seconds
from orchestrator.schema_training import Algorithm, Data, Evaluation, Model, Rollout, Trainer
from orchestrator.typed import Limits, Read, Section, made


class Run(Section):
    name: Annotated[str, Limits(pattern=r"^[A-Za-z0-9._-]{1,40}$")] = "run"
    """Short name of the run, shown by `orchestrate list` and in the scheduler's queue."""
    runs_dir: str = ".orchestrate_runs"
    """Where run directories are made; on the shared filesystem of the cluster."""
    seed: Annotated[int, Limits(ge=0)] = 0
    """Seed of everything random: data order, sampling, initial weights."""


class Scheduler(Section):
    kind: Literal["local", "slurm"] = "slurm"
    """`slurm` submits to the cluster, `local` runs the same job scripts as processes on this machine."""
    start_policy: Literal["release-on-ready", "after"] = "release-on-ready"
    """The training job is held until the runtime is ready, or starts by plain dependency."""
    account: str = ""
    """Account to charge (Slurm `--account`)."""
    qos: str = ""
    """Quality of service (Slurm `--qos`)."""
    reservation: str = ""
    """Reservation to run in (Slurm `--reservation`)."""
    extra_args: list[str] = made(factory=list)
    """Further arguments for both submissions, as the scheduler spells them."""
    signal: Annotated[str, Limits(pattern=r"^(USR1|USR2)@\d+$")] = "USR1@90"
    """Signal before the time limit, to the batch shell only, and how many seconds before it."""
    on_timeout: Literal["requeue", "array", "chain", "stop"] = "requeue"
    """What happens at the walltime, once a checkpoint was written."""
    max_restarts: Annotated[int, Limits(ge=0)] = 3
    """How often the training job may live again; only after progress. An array has one task more."""


class Job(Section):
    """Resources of one job."""

    partition: str = ""
    """Partition (queue); empty means the cluster's default."""
    nodes: Annotated[int, Limits(ge=1)] = 1
    """Number of nodes."""
    cpus: Annotated[int, Limits(ge=1)] = 8
    """CPUs per node."""
    memory: Mebibytes = 32768
    """Memory per node, in MiB, or with a unit: 64G."""
    time_limit: Seconds = 14400
    """Walltime: seconds, 45m, 2h, or [days-]hours:minutes:seconds."""
    constraint: str = ""
    """Node features to ask for (Slurm `--constraint`)."""
    setup_commands: list[str] = made(factory=list)
    """Shell lines that run in the job before anything else: module loads, conda activation."""
    python: str = ""
    """Interpreter of the job; empty means the one that launches."""


class Sandbox(Section):
    """Limits of one sandbox."""

    image: str = "localhost/orchestrate/sandbox:latest"
    """Image of sandboxes whose task names none."""
    cpus: Annotated[float, Limits(gt=0)] = 1.0
    """CPUs of one sandbox."""
    memory: Mebibytes = 1024
    """Memory of one sandbox, in MiB, swap included."""
    pids: Annotated[int, Limits(ge=8)] = 512
    """Processes in one sandbox."""
    shm: Mebibytes = 64
    """Size of /dev/shm, in MiB."""
    disk: Mebibytes = 10_240
    """What a sandbox may write, in MiB, beyond its image; and 64 files for each MiB."""
    ttl: Seconds = 3600
    """A sandbox that nobody used for so long is removed."""
    command_timeout: Seconds = 120
    """Time limit of a command whose caller names none."""
    max_output: Annotated[int, Limits(ge=1024)] = 1 << 20
    """Bytes kept of each output stream of a command: the head and the tail."""


class Runtime(Job):
    """The runtime job: CPU nodes that serve sandboxes."""

    engine: Literal["podman", "apptainer", "process"] = "podman"
    """What makes the sandboxes. `process` isolates nothing: for debugging on a machine of your own."""
    host: str = "0.0.0.0"  # noqa: S104 - other nodes must reach it; every route needs the key
    """Address that the server binds."""
    advertise_host: str = ""
    """Name or address that the training job uses; empty means this node's own."""
    port: Annotated[int, Limits(ge=0, le=65535)] = 0
    """Port of the server; 0 takes a free one."""
    max_restarts: Annotated[int, Limits(ge=0)] = 3
    """How often the runtime may come back after it had served: a crashed server, the walltime, a lost
    node; 0 means that its death ends the run."""
    failover_timeout: Annotated[int, Read(parse_seconds), Limits(ge=0)] = 600
    """How much longer than `training.peer_grace` the training waits for a runtime that is known to be
    coming back; 0 never waits longer and submits no successor."""
    ready_nodes: Annotated[int, Limits(ge=1)] = 1
    """Of the servers, one on each of `runtime.nodes` nodes, so many must answer before training starts."""
    ready_timeout: Seconds = 600
    """How long the training job waits for the server to become ready."""
    max_parallel_sandboxes: Annotated[int, Limits(ge=1)] = 64
    """Sandboxes that may exist at once on one node; more wait in a queue."""
    max_per_run: Annotated[int, Limits(ge=0)] = 0
    """Of them, how many one run may have at once where a server serves several (`--runtime-url`); a run is
    told by the label `run` of its creates; 0 is any number."""
    max_parallel_creates: Annotated[int, Limits(ge=1)] = 4
    """Containers that are created or removed at the same time."""
    queue_timeout: Seconds = 600
    """How long a create may wait in the queue."""
    start_hold: Seconds = 8
    """How long `/start` waits before it says `pending`; less than OpenHands' `remote_runtime_api_timeout`."""
    max_lifetime: Annotated[int, Read(parse_seconds), Limits(ge=0)] = 0
    """When a sandbox ends however busy it is, unless its create says otherwise; 0 is never."""
    warm: Annotated[int, Limits(ge=0)] = 0
    """Containers kept ready for the next sandboxes, whatever their image; the trainer's prefetch asks for
    as many as its next batch needs, within `max_parallel_sandboxes`."""
    image_budget: Mebibytes = 102_400
    """Disk space, in MiB, for images that the server pulled itself; above it the longest unused goes."""
    pull_timeout: Seconds = 600
    """How long the pull of one image may take."""
    drain_timeout: Seconds = 20
    """How long running commands may go on once the server was told to stop."""
    state_dir: str = ""
    """Node-local directory for sockets and container storage; empty means one is made under TMPDIR."""
    image_store: str = ""
    """Node-local store of images, read-only to the server; empty means the one that set-up filled."""
    image_archives: list[str] = made(factory=list)
    """Tar archives of images on the shared filesystem; a node loads them once into its own store."""
    sandbox: Sandbox = made(factory=Sandbox)


class Training(Job):
    """The training job: GPU nodes that generate and train."""

    gpus_per_node: Annotated[int, Limits(ge=0)] = 1
    """GPUs per node; 0 trains on CPUs."""
    gpu_type: str = ""
    """GRES type of the GPUs, where the site names one: a100, 1g.10gb."""
    checkpoint_signal: Literal["USR1", "USR2"] = "USR1"
    """How the trainer process is told that the walltime is near; the request is in a file as well."""
    launcher: Literal["auto", "none", "torchrun"] = "auto"
    """How the training processes start: one process, or `torchrun` with one process per GPU, on several
    nodes through `srun`. `auto` takes torchrun when there is more than one node or GPU."""
    command: Literal["native"] = "native"
    """What trains: the built-in PPO."""
    peer_grace: Seconds = 60
    """How long training goes on without an answer from any runtime server before it gives up."""


class Environment(Section):
    """The environment of both jobs."""

    env_file: str = ""
    """A `.env` file whose variables both jobs get; it is copied 0600 and never printed."""
    variables: dict[str, str] = made(factory=dict)
    """Further variables, by name."""
    network_provider: str = ""
    """Fabric provider for collective communication (`FI_PROVIDER`), like cxi, efa, tcp."""
    debug: bool = False
    """Verbose logs of every part."""


class Config(Section):
    """A whole, resolved configuration."""

    run: Run = made(factory=Run)
    scheduler: Scheduler = made(factory=Scheduler)
    runtime: Runtime = made(factory=Runtime)
    training: Training = made(factory=Training)
    environment: Environment = made(factory=Environment)
    model: Model = made(factory=Model)
    data: Data = made(factory=Data)
    rollout: Rollout = made(factory=Rollout)
    algorithm: Algorithm = made(factory=Algorithm)
    trainer: Trainer = made(factory=Trainer)
    evaluation: Evaluation = made(factory=Evaluation)
