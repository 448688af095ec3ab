"""Measures what sandboxes have written, again and again, and says who has too much.

How to run it
    python runtime_server/engines/measurer.py STORE     `disk.py` starts it inside the engine's namespaces
    on stdin, a line each:   {"add": LAYER, "pid": N, "bytes": N, "inodes": N} or {"drop": LAYER}
    on stdout, a line each:  {"full": LAYER, "bytes": N, "inodes": N}, once for each; first of all {}

What it is
    A look at the store costs one system call. Only when the store has grown (and now and then) the writable
    layers are walked; a walk ends where a limit is passed, and no more than a tenth of a core goes into it.
    Files that were deleted while somebody has them open count too. When the store itself is about to run
    out, the sandbox that holds most is named, and one that hides what it writes is known by how much it
    wrote.

What it does not do
    It imports nothing of the project and is started as a file. It ends nobody and removes nothing.
"""

# ruff: noqa: PTH115, PTH116, PTH208 - pathlib costs ten times as much, and this is done very often
from __future__ import annotations

import contextlib
import json
import os
import select
import stat
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

EVERY_S, ALWAYS_S, REST = 0.5, 10.0, 10
GROWN_BYTES, GROWN_INODES = 8 << 20, 1000
RESERVE_BYTES, RESERVE_INODES = 1 << 30, 20_000  # of a large store; of a small one a fiftieth
UNCOUNTED = ("/memfd:", "/dev/", "/SYSV", "/[")  # deleted files that are memory


@dataclass
class Layer:
    """One sandbox: its writable layer, its first process, what it may have, what it had at the last look."""

    path: str
    pid: int
    most_bytes: int
    most_inodes: int
    bytes: int = 0
    inodes: int = 0

    @property
    def over(self) -> bool:
        return self.bytes > self.most_bytes or self.inodes > self.most_inodes


def walk(top: str, most_bytes: int, most_inodes: int) -> tuple[int, int]:
    """Bytes and inodes below a directory; not much more than the limits is ever counted."""
    size = count = 0
    links: set[int] = set()
    folders = [top]
    while folders and size <= most_bytes and count <= most_inodes:
        with contextlib.suppress(OSError), os.scandir(folders.pop()) as entries:
            for entry in entries:
                count += 1
                with contextlib.suppress(OSError):
                    status = entry.stat(follow_symlinks=False)
                    if stat.S_ISDIR(status.st_mode):
                        folders.append(entry.path)
                    elif status.st_nlink > 1:
                        size += 0 if status.st_ino in links else status.st_blocks * 512
                        links.add(status.st_ino)
                        continue
                    size += status.st_blocks * 512
                if count > most_inodes or size > most_bytes:
                    break
    return size, count


def inhabitants() -> dict[str, list[int]]:
    """Processes by their process namespace."""
    found: dict[str, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                found.setdefault(os.readlink(f"/proc/{name}/ns/pid"), []).append(int(name))
    return found


def deleted(pids: Iterable[int]) -> int:
    """Bytes in files that have no name any more and are open in one of these processes."""
    found: dict[tuple[int, int], int] = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            for name in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    path = f"/proc/{pid}/fd/{name}"
                    target = os.readlink(path)
                    if target.endswith(" (deleted)") and not target.startswith(UNCOUNTED):
                        status = os.stat(path)
                        if stat.S_ISREG(status.st_mode) and not status.st_nlink:
                            found[status.st_dev, status.st_ino] = status.st_blocks * 512
    return sum(found.values())


def written(pids: Iterable[int]) -> int:
    """Bytes that these processes ever sent to a disk."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError, ValueError):
            fields = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
            total += int(fields["write_bytes"]) - int(fields["cancelled_write_bytes"])
    return total


def reserve(store: os.statvfs_result) -> tuple[int, int]:
    """How many bytes and inodes of the store must stay free."""
    size = min(RESERVE_BYTES, store.f_blocks * store.f_frsize // 50)
    return size, min(RESERVE_INODES, store.f_files // 50)


class Measurer:
    """See the module's docstring. `look` returns who is to be told of."""

    def __init__(self, store: str) -> None:
        self.store, self.layers = store, dict[str, Layer]()
        self._used = (0, 0)
        self._next = self._always = 0.0

    def take(self, request: dict[str, object]) -> None:
        if "drop" in request:
            self.layers.pop(str(request["drop"]), None)
            return
        pid, size, inodes = (int(str(request[name])) for name in ("pid", "bytes", "inodes"))
        layer = Layer(str(request["add"]), pid, size, inodes)
        self.layers[layer.path] = layer
        self._next = 0.0

    def look(self, now: float) -> list[Layer]:
        """Nobody at most looks, for they are cheap."""
        store = os.statvfs(self.store)
        used = ((store.f_blocks - store.f_bfree) * store.f_frsize, store.f_files - store.f_ffree)
        size, inodes = reserve(store)
        short = store.f_bavail * store.f_frsize < size or (store.f_files > 0 and store.f_ffree < inodes)
        step = min((layer.most_bytes // 16 for layer in self.layers.values()), default=GROWN_BYTES)
        grown = used[0] - self._used[0] > min(step, GROWN_BYTES) or used[1] - self._used[1] > GROWN_INODES
        if now < self._next or not (grown or short or now > self._always):
            return []
        self._used, self._always = used, now + ALWAYS_S
        found = self._measure()
        self._next = now + (time.monotonic() - now) * REST
        return found or (self._largest() if short else [])

    def _measure(self) -> list[Layer]:
        homes = inhabitants()
        for layer in self.layers.values():
            layer.bytes, layer.inodes = walk(layer.path, layer.most_bytes, layer.most_inodes)
            if not layer.over:
                layer.bytes += deleted(self._pids(layer, homes))
        return [layer for layer in self.layers.values() if layer.over]

    def _largest(self) -> list[Layer]:
        """Who holds most, or wrote most without anybody seeing where; nobody when it is not the sandboxes."""
        homes = inhabitants()
        sizes = {
            layer.path: max(layer.bytes, written(self._pids(layer, homes)), layer.inodes * 4096)
            for layer in self.layers.values()
        }
        largest = max(sizes, key=lambda path: sizes[path], default="")
        return [self.layers[largest]] if largest and sizes[largest] > GROWN_BYTES else []

    def _pids(self, layer: Layer, homes: dict[str, list[int]]) -> list[int]:
        with contextlib.suppress(OSError):
            return homes.get(os.readlink(f"/proc/{layer.pid}/ns/pid"), [])
        return []


def lines(timeout_s: float) -> list[bytes] | None:
    """Whole lines that came on stdin within this time; None at its end."""
    if not select.select([0], [], [], timeout_s)[0]:
        return []
    data = os.read(0, 1 << 16)
    while data and not data.endswith(b"\n"):
        data += os.read(0, 1 << 16)
    return data.splitlines() or None


def main() -> int:
    measurer = Measurer(sys.argv[1])
    print("{}", flush=True)
    while (requests := lines(EVERY_S)) is not None:
        for line in requests:
            measurer.take(json.loads(line))
        for layer in measurer.look(time.monotonic()) if measurer.layers else ():
            measurer.layers.pop(layer.path, None)
            print(json.dumps({"full": layer.path, "bytes": layer.bytes, "inodes": layer.inodes}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
