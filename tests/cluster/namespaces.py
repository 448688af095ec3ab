"""The Linux calls that Python 3.11 does not have: namespaces, mounts, death signals.

How to use it: `unshare(MOUNT | NETWORK)`, `bind(source, target)`, `die_with_parent()`; each raises OSError
with the path it was about. Root is needed for all but the last.

What it does not do: it decides nothing; the order of calls is in holder.py and enter.py.
"""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)

MOUNT, UTS, IPC, PID, NETWORK = 0x00020000, 0x04000000, 0x08000000, 0x20000000, 0x40000000
NAMES = {"ipc": IPC, "uts": UTS, "net": NETWORK, "pid": PID, "mnt": MOUNT}  # in the order to enter them

_READ_ONLY, _REMOUNT, _BIND, _RECURSIVE, _PRIVATE, _SHARED = 1, 32, 4096, 16384, 1 << 18, 1 << 20
_DETACH = 2
_OPEN_TREE, _MOVE_MOUNT, _HERE = 428, 429, -100  # system calls of every architecture; AT_FDCWD
_CLONE, _EMPTY_PATH, _CLOSE_ON_EXEC = 1, 4, os.O_CLOEXEC
_NOSUID, _NODEV, _NOEXEC, _NOATIME, _RELATIME = 2, 4, 8, 1024, 1 << 21
# A remount that leaves one of these out would take it away.
_KEPT = {"nosuid": _NOSUID, "nodev": _NODEV, "noexec": _NOEXEC, "noatime": _NOATIME, "relatime": _RELATIME}
_PR_SET_PDEATHSIG = 1


def _checked(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def unshare(flags: int) -> None:
    _checked(_libc.unshare(flags), f"cannot make namespaces {flags:#x}")


def enter(descriptor: int, kind: int) -> None:
    _checked(_libc.setns(descriptor, kind), f"cannot enter namespace {kind:#x}")


def die_with_parent() -> None:
    """Be killed when the parent ends. Changing the user clears it, so call it after that."""
    _checked(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "cannot set the parent death signal")


def _mount(source: str, target: Path, kind: str | None, flags: int, options: str | None = None) -> None:
    encoded = [part.encode() if part is not None else None for part in (source, str(target), kind, options)]
    result = _libc.mount(encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3])
    _checked(result, f"cannot mount {source} on {target}")


def detach_from_machine() -> None:
    """Mounts made from here on stay in this namespace."""
    _mount("none", Path("/"), None, _RECURSIVE | _PRIVATE)


def share_below() -> None:
    """As every systemd machine has it: what is mounted here shows in mount namespaces made from this one."""
    _mount("none", Path("/"), None, _RECURSIVE | _SHARED)


def bind(source: Path, target: Path, *, recursive: bool = False) -> None:
    _mount(str(source), target, None, _BIND | (_RECURSIVE if recursive else 0))


def mount_new(kind: str, target: Path, options: str | None = None) -> None:
    """A fresh file system: tmpfs, proc, sysfs."""
    _mount(kind, target, kind, 0, options)


def overlay(above: Path, target: Path) -> None:
    """Show the files of `above` in place of those of `target`, and the rest of `target`; nobody can write."""
    descriptor = os.open(above, os.O_PATH)  # no path in the options: it may hold a colon or a comma
    try:
        layers = f"lowerdir=/proc/self/fd/{descriptor}:{target}"
        _mount("overlay", target, "overlay", _READ_ONLY, layers)
    finally:
        os.close(descriptor)


def read_only(target: Path) -> None:
    """This one mount, not those below it."""
    words = next((words for path, _, words in mounts() if path == target), frozenset())
    kept = sum(flag for word, flag in _KEPT.items() if word in words)
    _mount("none", target, None, _REMOUNT | _BIND | _READ_ONLY | kept)


def copy_mount(source: Path) -> int:
    """A descriptor of another mount of the same filesystem, not yet anywhere: see `place_mount`."""
    found: int = _libc.syscall(_OPEN_TREE, _HERE, str(source).encode(), _CLONE | _CLOSE_ON_EXEC)
    _checked(min(found, 0), f"cannot take the mount of {source}")
    return found


def place_mount(descriptor: int, target: Path) -> None:
    """In the present namespace, whichever it was taken in."""
    result = _libc.syscall(_MOVE_MOUNT, descriptor, b"", _HERE, str(target).encode(), _EMPTY_PATH)
    _checked(result, f"cannot mount on {target}")


def unmount(target: Path) -> None:
    """With all below it; who still uses it keeps it until then."""
    _checked(_libc.umount2(str(target).encode(), _DETACH), f"cannot unmount {target}")


def mounts() -> list[tuple[Path, str, frozenset[str]]]:
    """(mount point, kind, options) of each mount of this process, the topmost last."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split(" ")
        path = fields[4].encode().decode("unicode_escape")  # blanks are written \040
        found.append((Path(path), fields[fields.index("-") + 1], frozenset(fields[5].split(","))))
    return found
