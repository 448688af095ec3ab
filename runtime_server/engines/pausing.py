"""Stops every process of a sandbox but its agent, and lets them go on: what any engine can do from outside.

What it is
    Where the container has a cgroup that we may write, its processes move into one below it, which is frozen:
    they notice nothing. Elsewhere they get SIGSTOP, again until nobody is left who could have started
    another. The agent goes on, so that it can answer, read files, and end the sandbox.

What it does not do
    Clocks do not stop: a command's time limit and the sandbox's time to live count on.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from runtime_server.engines import Container, processes
from runtime_server.engines.probe import own_cgroup
from runtime_server.engines.watch import Table

NAME = "paused"
ROUNDS, FREEZE_S = 200, 5.0


def pause(container: Container) -> None:
    """Blocking; returns when they stand still (OSError when they do not)."""
    folder = _freezer(container.pid)
    try:
        if folder is not None:
            return _freeze(container.pid, folder)
    except OSError:  # a cgroup that is not ours to write
        thaw(folder)
    _signal(container.pid, signal.SIGSTOP)


def resume(container: Container) -> None:
    thaw(_freezer(container.pid))
    _signal(container.pid, signal.SIGCONT)


def thaw_of(pid: int) -> None:
    """Before its first process is ended."""
    thaw(_freezer(pid))


def thaw(freezer: Path | None) -> None:
    """Those of v1 cannot even be killed before."""
    if freezer is None:
        return
    below = freezer / NAME
    for name, value in (("freezer.state", "THAWED"), ("cgroup.freeze", "0")):
        with contextlib.suppress(OSError):
            if (below / name).exists():
                (below / name).write_text(value)


def thaw_all(cgroup: str) -> None:
    """Whatever is paused in the cgroups of that name, so that it can be ended."""
    for top in processes.cgroups_of(cgroup):
        for folder in top.glob(f"*/{NAME}"):
            thaw(folder.parent)


def _freezer(pid: int) -> Path | None:
    """The container's cgroup that can freeze, never one that it shares with us."""
    found = own_cgroup(pid, "freezer")
    return found if found is not None and found.name != NAME else None


def _freeze(agent: int, folder: Path) -> None:
    below = folder / NAME
    below.mkdir(exist_ok=True)
    v1 = (below / "freezer.state").exists()
    deadline = time.monotonic() + FREEZE_S
    _again(lambda: _others(folder, agent), lambda pid: (below / "cgroup.procs").write_text(str(pid)))
    file, value = ("freezer.state", "FROZEN") if v1 else ("cgroup.freeze", "1")
    (below / file).write_text(value)
    while time.monotonic() < deadline:
        if (v1 and (below / file).read_text().strip() == value) or (
            not v1 and "frozen 1" in (below / "cgroup.events").read_text()
        ):
            return
        time.sleep(0.001)
    raise OSError("the processes do not stand still")


def _others(folder: Path, agent: int) -> list[int]:
    return [pid for pid in map(int, (folder / "cgroup.procs").read_text().split()) if pid not in (agent, 0)]


def _signal(agent: int, number: int) -> None:
    seen: set[int] = set()
    _again(lambda: [pid for pid in below(agent) if pid not in seen], lambda pid: _send(pid, number, seen))


def _send(pid: int, number: int, seen: set[int]) -> None:
    processes.send(pid, number)
    seen.add(pid)


def below(agent: int) -> list[int]:
    """Every process of the sandbox but the agent: all descend from it, orphans too."""
    return Table.read(processes.all_pids()).below(agent)


def _again(find: Callable[[], Iterable[int]], act: Callable[[int], object]) -> None:
    """Until nothing is found any more: whoever was found late may have started another before."""
    for _ in range(ROUNDS):
        found = [*find()]
        if not found:
            return
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                act(pid)
