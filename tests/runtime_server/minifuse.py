"""A filesystem that a program serves: one empty directory, by the kernel's FUSE protocol, in a thread.

How to use it
    with mounted(folder, "sshfs"): ...      # root only; the kernel calls it `fuse.sshfs`

What it does not do
    It has no files. It stands for NFS, Lustre and the like, which no test can have.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

INIT, GETATTR, STATFS, OPENDIR, READDIR, RELEASEDIR = 26, 3, 17, 27, 28, 29
ENOSYS = 38
DIRECTORY = 0o40755
_libc = ctypes.CDLL(None, use_errno=True)
ANSWERS = {
    INIT: struct.pack("<IIIIHHIIHH8I", 7, 31, 65536, 0, 12, 9, 65536, 1, 0, 0, *[0] * 8),
    GETATTR: struct.pack("<QII6Q10I", 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, DIRECTORY, 2, 0, 0, 0, 4096, 0),
    OPENDIR: bytes(16),
    READDIR: b"",
    RELEASEDIR: b"",
    STATFS: struct.pack("<5QIIII6I", 1000, 900, 900, 100, 90, 4096, 255, 4096, 0, *[0] * 6),
}


def _serve(device: int) -> None:
    with contextlib.suppress(OSError):  # unmounted
        while request := os.read(device, 1 << 17):
            _, opcode, unique = struct.unpack_from("<IIQ", request)
            body = ANSWERS.get(opcode, b"")
            head = struct.pack("<IiQ", 16 + len(body), 0 if opcode in ANSWERS else -ENOSYS, unique)
            os.write(device, head + body)


@contextmanager
def mounted(folder: Path, subtype: str) -> Iterator[Path]:
    device = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
    kind = f"fuse.{subtype}".encode()
    if _libc.mount(b"test", os.fsencode(folder), kind, 0, options):
        raise OSError(ctypes.get_errno(), "mount")
    thread = threading.Thread(target=_serve, args=(device,), daemon=True)
    thread.start()
    try:
        yield folder
    finally:
        _libc.umount2(os.fsencode(folder), 2)
        thread.join(10)
        os.close(device)
