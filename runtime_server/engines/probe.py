"""What this node can do, found out by trying: cgroups, limits, isolation.

What it is
    Pure readers of /proc and /sys. `read_back` compares what a running probe container was promised
    with what the kernel holds for it, because Podman accepts limits that it then ignores (rootless on
    cgroup v1, controllers that are not delegated).

What it does not do
    It starts nothing; `podman.py` starts the probe container and hands its pid in.
"""

from __future__ import annotations

import base64
import contextlib
import os
import platform
import resource
from pathlib import Path

from runtime_server.engines import Recipe

CGROUPS = Path("/sys/fs/cgroup")
NOFILE = 65536
PIDS_MAX = 1 << 22  # the kernel's own
CAP_SYS_RESOURCE = 24


def cgroup_version(root: Path = CGROUPS) -> str:
    """ "v2", "hybrid" or "v1"."""
    if (root / "cgroup.controllers").exists():
        return "v2"
    return "hybrid" if (root / "unified" / "cgroup.controllers").exists() else "v1"


def ulimits(service_pid: int, processes: int = PIDS_MAX) -> dict[str, int]:
    """Hard limits that a container may have: a runtime refuses any above those of Podman's service.

    Podman lowers its own number of processes to the kernel's pid_max, so the server's limits mislead.
    """
    return {
        "nofile": _below(service_pid, resource.RLIMIT_NOFILE, NOFILE),
        "nproc": _below(service_pid, resource.RLIMIT_NPROC, min(processes, _pid_max())),
        "core": 0,
    }


def tasks_by_namespace() -> bool:
    """From Linux 5.14 on: before, the limit counts all processes of a user on the node."""
    major, minor = (int(part) for part in platform.release().split(".")[:2])
    return (major, minor) >= (5, 14)


def may_protect() -> bool:
    """Whether this process may lower an OOM score: CAP_SYS_RESOURCE, which containers of root often lack."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return os.getuid() == 0 and bool(int(line.split()[1], 16) >> CAP_SYS_RESOURCE & 1)
    return False


def _pid_max() -> int:
    try:
        return int(Path("/proc/sys/kernel/pid_max").read_text())
    except (OSError, ValueError):
        return 32768


def _below(pid: int, kind: int, wanted: int) -> int:
    hard = resource.prlimit(pid, kind)[1]
    return wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)


def cgroup_directory(pid: int, controller: str) -> Path | None:
    """The cgroup of a process for one controller, as this host sees it; None when there is none."""
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, names, path = line.split(":", 2)
        if controller in names.split(",") and path != "/":
            found = CGROUPS / controller / path.lstrip("/")
        elif not names and path != "/" and cgroup_version() == "v2":
            found = CGROUPS / path.lstrip("/")
        else:
            continue
        return found if found.is_dir() else None
    return None


def own_cgroup(pid: int, controller: str) -> Path | None:
    """Its cgroup, unless that is ours too: a job's limit, and a job's count of kills, are not a sandbox's."""
    found = cgroup_directory(pid, controller)
    return None if found == cgroup_directory(os.getpid(), controller) else found


def compiled_seccomp(container: Path) -> str:
    """crun leaves the compiled default filter behind and takes it back: 18 ms of CPU for each sandbox.

    The same profile, the same capabilities, the same machine: it is byte for byte what it would make.
    """
    with contextlib.suppress(OSError):
        return base64.b64encode((container / "seccomp.bpf").read_bytes()).decode()
    return ""


def _number(folder: Path | None, *names: str) -> float:
    """The first number in the first of these files that exists; infinity for "max" or nothing."""
    for name in names:
        with contextlib.suppress(OSError, ValueError, IndexError):
            if folder is not None:
                return float((folder / name).read_text().split()[0])
    return float("inf")


def _cpus(folder: Path | None) -> float:
    if folder is None:
        return float("inf")
    with contextlib.suppress(OSError, ValueError):
        quota, period = (folder / "cpu.max").read_text().split()
        return float(quota) / float(period)
    quota_us = _number(folder, "cpu.cfs_quota_us")
    return quota_us / _number(folder, "cpu.cfs_period_us") if 0 < quota_us < float("inf") else float("inf")


def _same_namespace(pid: int, name: str) -> bool:
    try:
        return Path(f"/proc/{pid}/ns/{name}").readlink() == Path(f"/proc/self/ns/{name}").readlink()
    except OSError:
        return True


def _filtered(pid: int) -> bool:
    """Whether the agent's own filter of system calls, or the engine's, holds for it."""
    with contextlib.suppress(OSError):
        return "Seccomp:\t2" in Path(f"/proc/{pid}/status").read_text()
    return False


def _shm_bytes(pid: int) -> int:
    """Size of the container's /dev/shm, or 0."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines():
            if line.split()[4] == "/dev/shm":  # noqa: S108 - a mount point to look for
                return int(line.rpartition("size=")[2].split("k")[0].split(",")[0]) * 1024
    return 0


def read_back(pid: int, recipe: Recipe) -> dict[str, bool]:
    """Which promises hold for the running container with this first process."""
    memory = own_cgroup(pid, "memory")
    return {
        "cpus": _cpus(own_cgroup(pid, "cpu")) <= recipe.cpus * 1.01,
        "memory": _number(memory, "memory.max", "memory.limit_in_bytes") <= recipe.memory_mb << 20,
        "pids": _number(own_cgroup(pid, "pids"), "pids.max") <= recipe.pids,
        "shm": 0 < _shm_bytes(pid) <= recipe.shm_mb << 20,
        "network_isolation": not _same_namespace(pid, "net"),
        "user_namespace": not _same_namespace(pid, "user"),
        "syscall_filter": _filtered(pid),
        "disk": False,
    }
