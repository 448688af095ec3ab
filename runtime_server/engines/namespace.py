"""How this user gets root's view of mounts and ids on this node, found out by trying.

What it is
    `entry()`            what to put before a command: for root a mount namespace of its own; for an
                         ordinary user a user namespace too (`userns.py`, or `podman unshare` where only
                         Podman may make one). The command ends with the thread that started it.
    `storage_driver(d)`  which of overlay, fuse-overlayfs and vfs really works for container storage in `d`
    `remove_tree(d)`     removes what containers left, whoever of the mapped ids owns it

What it does not do
    It starts no container and keeps no process.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from runtime_server.engines import EngineError, ownership, processes, userns
from runtime_server.engines.probe import cgroup_version

TRY_S = 30.0
REMOVE_S = 300.0
FULL_RANGE = 65536
FUSE = Path("/dev/fuse")
HELPER = (sys.executable, "-I", "-S", userns.__file__)

_HIDE_UNIFIED = 'umount /sys/fs/cgroup/unified 2>/dev/null; exec "$@"'


@dataclass(frozen=True)
class Entry:
    """What to put before a command. `ids`: how many user ids exist inside; 0 means all of them (root)."""

    prefix: tuple[str, ...]
    ids: int = 0
    notes: tuple[str, ...] = ()

    @property
    def single(self) -> bool:
        return self.ids == 1

    @property
    def scarce(self) -> bool:
        """Whether files of images may have owners that do not exist here."""
        return 0 < self.ids < FULL_RANGE


@cache
def entry() -> Entry:
    """The first way that works. Raises EngineError with what the administrator has to do."""
    return _for_root() if os.getuid() == 0 else _for_user()


def _for_root() -> Entry:
    if shutil.which("unshare") is None:
        return Entry(_mortal())
    hide = ("sh", "-c", _HIDE_UNIFIED, "sh") if cgroup_version() == "hybrid" else ()
    return Entry((*_mortal(), "unshare", "--mount", "--propagation", "slave", *hide))


def _mortal() -> tuple[str, ...]:
    """A server that is killed takes what it started along."""
    return ("setpriv", "--pdeathsig", "TERM") if shutil.which("setpriv") else ()


def _for_user() -> Entry:
    problems: list[str] = []
    for prefix in _ways():
        ids, problem = _try(prefix)
        if ids:
            return Entry(prefix, ids, _notes(ids, problems))
        problems.append(problem)
    raise EngineError(
        "this node lets an ordinary user make no user namespace, which rootless containers need: "
        f"{'; '.join(dict.fromkeys(problems))}. Ask an administrator for user namespaces (sysctl "
        "user.max_user_namespaces=15000; on Debian kernel.unprivileged_userns_clone=1; on Ubuntu an AppArmor "
        "profile for Podman or kernel.apparmor_restrict_unprivileged_userns=0)."
    )


def _ways() -> list[tuple[str, ...]]:
    full = (
        [HELPER, (*_mortal(), "podman", "unshare")]
        if userns.subordinate("uid") and userns.subordinate("gid")
        else []
    )
    return [*full, (*HELPER, "--single")]


def _try(prefix: tuple[str, ...]) -> tuple[int, str]:
    """How many ids it gives, and why none."""
    if not (done := _run(prefix, "cat", "/proc/self/uid_map")) or done.returncode:
        return 0, done.stderr.strip()[-300:] if done else f"{prefix[0]} did not answer"
    return sum(int(line.split()[2]) for line in done.stdout.splitlines()), ""


def _notes(ids: int, problems: list[str]) -> tuple[str, ...]:
    if ids > FULL_RANGE:
        return ()
    why = (
        "; ".join(problem.splitlines()[-1] for problem in problems if problem)
        or f"no range for {userns.user()} in /etc/subuid and /etc/subgid"
    )
    return (
        f"only {ids} user id{'s' * (ids > 1)} in sandboxes ({why}): files of other ids in images are given "
        "to root, and switching user inside fails. Ask an administrator for newuidmap (Debian: uidmap) and "
        "65536 subordinate ids: usermod --add-subuids 100000-165535 --add-subgids 100000-165535 "
        f"{userns.user()}",
    )


def _run(
    prefix: tuple[str, ...], *command: str, timeout_s: float = TRY_S
) -> subprocess.CompletedProcess[str] | None:
    """Run it inside, with no configuration of the user's own. None when it does not end or does not exist."""
    whole = [*prefix, *command]
    with _scratch() as env, contextlib.suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run(whole, env=env, capture_output=True, text=True, timeout=timeout_s, check=False)
    return None


@contextmanager
def _scratch() -> Iterator[dict[str, str]]:
    """An environment in which `podman unshare` leaves its process where we end it, or the next sweep does."""
    folder = ownership.scratch()
    try:
        settings, storage = folder / "containers.conf", folder / "containers" / "storage.conf"
        settings.write_text(f'[engine]\ntmp_dir = "{folder}/t"\nevents_logger = "none"\nlock_type = "file"\n')
        storage.parent.mkdir()
        storage.write_text(f'[storage]\ndriver = "vfs"\ngraphroot = "{folder}/g"\nrunroot = "{folder}/r"\n')
        homes = {"XDG_RUNTIME_DIR": str(folder), "XDG_CONFIG_HOME": str(folder)}
        yield {**os.environ, "CONTAINERS_CONF": str(settings), **homes}
    finally:
        end_pause(folder)
        shutil.rmtree(folder, ignore_errors=True)


def end_pause(folder: Path) -> None:
    """End the process that holds a rootless Podman's user namespace open, if there is one; versions differ
    in where below their run-time directory they note it."""
    for record in folder.rglob("pause.pid"):
        with contextlib.suppress(OSError, ValueError):
            processes.send(int(record.read_text()))


@cache
def storage_driver(folder: Path) -> tuple[str, str]:
    """The driver ("overlay" or "vfs") and the mount program ("" for the kernel's own) that work there."""
    if overlay_works(folder):
        return "overlay", ""
    program = shutil.which("fuse-overlayfs")
    if program and os.access(FUSE, os.R_OK | os.W_OK):
        return "overlay", program
    return "vfs", ""


def storage_notes(folder: Path) -> tuple[str, ...]:
    """What is worse than it could be about the storage there."""
    driver, program = storage_driver(folder)
    if driver == "vfs":
        return (
            f"no overlay can be mounted in {folder}: every sandbox is a full copy of its image, seconds and "
            "hundreds of MiB each. A kernel from 5.13 on, fuse-overlayfs with a /dev/fuse that users may "
            "open, or another disk (runtime.state_dir) helps.",
        )
    return (f"overlay by {program}: slower than the kernel's own (from 5.13 on)",) if program else ()


@cache
def overlay_works(folder: Path, options: str = "") -> bool:
    """Whether the kernel lets us mount an overlay with its layers there, and use it."""
    scratch = tempfile.mkdtemp(prefix="orc-try-", dir=folder)
    try:
        done = _run(entry().prefix, *HELPER, "--try-overlay", scratch, options)
        return done is not None and done.returncode == 0
    finally:
        remove_tree(Path(scratch))


def configure_storage(
    home: Path, graphroot: Path, runroot: Path, store: Path | None = None
) -> dict[str, str]:
    """Write storage.conf for layers in `graphroot`, an existing directory, beside a read-only `store`.

    Returns the environment that has Podman read it: an ordinary user's takes all of it only from a
    configuration home, root's only from a named file. The driver is named: else it may be vfs unasked.
    """
    file = home / "containers" / "storage.conf"
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    file.write_text(_storage_conf(graphroot, runroot, store))
    return {"XDG_CONFIG_HOME": str(home)} | ({} if os.getuid() else {"CONTAINERS_STORAGE_CONF": str(file)})


def _storage_conf(graphroot: Path, runroot: Path, store: Path | None) -> str:
    driver, program = storage_driver(graphroot)
    lines = [f'[storage]\ndriver = "{driver}"\ngraphroot = "{graphroot}"\nrunroot = "{runroot}"']
    lines += ["[storage.options]", f'additionalimagestores = ["{store}"]' if store else ""]
    lines += [f"[storage.options.{driver}]"]
    if program:
        lines.append(f'mount_program = "{program}"')
    elif driver == "overlay" and store and overlay_works(graphroot, ",volatile"):
        lines.append('mountopt = "volatile"')  # for sandboxes, whose layers need not survive a crash
    if entry().scarce:
        lines.append('ignore_chown_errors = "true"')
    return "\n".join(lines) + "\n"


def remove_tree(folder: Path, last: str = "") -> None:
    """Remove a tree; files that belong to subordinate ids need the user namespace in which they were made.

    `last` names the file in it that goes after everything else, and stays when anything else does: by it
    what could not be removed is found again.
    """
    before = [path for path in folder.glob("*") if path.name != last]
    for path in before:
        _remove(path)
    if not any(os.path.lexists(path) for path in before):
        _remove(folder)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
    if os.path.lexists(path) and os.getuid() != 0:
        with contextlib.suppress(EngineError):
            _run(entry().prefix, "rm", "-rf", "--", str(path), timeout_s=REMOVE_S)
