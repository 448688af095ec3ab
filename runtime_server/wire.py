"""Everything said over HTTP between the sandbox server and its clients: models and error codes.

What it is
    Request and response bodies of the API under `/v1`, as pydantic models. The server and the client
    both speak through these and through nothing else; `docs/reference/http.md` lists the routes.

What it does not do
    No network, no sandboxes; it imports nothing of the rest of the package.
"""

from __future__ import annotations

import base64
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

API_KEY_HEADER = "X-API-Key"
"""Every route but a bare `GET /health` needs it (or `Authorization: Bearer KEY`)."""
IDEMPOTENCY_HEADER = "Idempotency-Key"
"""A mutating call repeated with the same key gets the first answer instead of a second effect."""

SandboxId = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{3,40}$")]
SnapshotId = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{3,80}$")]


class Code(StrEnum):
    """Stable codes of failure. `infrastructure` tells which ones the policy cannot have caused."""

    # the caller's mistake
    UNAUTHORIZED = "unauthorized"
    BAD_REQUEST = "bad_request"
    NOT_FOUND = "not_found"
    SANDBOX_NOT_FOUND = "sandbox_not_found"
    FILE_NOT_FOUND = "file_not_found"
    FILE_ERROR = "file_error"
    SNAPSHOT_NOT_FOUND = "snapshot_not_found"
    TOO_LARGE = "too_large"
    IMAGE_MISSING = "image_missing"
    # what happened to a sandbox
    TIMEOUT = "timeout"
    OOM = "oom"
    SANDBOX_DIED = "sandbox_died"
    DISK_FULL = "disk_full"
    EXPIRED = "expired"
    EVICTED = "evicted"
    PAUSED = "paused"
    NOT_READY = "not_ready"
    INTERRUPTED = "interrupted"
    # the service
    QUEUE_TIMEOUT = "queue_timeout"
    SERVER_DRAINING = "server_draining"
    CREATE_FAILED = "create_failed"
    UNREACHABLE = "unreachable"
    INTERNAL = "internal"

    @property
    def infrastructure(self) -> bool:
        """True when the policy in the sandbox cannot have caused it: such an episode is masked.

        A command's timeout, memory or disk exhaustion, or a sandbox that its own processes killed, is the
        policy's doing and is scored.
        """
        return self in {
            Code.QUEUE_TIMEOUT,
            Code.SERVER_DRAINING,
            Code.CREATE_FAILED,
            Code.UNREACHABLE,
            Code.INTERNAL,
            Code.EXPIRED,
            Code.EVICTED,
            Code.PAUSED,
            Code.NOT_READY,
            Code.INTERRUPTED,
            Code.IMAGE_MISSING,
            Code.SNAPSHOT_NOT_FOUND,
        }


class Message(BaseModel):
    """Base of every body. Requests refuse unknown fields; responses may grow."""

    model_config = ConfigDict(extra="ignore")


class Request(Message):
    model_config = ConfigDict(extra="forbid")


class Failure(Message):
    """Body of every answer that is no success: `{"error": {...}}`."""

    code: str
    message: str
    detail: dict[str, Any] = Field(default_factory=dict)


class Failed(Message):
    error: Failure


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
    env: dict[str, str] = Field(default_factory=dict)
    workdir: Annotated[str, Field(pattern=r"^/[^\x00]*$", max_length=4000)] | None = None
    """Made when it is missing; default: the image's own."""
    limits: Limits = Field(default_factory=Limits)
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


class Exec(Request):
    """`POST /v1/sandboxes/{id}/exec`. A string runs under `/bin/sh -c`, a list runs as it is."""

    command: str | list[str]
    cwd: str | None = None
    env: dict[str, str] = Field(default_factory=dict)
    stdin: str | None = None
    stdin_encoding: Literal["utf-8", "base64"] = "utf-8"
    timeout_s: Annotated[float, Field(gt=0, le=86400)] | None = None
    max_output: Annotated[int, Field(ge=0, le=1 << 28)] | None = None  # bytes kept per stream


class Stream(Message):
    """One output stream: text where it is valid UTF-8, else base64; head and tail when it was too long."""

    data: str = ""
    encoding: Literal["utf-8", "base64"] = "utf-8"
    total: int = 0  # bytes the command wrote
    dropped: int = 0  # bytes left out between head and tail
    head: int = 0  # bytes of `data` before the gap; meaningful when dropped > 0

    @property
    def raw(self) -> bytes:
        """The bytes kept, exactly as they were written (the gap closed up)."""
        return self.data.encode() if self.encoding == "utf-8" else base64.b64decode(self.data)

    @property
    def text(self) -> str:
        """For reading: undecodable bytes replaced, the gap marked."""
        raw = self.raw
        if not self.dropped:
            return raw.decode(errors="replace")
        mark = f"\n[... {self.dropped} bytes left out ...]\n"
        return raw[: self.head].decode(errors="replace") + mark + raw[self.head :].decode(errors="replace")

    @classmethod
    def of(cls, kept: bytes, total: int | None = None, head: int | None = None) -> Self:
        size = len(kept) if total is None else total
        numbers = {"total": size, "dropped": size - len(kept), "head": len(kept) if head is None else head}
        try:
            return cls(data=kept.decode(), encoding="utf-8", **numbers)
        except UnicodeDecodeError:
            return cls(data=base64.b64encode(kept).decode(), encoding="base64", **numbers)


class ExecResult(Message):
    """What a command did. A timeout is a result, not an error: the partial output is kept."""

    exit_code: int  # 128 + signal when a signal ended it; 124 on timeout
    signal: int = 0
    stdout: Stream = Field(default_factory=Stream)
    stderr: Stream = Field(default_factory=Stream)
    timed_out: bool = False
    oom: bool = False
    duration_ms: float = 0.0

    @property
    def ok(self) -> bool:
        return self.exit_code == 0


class FileInfo(Message):
    """Answer to a file write."""

    path: str
    size: int
    mode: int = 0o644


class Renew(Request):
    """`POST /v1/sandboxes/{id}/renew`: push the expiry to `ttl_s` from now."""

    ttl_s: Annotated[float, Field(gt=0)]
