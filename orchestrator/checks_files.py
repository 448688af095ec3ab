"""Checks of the filesystem that runs are on: shared or not, what it can do, how much room is left.

How to use it
    checks = directory(Path(".orchestrate_runs"))

What it does not do
    It says nothing about how long other nodes take to see a file; a probe on two nodes measures that.
    Standard library only. It leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

from orchestrator.checks import Check, fail, ok, warn
from orchestrator.durable import fsync_directory

SHARED = frozenset(
    {
        *("nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb3", "afs", "panfs", "wekafs"),
        *("fuse.ceph", "fuse.glusterfs", "fuse.juicefs", "fuse.beegfs", "orangefs", "pvfs2", "vast", "daos"),
    }
)
LOCAL = frozenset({"ext4", "ext3", "xfs", "btrfs", "tmpfs", "overlay", "zfs", "f2fs", "ramfs", "ext2"})


def mount_of(path: Path, mounts: str) -> tuple[str, str]:
    """(type, mount point) of the filesystem that a path is on, by the text of /proc/self/mounts."""
    best, kind = "", ""
    for line in mounts.splitlines():
        fields = line.split()
        if len(fields) < 3:
            continue
        point = fields[1].encode().decode("unicode_escape")
        inside = path == Path(point) or Path(point) in path.parents
        if inside and len(point) >= len(best):
            best, kind = point, fields[2]
    return kind, best


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def directory(runs_dir: Path, not_judged: str = "") -> Iterator[Check]:
    """Every check of the folder where runs go. `not_judged`: why it does not matter here whether the
    filesystem looks shared."""
    there = existing(runs_dir).resolve()
    yield kind_of(there, Path("/proc/self/mounts").read_text(), not_judged)
    yield from _room(there)
    try:
        yield from _operations(there)
    except OSError as error:
        remedy = "set run.runs_dir to a folder of yours on the shared filesystem"
        yield fail("write", f"{there} cannot be written: {error.strerror or error}", remedy)
    yield from _quota(there)


def kind_of(path: Path, mounts: str, not_judged: str = "") -> Check:
    kind, point = mount_of(path, mounts)
    text = f"{path} is on {kind or 'an unknown filesystem'} ({point or '?'})"
    if kind in SHARED or kind.startswith(("fuse.", "nfs")):
        return ok("filesystem", text)
    if not_judged:
        return ok("filesystem", f"{text}; {not_judged}")
    remedy = "if the nodes do not see it, set run.runs_dir to the shared filesystem; --probe finds out"
    return warn("filesystem", f"{text}, which is usually seen by one machine only", remedy)


def _room(there: Path) -> Iterator[Check]:
    seen = os.statvfs(there)
    free = seen.f_bavail * seen.f_frsize / (1 << 30)
    text = f"{free:,.1f} GiB free"
    yield ok("space", text) if free > 10 else warn("space", text, "a checkpoint may not fit: make room")
    if seen.f_files and seen.f_favail < 10_000:
        yield warn("inodes", f"{seen.f_favail:,} files may still be made", "remove old runs")


def _operations(there: Path) -> Iterator[Check]:
    """Write, fsync, rename over, O_EXCL, and modes: what the run contract rests on."""
    folder = there / f".doctor-{uuid.uuid4().hex[:12]}"
    folder.mkdir(mode=0o700)
    try:
        first, second = folder / "a", folder / "b"
        for path, data in ((first, b"1"), (second, b"2")):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                os.write(descriptor, data)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        fsync_directory(folder)
        first.replace(second)
        whole = second.read_bytes() == b"1" and not first.exists()
        yield ok("rename", "replaces a file at once") if whole else fail("rename", "did not replace the file")
        yield _exclusive(second)
        mode = second.stat().st_mode & 0o777
        remedy = "keys would be readable by others: put run.runs_dir elsewhere"
        yield ok("modes", "0600 is kept") if mode == 0o600 else fail("modes", f"0600 became {mode:o}", remedy)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _exclusive(taken: Path) -> Check:
    with contextlib.suppress(FileExistsError):
        os.close(os.open(taken, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        return fail("O_EXCL", "an existing file was created again", "put run.runs_dir on another filesystem")
    return ok("O_EXCL", "refuses a name that is taken")


def _quota(there: Path) -> Iterator[Check]:
    """What quota(1) says, where it is there; sites with another tool are not guessed at."""
    if shutil.which("quota") is None:
        return
    try:
        done = subprocess.run(["quota", "-w"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return
    if "*" in done.stdout:
        yield warn("quota", "a limit is exceeded: " + " ".join(done.stdout.split())[:160], "quota -s")
    elif done.returncode == 0:
        yield ok("quota", "below the limits")
