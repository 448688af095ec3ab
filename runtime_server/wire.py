"""Everything said over HTTP between the sandbox server and its clients: models and error codes.

What it is
    Request and response bodies of the API under `/v1`, as pydantic models. The server and the client
    both speak through these and through nothing else; `docs/reference/http.md` lists the routes.

What it does not do
    No network, no sandboxes; it imports nothing of the rest of the package.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from runtime_server.wire_base import (
    API_KEY_HEADER,
    IDEMPOTENCY_HEADER,
    KEY_MAX,
    RUN_LABEL,
    Code,
    Environment,
    Failed,
    Failure,
    Message,
    Request,
)
from runtime_server.wire_commands import Exec, ExecResult, FileInfo, Stream
from runtime_server.wire_running import (
    Encoding,
    Input,
    Interrupt,
    Interrupted,
    Offset,
    OpenSession,
    OutputAlive,
    OutputBytes,
    OutputChunk,
    OutputEnd,
    OutputError,
    OutputEvent,
    OutputStarted,
    Process,
    ProcessList,
    Rest,
    Run,
    Seconds,
    Session,
    SessionList,
    SessionName,
    SessionResult,
    Signal,
    SignalName,
    StartProcess,
    StreamName,
    Terminal,
    Unpacked,
)

__all__ = [  # what comes from the files beside this one; the rest is below
    "API_KEY_HEADER",
    "IDEMPOTENCY_HEADER",
    "KEY_MAX",
    "RUN_LABEL",
    "Code",
    "Encoding",
    "Exec",
    "ExecResult",
    "Failed",
    "Failure",
    "FileInfo",
    "Input",
    "Interrupt",
    "Interrupted",
    "Message",
    "Offset",
    "OpenSession",
    "OutputAlive",
    "OutputBytes",
    "OutputChunk",
    "OutputEnd",
    "OutputError",
    "OutputEvent",
    "OutputStarted",
    "Process",
    "ProcessList",
    "Request",
    "Rest",
    "Run",
    "Seconds",
    "Session",
    "SessionList",
    "SessionName",
    "SessionResult",
    "Signal",
    "SignalName",
    "StartProcess",
    "Stream",
    "StreamName",
    "Terminal",
    "Unpacked",
]

SandboxId = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{3,40}$")]
SnapshotId = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{3,80}$")]


class Health(Message):
    """`GET /health`. Without the key only `status` is said; with it, who answers."""

    status: Literal["ok", "draining"]
    version: str = ""
    run_id: str = ""
    attempt: int = 0
    nonce: str = ""
    sandboxes: int = 0
    uptime_s: float = 0.0


class Limits(Request):
    """Resources of one sandbox; what is left out takes the server's default."""

    cpus: Annotated[float, Field(gt=0)] | None = None
    memory_mb: Annotated[int, Field(ge=16)] | None = None
    pids: Annotated[int, Field(ge=8)] | None = None
    disk_mb: Annotated[int, Field(ge=16)] | None = None


class Network(Request):
    """What a sandbox may reach: nothing, or some hosts through the server's proxy (HTTP and CONNECT)."""

    mode: Literal["none", "allowlist"] = "none"
    allow: Annotated[list[Annotated[str, Field(max_length=260)]], Field(max_length=200)] = Field(
        default_factory=list
    )
    """`pypi.org`, `*.pythonhosted.org`, `example.org:8080`; without a port 80 and 443."""


class Capabilities(Message):
    """`GET /v1/capabilities`: what this node really enforces, and how much there is."""

    version: str
    engine: str
    oci_runtime: str
    storage_driver: str
    cgroup_version: str  # "v1", "v2", "hybrid"
    rootless: bool
    enforced: dict[str, bool]  # cpus, memory, pids, shm, network_isolation, user_namespace, disk
    max_sandboxes: int
    default_image: str
    images: list[str] = Field(default_factory=list)
    limits: dict[str, float] = Field(default_factory=dict)  # defaults for one sandbox
    features: list[str] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)  # what is worse here than it could be, and who can help


class CreateSandbox(Request):
    """`POST /v1/sandboxes`. Waits in the queue when the server is full."""

    image: str | None = None
    env: Environment = Field(default_factory=dict)
    workdir: Annotated[str, Field(pattern=r"^/[^\x00]*$", max_length=4000)] | None = None
    """Made when it is missing; default: the image's own."""
    limits: Limits = Field(default_factory=Limits)
    network: Network = Field(default_factory=Network)
    ttl_s: Annotated[float, Field(gt=0)] | None = None
    max_lifetime_s: Annotated[float, Field(gt=0)] | None = None
    """It ends then, however busy it is; default: never."""
    labels: dict[str, str] = Field(default_factory=dict)
    snapshot: SnapshotId | None = None
    """Begin with the files of a snapshot, instead of an image's."""
    setup: Annotated[list[str], Field(max_length=100)] = Field(default_factory=list)
    """Commands that must succeed before the sandbox is handed over."""
    queue_timeout_s: Annotated[float, Field(ge=0)] | None = None
    wait_s: Annotated[float, Field(ge=0)] | None = None
    """How long the answer may wait; after that it is 202, and `GET` tells when the sandbox runs. Default:
    until it runs."""
    group: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    group_size: Annotated[int, Field(ge=1)] | None = None
    """Creates of one group get their places together, once so many have come."""
    session_key: bool = False
    """Answer with a key of this sandbox alone, for clients that must not have the server's: SWE-ReX."""


class Queue(Message):
    """Where a create stands that waits for a place."""

    position: int  # 1 is the next one
    eta_s: float | None = None  # by how long sandboxes were held lately; None while nothing is known


class Sandbox(Message):
    """A sandbox as the server sees it."""

    id: str
    image: str
    state: Literal["queued", "starting", "running", "paused", "dead"]
    workdir: str
    labels: dict[str, str] = Field(default_factory=dict)
    created_at: float
    expires_at: float
    reason: str = ""  # a Code, when dead
    message: str = ""  # what it died of, when it never ran
    queue: Queue | None = None  # while it waits for a place
    snapshot: str = ""  # what it began with, when that was no image
    ends_at: float | None = None  # by its max_lifetime_s
    session_key: str = ""  # only in the answer to the create that asked for it
    swerex_url: str = ""  # where a SWE-ReX client with that key finds this sandbox


class SandboxList(Message):
    sandboxes: list[Sandbox]
    queued: int = 0


class Renew(Request):
    """`POST /v1/sandboxes/{id}/renew`: push the expiry to `ttl_s` from now."""

    ttl_s: Annotated[float, Field(gt=0)]
