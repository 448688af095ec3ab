"""Durable files on a shared filesystem: atomic publish, tolerant read, append.

What it is
    The few operations that are safe on NFS, Lustre and GPFS, where a rename may report an error
    although it happened, a handle may go stale, and `fsync` of a file does not persist its name.

What it does not do
    It knows no record and no run (`orchestrator.contract` does), takes no lock, compares no times.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
from pathlib import Path
from typing import Any

_TRANSIENT = {errno.ESTALE, errno.EIO, errno.ENOENT, errno.EINTR}


def publish_bytes(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Replace `path` atomically and durably: write beside, fsync, rename, fsync the directory.

    The temporary file is born with `mode`, so a secret is never readable, not even for an instant.
    """
    beside = path.with_name(f".{path.name}.{host_name()}.{os.getpid()}.{os.urandom(16).hex()}")
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        _rename(beside, path, data)
    except BaseException as error:  # whatever it was, an interrupt too: no half-written file stays
        with contextlib.suppress(OSError):
            beside.unlink()
        if isinstance(error, OSError) and error.filename is None:  # "no space left", but where?
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    fsync_directory(path.parent)


def write_new(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write a file that nobody looks for yet, durably but for its name: publishing another file in the
    same folder afterwards makes that durable too. It is born with `mode`."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def host_name() -> str:
    """Name of this machine, as `socket.gethostname` gives it."""
    return os.uname().nodename


def _rename(beside: Path, path: Path, data: bytes) -> None:
    """Rename; on NFS a rename that succeeded may report an error, so read back before believing it."""
    try:
        beside.replace(path)
    except OSError:
        if read_bytes(path) != data:
            raise


def fsync_directory(path: Path) -> None:
    """Make directory entries durable. Filesystems that cannot fsync a directory are left alone."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_bytes(path: Path, tries: int = 3) -> bytes:
    """The file's content; b"" when it does not exist (yet). Opens anew each time: close-to-open is what
    revalidates an NFS client's cache, and stale handles are retried."""
    for left in range(tries - 1, -1, -1):
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            if error.errno not in _TRANSIENT or not left:
                raise
            time.sleep(0.05)
    return b""


def append_line(path: Path, line: str, sync: bool = False) -> None:
    """Append one line with a single write to a file that only this process writes: all of it, or OSError.
    With `sync` it lies on the disk when this returns.

    A filesystem that is nearly full takes a part of a line and says no word; that part is taken back, or the
    next line would be lost with it.
    """
    data = (line.rstrip("\n") + "\n").encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        if (written := os.write(descriptor, data)) != len(data):
            os.ftruncate(descriptor, os.fstat(descriptor).st_size - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        if sync:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Every complete JSON object line; a line cut short by a kill, or still being written, is left out."""
    rows = []
    for line in read_bytes(path).splitlines():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict):
                rows.append(row)
    return rows
