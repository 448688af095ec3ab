"""What every part of the wire is made of: headers, error codes, the bases of all bodies.

What it does not do
    It is imported through `runtime_server.wire`, and holds no route's bodies.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

API_KEY_HEADER = "X-API-Key"
"""Every route but a bare `GET /health` needs it (or `Authorization: Bearer KEY`)."""
IDEMPOTENCY_HEADER = "Idempotency-Key"
"""A mutating call repeated with the same key gets the first answer instead of a second effect."""
RUN_LABEL = "run"
"""The label of a sandbox that says for which run it is; a server that serves several counts by it."""
KEY_MAX = 200  # characters of such a key


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
    PROCESS_NOT_FOUND = "process_not_found"
    SESSION_NOT_FOUND = "session_not_found"
    SESSION_EXISTS = "session_exists"
    SESSION_BUSY = "session_busy"
    SESSION_ENDED = "session_ended"
    INPUT_CLOSED = "input_closed"
    TOO_MANY = "too_many"
    ARCHIVE_REFUSED = "archive_refused"
    STREAMED = "streamed"
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
    QUOTA = "quota"
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
            Code.QUOTA,
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
    """The bound of a text has it looked at: half of a surrogate pair is no text that could be answered."""

    model_config = ConfigDict(extra="forbid", str_max_length=1 << 28, allow_inf_nan=False)


Environment = dict[
    Annotated[str, Field(pattern=r"^[^=\x00]+$")], Annotated[str, Field(pattern=r"^[^\x00]*$")]
]
"""Names and values as a process can have them."""


class Failure(Message):
    """Body of every answer that is no success: `{"error": {...}}`."""

    code: str
    message: str
    detail: dict[str, Any] = Field(default_factory=dict)


class Failed(Message):
    error: Failure
