"""The monitors of containers: one conmon each, by which Podman learns what became of a container.

What it is
    Where Podman keeps the pids, whether a process is still that of its container, and what to do in place
    of a monitor that was killed.

What it does not do
    It starts none, and does not know which are wanted.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
from pathlib import Path

from runtime_server.engines import processes
from runtime_server.engines.state import State

_IDENTITY = re.compile(rb"[0-9a-f]{64}")


def folder(state: State, identity: str) -> Path:
    return state.runroot / "overlay-containers" / identity / "userdata"


def first_process(state: State, identity: str) -> int:
    """By the file that the monitor wrote; 0 when there is none."""
    return _number(folder(state, identity) / "pidfile")


def pid_of(state: State, identity: str) -> int:
    """The pid of its monitor, 0 when that has ended."""
    pid = _number(folder(state, identity) / "conmon.pid")
    return pid if pid and identity.encode() in processes.command_line(pid) else 0


def is_of(state: State, identity: str, pid: int) -> bool:
    """Whether the pid is still that of this container, and not another process's by now: by its monitor, and
    where that was killed by its cgroup."""
    parent = processes.stat_fields(pid)
    if not parent:
        return False
    return int(parent[1]) == pid_of(state, identity) != 0 or identity in processes.cgroup_text(pid)


def tell_end(state: State, identity: str) -> None:
    """In place of a monitor that was killed: without this file Podman waits for the end of the container, and
    never has the runtime forget it."""
    if folder(state, identity).is_dir():
        with contextlib.suppress(OSError), (state.tmp / "exits" / identity).open("x") as file:
            file.write(str(128 + signal.SIGKILL))


def forget_end(state: State, identity: str) -> None:
    """Of a container that Podman does not know any more: a monitor may have written later than it looked."""
    (state.tmp / "exits" / identity).unlink(missing_ok=True)


def running(state: State) -> dict[int, str]:
    """The pid of every monitor, and the identity of its container."""
    found = {pid: _IDENTITY.search(processes.command_line(pid)) for pid in _pids(state)}
    return {pid: match[0].decode() for pid, match in found.items() if match}


def end(state: State, monitors: dict[int, str]) -> None:
    """These, their containers, and what the runtime and the monitor kept of those."""

    def left() -> list[int]:
        found = [pid for pid, identity in running(state).items() if monitors.get(pid) == identity]
        return [*processes.children(found), *found]

    processes.end_all(left)
    storage = [top / "overlay-containers" for top in (state.runroot, state.graphroot)]
    for identity in monitors.values():
        for top in (state.oci, *storage):
            shutil.rmtree(top / identity, ignore_errors=True)
        forget_end(state, identity)


def end_others(state: State, keep: set[str]) -> None:
    """Monitors of containers that are not among these, with the first processes; and what they wrote."""
    known = [identity.encode() for identity in keep]

    def others() -> list[int]:
        found = [pid for pid in _pids(state) if not any(one in processes.command_line(pid) for one in known)]
        return [*processes.children(found), *found]

    processes.end_all(others)
    for file in (state.tmp / "exits").glob("*"):
        if file.name not in keep:
            file.unlink(missing_ok=True)


def _pids(state: State) -> set[int]:
    """Of all monitors."""
    return set(processes.naming(state.token)) - set(processes.services(state.token))


def _number(file: Path) -> int:
    with contextlib.suppress(OSError, ValueError):
        return int(file.read_text())
    return 0
