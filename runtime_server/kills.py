"""How many processes of a sandbox were ended for memory: asked twice for every command.

What it is
    `Kills` of one sandbox. It keeps the kernel's file open, so that each question is one system call.

How to use it
    before = kills.count(container); …; oom = kills.count(container) > before

What it does not do
    It ends nothing, and knows nothing of limits: `engines/watch.py` does where the kernel holds none.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from runtime_server.engines import Container

_NAMES = ("memory.events", "memory.oom_control")  # of version 2, and of version 1


class Kills:
    """Reads the file of one container at a time; another one's when it is asked about that."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._file = -1
        self._last: int | None = None

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        file, self._file, self._folder = self._file, -1, None
        if file >= 0:
            os.close(file)

    def end(self, container: Container) -> None:
        """That is all: what is remembered of a sandbox keeps no file open."""
        self._last = self.count(container)
        self.close()

    def count(self, container: Container) -> int:
        """By the kernel or by us; what cannot be known counts as none."""
        if self._last is not None:
            return self._last
        return self._by_kernel(container.memory) + (container.watched.kills if container.watched else 0)

    def _by_kernel(self, folder: Path | None) -> int:
        if folder != self._folder:
            self.close()
            self._folder, self._file = folder, _opened(folder)
        if self._file < 0:
            return 0
        try:
            words = os.pread(self._file, 4096, 0).split()
            return int(words[words.index(b"oom_kill") + 1])
        except (OSError, ValueError, IndexError):  # the group is gone, or an old kernel that does not count
            return 0


def _opened(folder: Path | None) -> int:
    for name in _NAMES if folder is not None else ():
        with contextlib.suppress(OSError):
            return os.open(f"{folder}/{name}", os.O_RDONLY | os.O_CLOEXEC)
    return -1
