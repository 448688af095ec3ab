"""Processes of this node that belong to one server: find them, end them, wait until they are gone.

What it is
    Small operations on /proc and pidfds. A process belongs to a server when its command line holds the
    server's random token (the API service, each conmon) or when it sits in the server's cgroup.

What it does not do
    It never ends a process by its program's name.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")
HELPERS = {b"podman", b"conmon", b"crun", b"runc", b"fuse-overlayfs"}


def stat_fields(pid: int) -> list[str]:
    """Fields of /proc/PID/stat after the name: state, ppid, …; [] when there is no such process."""
    try:
        text = (PROC / str(pid) / "stat").read_text()
    except OSError:
        return []
    return text.rpartition(")")[2].split()


def started(pid: int) -> int:
    """When the process started, in clock ticks since boot; 0 when there is none (a zombie is none)."""
    fields = stat_fields(pid)
    return int(fields[19]) if fields and fields[0] not in "ZX" else 0


def boot_id() -> str:
    return (PROC / "sys/kernel/random/boot_id").read_text().strip()


def command_line(pid: int) -> bytes:
    try:
        return (PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return b""


def cgroup_text(pid: int) -> str:
    """The cgroups that it is in, as the kernel tells them; "" when there is no such process."""
    try:
        return (PROC / str(pid) / "cgroup").read_text()
    except OSError:
        return ""


def all_pids() -> Iterable[int]:
    return (int(entry.name) for entry in PROC.iterdir() if entry.name.isdigit())


def naming(token: str) -> list[int]:
    """Podman's own processes (service, conmon, runtime) with `token` in their command line.

    Only those: somebody may be reading a log file of that name.
    """
    return [pid for pid in all_pids() if _is_ours(command_line(pid), token.encode())]


def services(token: str) -> list[int]:
    """Of those, all that do not belong to one container: no conmon."""
    return [pid for pid in naming(token) if b"conmon" not in command_line(pid).split(b"\0", 1)[0]]


def children(parents: Iterable[int]) -> list[int]:
    """Processes whose parent is one of these: of a conmon, the first process of its container."""
    wanted = set(parents)
    return [pid for pid in all_pids() if (found := stat_fields(pid)) and int(found[1]) in wanted]


def of_server(token: str, cgroup: str) -> list[int]:
    """Every process of one server, but the server: containers first, for nobody knows them without conmon."""
    helpers = naming(token)
    return [*children(helpers), *inside(cgroup), *helpers]


def _is_ours(line: bytes, token: bytes) -> bool:
    return token in line and line.split(b"\0", 1)[0].rpartition(b"/")[2] in HELPERS


def cgroups_of(name: str) -> list[Path]:
    """The cgroup directories of that name: one on v2, one per controller on v1."""
    if not name:
        return []
    roots = [CGROUPS, *(p for p in CGROUPS.iterdir() if p.is_dir())] if CGROUPS.is_dir() else []
    return [root / name for root in roots if (root / name).is_dir()]


def inside(name: str) -> set[int]:
    """Processes in the cgroup of that name and below."""
    found: set[int] = set()
    for top in cgroups_of(name):
        for folder, _, _ in os.walk(top):  # which does not mind that cgroups go away meanwhile
            with contextlib.suppress(OSError):
                found.update(int(line) for line in Path(folder, "cgroup.procs").read_text().split())
    return found


def remove_cgroups(name: str) -> None:
    """Remove the emptied cgroup trees of that name; the kernel refuses those that are in use."""
    for top in cgroups_of(name):
        for folder in [*sorted((p for p in top.rglob("*") if p.is_dir()), reverse=True), top]:
            with contextlib.suppress(OSError):
                folder.rmdir()


def remove_old_cgroups(name: str, pattern: str, age_s: float) -> None:
    """Those right below the cgroups of that name that have held no process since they were made, so long ago.

    A runtime that was told to make a container, and whose caller was killed, makes its cgroups all the same,
    after everybody has looked. Young ones may be a container that is just being made.
    """
    for top in cgroups_of(name):
        for path in top.glob(pattern):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > age_s and not inside(f"{name}/{path.name}"):
                    remove_cgroups(f"{name}/{path.name}")


def send(pid: int, number: int = signal.SIGKILL) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def end_all(find: Callable[[], Iterable[int]], timeout_s: float = 10.0) -> bool:
    """Kill what `find` finds until it finds nothing. False when something outlives `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while pids := [pid for pid in find() if started(pid)]:
        for pid in pids:
            send(pid)
        if time.monotonic() > deadline:
            return False
        gone(pids[0], 0.05)
    return True


def gone(pid: int, timeout_s: float) -> bool:
    """Wait (blocking) until the process has ended."""
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:
        return _gone_by_polling(pid, timeout_s)
    try:
        poller = select.poll()
        poller.register(descriptor, select.POLLIN)
        return bool(poller.poll(timeout_s * 1000))
    finally:
        os.close(descriptor)


def _gone_by_polling(pid: int, timeout_s: float) -> bool:
    """For kernels before 5.3, which have no pidfd."""
    deadline = time.monotonic() + timeout_s
    while started(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


async def wait_gone(pid: int, timeout_s: float) -> bool:
    """Wait until the process has ended, without a thread where the kernel has pidfds."""
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:
        return not started(pid) or await asyncio.to_thread(_gone_by_polling, pid, timeout_s)
    loop = asyncio.get_running_loop()
    ended = loop.create_future()
    loop.add_reader(descriptor, lambda: None if ended.done() else ended.set_result(None))
    try:
        async with asyncio.timeout(timeout_s):
            await ended
        return True
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
