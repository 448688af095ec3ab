"""What is said over HTTP about snapshots, forks, warm containers and room: models.

What it does not do
    Nothing but models; the rest of the vocabulary is `wire.py`'s.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from runtime_server.wire import Message, Request, Sandbox
from runtime_server.wire_base import Environment

FORK_MAX = 1024


class TakeSnapshot(Request):
    """`POST /v1/sandboxes/{id}/snapshot`."""

    ttl_s: Annotated[float, Field(gt=0)] | None = None
    """It goes when nobody used it for so long; default: that of a sandbox."""
    labels: dict[str, str] = Field(default_factory=dict)


class Snapshot(Message):
    """The files of a sandbox as they were. Processes are not in it."""

    id: str
    image: str
    parent: str = ""  # the snapshot that its sandbox began with
    bytes: int = 0  # on disk, beyond what it began with
    sandboxes: int = 0  # that stand on it now
    labels: dict[str, str] = Field(default_factory=dict)
    created_at: float
    expires_at: float


class SnapshotList(Message):
    snapshots: list[Snapshot]


class Fork(Request):
    """`POST /v1/sandboxes/{id}/fork`: so many sandboxes that begin with the files of this one."""

    count: Annotated[int, Field(ge=1, le=FORK_MAX)] = 1
    ttl_s: Annotated[float, Field(gt=0)] | None = None
    max_lifetime_s: Annotated[float, Field(gt=0)] | None = None
    labels: dict[str, str] | None = None
    """Default: those of the source."""
    env: Environment = Field(default_factory=dict)
    queue_timeout_s: Annotated[float, Field(ge=0)] | None = None


class Forked(Message):
    snapshot: str
    sandboxes: list[Sandbox]


class Prefetch(Request):
    """`POST /v1/prefetch`: what is wanted next. It takes the place of what was wanted before."""

    images: Annotated[dict[str, Annotated[int, Field(ge=0)]], Field(max_length=10_000)]
    """How many sandboxes of each image will be asked for; 0 only fetches it. "" is the default image."""


class Prefetched(Message):
    images: dict[str, str]  # "here", "fetching", or why it cannot be had
    warm: int  # containers that wait ready now
    wanted: int  # how many are to wait: at most as many as there are free places


class Capacity(Message):
    """`GET /v1/capacity`."""

    places: int
    in_use: int
    free: int
    queued: int
    warm: dict[str, int] = Field(default_factory=dict)  # of those ready, how many each image can have
    warm_total: int = 0
    snapshots: int = 0
    images: list[str] = Field(default_factory=list)
    cpus: int
    memory_mb: int
    memory_free_mb: int
    load: float  # of the last minute
    draining: bool = False
