"""Checks of a node that is to serve sandboxes or to train: Podman, its user namespaces, cgroups, limits.

How to use it
    for check in node("runtime"): ...

What it does not do
    It starts no container: `python -m runtime_server` does, and says what it could not enforce. It changes
    nothing. Standard library only, for it runs on compute nodes too.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from orchestrator.checks import Check, fail, ok, warn
from orchestrator.checks_files import SHARED, mount_of
from orchestrator.surroundings import user_name

NEEDED = {"runtime": ("fastapi", "uvicorn", "podman", "pydantic"), "training": ("torch", "transformers")}
_INSTALL = "pip install 'orchestrate-rl[{}]' for the interpreter of the jobs ({}.python)"
_EXTRA = {"runtime": "server", "training": "trainer"}


def node(role: str) -> Iterator[Check]:
    """Everything about this node that a job of this role needs. role: login, runtime, training."""
    yield ok("python", f"{platform.python_version()} at {sys.executable}")
    yield from _packages(role)
    yield from _scratch()
    yield from _limits()
    if role == "training":
        yield from _devices()
        return
    yield from podman()
    yield from user_namespaces()
    yield from cgroups()
    yield from _runtime_directory()


def _packages(role: str) -> Iterator[Check]:
    names = NEEDED.get(role, ())
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        text = f"not importable: {', '.join(missing)}"
        yield fail("packages", text, _INSTALL.format(_EXTRA[role], role))
    elif names:
        yield ok("packages", f"{', '.join(names)} are there")


def _scratch() -> Iterator[Check]:
    folder = Path(tempfile.gettempdir())
    kind, _ = mount_of(folder.resolve(), Path("/proc/self/mounts").read_text())
    free = shutil.disk_usage(folder).free / (1 << 30)
    text = f"{folder} is on {kind or '?'}, {free:,.1f} GiB free"
    if kind in SHARED:
        yield fail("scratch", text, "containers need a node-local disk: set runtime.state_dir to one")
    elif free < 5:
        yield warn("scratch", text, "images and containers need room: set runtime.state_dir to a larger disk")
    else:
        yield ok("scratch", text)


def _limits() -> Iterator[Check]:
    for name, number, wanted in (
        ("nofile", resource.RLIMIT_NOFILE, 8192),
        ("nproc", resource.RLIMIT_NPROC, 4096),
    ):
        hard = resource.getrlimit(number)[1]
        if hard == resource.RLIM_INFINITY or hard >= wanted:
            shown = "unlimited" if hard == resource.RLIM_INFINITY else f"{hard:,}"
            yield ok(name, f"hard limit {shown}")
        else:
            remedy = "ask the site to raise it, or lower runtime.max_parallel_sandboxes"
            yield warn(name, f"hard limit {hard:,} is low", remedy)


def _devices() -> Iterator[Check]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shutil.which("nvidia-smi") is None:
        yield warn("GPUs", "no nvidia-smi here", "fine for training on CPUs; else check the partition")
        return
    _, text = run(["nvidia-smi", "-L"])
    count = sum(line.startswith("GPU ") for line in text.splitlines())
    shown = f"{count} GPUs; CUDA_VISIBLE_DEVICES={visible if visible is not None else 'unset'}"
    yield (
        ok("GPUs", shown)
        if count
        else fail("GPUs", text[:200], "check the driver, and training.gpus_per_node")
    )


# --- podman ------------------------------------------------------------------------------------------


def podman() -> Iterator[Check]:
    """Podman, an OCI runtime, conmon: what makes containers."""
    if shutil.which("podman") is None:
        yield fail("podman", "not on the PATH", "load its module in runtime.setup_commands, or ask the site")
        return
    code, text = run(["podman", "--version"])
    version = text.split()[-1] if text else "?"
    if code:
        yield fail("podman", f"does not start: {text[:200]}", "podman info says more")
    elif version[0].isdigit() and int(version.split(".")[0]) < 4:
        yield warn("podman", f"version {version}", "version 4 or newer is what we test with")
    else:
        yield ok("podman", f"version {version}")
    runtimes = [name for name in ("crun", "runc", "youki") if shutil.which(name)]
    remedy = "install crun (or runc) on the nodes"
    yield ok("OCI runtime", ", ".join(runtimes)) if runtimes else fail("OCI runtime", "none found", remedy)
    places = ("/usr/bin/conmon", "/usr/libexec/podman/conmon", "/usr/local/libexec/podman/conmon")
    if not shutil.which("conmon") and not any(Path(p).exists() for p in places):
        yield warn("conmon", "not found in its usual places", "podman info names the path that it wants")


def run(command: list[str], timeout_s: float = 20.0) -> tuple[int, str]:
    """Exit code and output of a program; 124 when it did not answer."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return 124, f"{command[0]} gave no answer within {timeout_s:g} s"
    except OSError as error:
        return 127, str(error)
    return done.returncode, (done.stdout or done.stderr).strip()


def user_namespaces() -> Iterator[Check]:
    """Sub-ids, their helpers and the kernel's switches; an ordinary user needs all of them."""
    if os.getuid() == 0:
        yield ok("user namespaces", "not needed as root")
        return
    for path in ("/proc/sys/user/max_user_namespaces", "/proc/sys/kernel/unprivileged_userns_clone"):
        if _read(path) == "0":
            name = path.removeprefix("/proc/sys/").replace("/", ".")
            yield fail("user namespaces", f"{name} is 0", f"ask the site: sysctl {name}=…")
    code, text = run(["unshare", "--user", "--map-root-user", "true"])
    if code:
        yield fail(
            "user namespaces", text[:200] or "unshare fails", "ask the site to allow them on CPU nodes"
        )
    else:
        yield ok("user namespaces", "may be made")
    yield from _subordinate()


def _subordinate() -> Iterator[Check]:
    """Without a range Podman still works with a single id, but files of other users in images do not."""
    user = user_name()
    counts = {name: subids(_read(f"/etc/{name}"), user, os.getuid()) for name in ("subuid", "subgid")}
    helpers = [name for name in ("newuidmap", "newgidmap") if shutil.which(name) is None]
    few = [f"{name}: {count}" for name, count in counts.items() if count < 65536]
    remedy = f"ask the site for `usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user}`"
    yield (
        warn("sub-ids", f"fewer than 65536 for {user} ({', '.join(few)})", remedy)
        if few
        else ok("sub-ids", f"{counts['subuid']} for {user}")
    )
    if helpers:
        yield warn("newuidmap", f"missing: {', '.join(helpers)}", "install the package uidmap (shadow-utils)")
    else:
        yield ok("newuidmap", "is there")


def subids(text: str, user: str, uid: int) -> int:
    """How many subordinate ids a user has, by the text of /etc/subuid."""
    rows = (line.strip().split(":") for line in text.splitlines())
    mine = [row[2] for row in rows if len(row) == 3 and row[0] in (user, str(uid))]
    return sum(int(count) for count in mine if count.isdigit())


def cgroups() -> Iterator[Check]:
    """The version, and whether limits of sandboxes can be set: delegation, or root."""
    kind, _ = mount_of(Path("/sys/fs/cgroup"), Path("/proc/self/mounts").read_text())
    if kind != "cgroup2":
        yield warn("cgroups", "version 1: limits of sandboxes are not all enforced", "version 2 is better")
        return
    path = next((line[3:] for line in _read("/proc/self/cgroup").splitlines() if line.startswith("0::")), "")
    own = Path("/sys/fs/cgroup", path.lstrip("/"))
    controllers = _read(own / "cgroup.controllers")
    if os.access(own, os.W_OK) and os.access(own / "cgroup.procs", os.W_OK):
        yield ok("cgroups", f"version 2, delegated ({controllers or 'no controllers'})")
    else:
        remedy = "the site can delegate them; without, memory and pids of sandboxes have weaker limits"
        yield warn("cgroups", "version 2, not delegated to this user", remedy)


def _runtime_directory() -> Iterator[Check]:
    folder = os.environ.get("XDG_RUNTIME_DIR", "")
    if folder and os.access(folder, os.W_OK):
        yield ok("XDG_RUNTIME_DIR", folder)
    else:
        text = f"{folder} cannot be written" if folder else "unset"
        yield ok("XDG_RUNTIME_DIR", f"{text}: the server makes its own, node-local")


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return ""
