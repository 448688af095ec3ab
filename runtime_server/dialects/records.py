"""The record of a runtime as the control API shows it: one object that every dialect's client can read.

What it is
    `record` is pure: what a runtime is, in; the JSON object, out. The words for "ready" differ: V0 and V1
    wait for `ready`, SkyRL for `running`, and each takes the other's word for something else.

What it does not do
    It never holds null where a client expects text or a number: the key is left out instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from runtime_server.dialects.start import Dialect
from runtime_server.wire import Code


class Phase(StrEnum):
    PENDING = "pending"
    READY = "ready"
    PAUSED = "paused"
    FAILED = "failed"
    OOM = "oom"
    STOPPED = "stopped"

    @property
    def lives(self) -> bool:
        return self in (Phase.PENDING, Phase.READY, Phase.PAUSED)


INFRA = {
    Code.OOM: "oom",
    Code.SANDBOX_DIED: "died",
    Code.EXPIRED: "evicted",
    Code.TIMEOUT: "timeout",
}
"""What the dialects call why a sandbox ended; everything else is `server`."""


def infra(code: Code | str) -> str:
    text = str(code)
    return (
        "disk" if text == "disk_full" else "evicted" if text == "evicted" else INFRA.get(Code(text), "server")
    )


@dataclass(frozen=True)
class View:
    """What a record is made from."""

    id: str
    session_id: str
    dialect: Dialect
    phase: Phase
    image: str
    url: str
    key: str = ""
    queue: tuple[int, float] = (0, 0.0)
    """Its place in the line and for about how many seconds."""
    reason: str = ""
    """Why it failed or ended: one word of `INFRA`'s, or empty."""
    problem: str = ""
    """The same for a person."""


def pod_status(dialect: Dialect, phase: Phase) -> str:
    if phase == Phase.READY:
        return "running" if dialect == Dialect.SKYRL else "ready"
    if phase == Phase.OOM:
        return "crashloopbackoff"
    return "failed" if phase == Phase.STOPPED else phase.value


def status(dialect: Dialect, phase: Phase) -> str:
    """A pending runtime counts as running, so that a client that comes back attaches to it."""
    if phase == Phase.PAUSED:
        return "paused"
    if dialect == Dialect.APP:
        return {Phase.PENDING: "starting", Phase.READY: "running", Phase.STOPPED: "stopped"}.get(
            phase, "error"
        )
    return "running" if phase.lives else "stopped"


def record(view: View) -> dict[str, Any]:
    made: dict[str, Any] = {
        "runtime_id": view.id,
        "id": view.id,
        "session_id": view.session_id,
        "url": view.url,
        "work_hosts": {},
        "status": status(view.dialect, view.phase),
        "pod_status": pod_status(view.dialect, view.phase),
        "restart_count": 0,
        "restart_reasons": [],
        "container_statuses": [],
        "events": [],
        "pod_logs": view.problem,
        "image": view.image,
        "queue": {"position": view.queue[0], "eta_s": view.queue[1]},
        "last_termination_reason": view.reason,
        "last_termination_exit_code": 137 if view.reason else 0,
    }
    return made | ({"session_api_key": view.key} if view.key else {})
