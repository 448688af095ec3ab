"""What a restarted server has to know: one line of JSON for each thing that was promised to somebody.

What it is
    A file that is only appended to, one whole line at a time, and written to the disk before the promise is
    made. On a tmpfs that costs nothing, and no more is needed: what sandboxes live in does not survive
    the machine either. When most of it is history it is written anew with what still holds, beside the old
    one, which it then replaces.

How to use it
    journal = Journal(path); await journal.add({"sandbox": ...}); Journal.read(path)

What it does not do
    It does not know what the lines mean: `adoption.py` does. A last line that was cut short counts as unsaid.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from runtime_server.engines.filesystems import filesystem

Entry = dict[str, Any]
HISTORY_MIN = 2000  # lines
HISTORY_SHARE = 4  # times as many lines as still hold


class Journal:
    """See the module's docstring. `current` gives all that still holds. Lives in one event loop."""

    def __init__(self, path: Path, current: Callable[[], Iterable[Entry]]) -> None:
        self.path, self._current = path, current
        self._lines = 0
        self._volatile = filesystem(path.parent) == "tmpfs"
        self._turn = asyncio.Lock()
        self._file = self._open(path)
        self.rewrite()

    @staticmethod
    def read(path: Path) -> list[Entry]:
        found: list[Entry] = []
        with suppress(FileNotFoundError):
            for line in path.read_bytes().split(b"\n"):
                with suppress(ValueError):
                    entry = json.loads(line)
                    found += [entry] if isinstance(entry, dict) else []
        return found

    async def add(self, *entries: Entry) -> None:
        """Returns once they are safe. OSError when they are not: then nothing may be promised."""
        data = _text(entries)
        async with self._turn:
            if self._volatile:
                self._write(data)
            else:
                await asyncio.to_thread(self._write, data)
            self._lines += len(entries)
            if self._lines > HISTORY_MIN:
                self.rewrite()

    def rewrite(self) -> None:
        """Leave out what is over, if that is most of it."""
        entries = [*self._current()]
        if self._lines and self._lines < HISTORY_SHARE * len(entries):
            return
        fresh = self.path.with_suffix(".new")
        fresh.unlink(missing_ok=True)
        old, self._file = self._file, self._open(fresh)
        self._write(_text(entries))
        fresh.replace(self.path)
        os.close(old)
        self._lines = len(entries)

    def close(self) -> None:
        os.close(self._file)

    def _write(self, data: bytes) -> None:
        """Whole or not at all, so that the next line does not continue a half one."""
        size = os.fstat(self._file).st_size
        try:
            if os.write(self._file, data) != len(data):
                raise OSError(28, f"no room left for {self.path}")
            os.fdatasync(self._file)
        except OSError:
            os.ftruncate(self._file, size)
            raise

    @staticmethod
    def _open(path: Path) -> int:
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _text(entries: Iterable[Entry]) -> bytes:
    return b"".join(json.dumps(entry, separators=(",", ":")).encode() + b"\n" for entry in entries)
