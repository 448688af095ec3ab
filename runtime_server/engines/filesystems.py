"""What kind of filesystem a directory is on, and whether containers and sockets can live there.

What it is
    `filesystem(path)` is the kernel's name of it, `networked(path)` that name when other machines (or a
    program) serve it: asked of the filesystem itself (`statfs`) and of the list of mounts, for either may be
    all that shows.

What it does not do
    It tries nothing: whether overlay works on a local disk is found out by mounting one (`namespace.py`).
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

_MAGIC = {
    0x6969: "nfs",
    0x0BD00BD0: "lustre",
    0x47504653: "gpfs",
    0xFF534D42: "cifs",
    0xFE534D42: "smb",
    0x00C36400: "ceph",
    0x5346414F: "afs",
    0x19830326: "beegfs",
    0x20030528: "orangefs",
    0xAAD7AAEA: "panfs",
    0x73757245: "coda",
    0x65735546: "fuse",
}
_NAMES = {"nfs4", "smb3", "wekafs", "pvfs2", "fhgfs", "mmfs", "lustre_lite", *_MAGIC.values()}
LOCAL_FUSE = ("fuseblk",)  # a disk of this machine, by a program of this machine
_libc = ctypes.CDLL(None, use_errno=True)


def filesystem(path: Path) -> str:
    """Type of the filesystem that `path` is on, as the kernel names it; "" when unknown."""
    real = path.resolve()
    best, kind = "", ""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        point = left.split()[4].replace("\\040", " ")
        if len(point) >= len(best) and (real == Path(point) or Path(point) in real.parents):
            best, kind = point, right.split()[0]
    return kind


def networked(path: Path) -> str:
    """Its name when it is no disk of this machine, else ""; a path that is not there yet has its parent's."""
    kind = filesystem(path)
    if kind in LOCAL_FUSE:
        return ""
    told = kind if kind in _NAMES or kind.startswith("fuse.") else ""
    return told or _MAGIC.get(magic(path), "")


def magic(path: Path) -> int:
    """The number by which `statfs` tells filesystems apart; 0 when nothing is there."""
    buffer = (ctypes.c_long * 64)()
    existing = next((p for p in (path, *path.parents) if p.exists()), Path("/"))
    failed = _libc.statfs(os.fsencode(existing), ctypes.byref(buffer))
    return 0 if failed else int(buffer[0]) & 0xFFFFFFFF
