"""What is there when nothing should be: looked at between blocks of cycles, when no sandbox is wanted.

What it is
    `Quiet.look` deletes nothing itself; it waits until what the server removes in the background is gone,
    and then says what is left: sandboxes, containers, monitors, paths in the server's directories and
    cgroups, open files. `Memory` keeps how much the server had resident, and says whether it grows.

What it does not do
    It does not know who made what is left; the block of cycles narrows it down.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from soak.place import Place

from runtime_server.engines import processes

GONE_S = 40.0
FILES_MORE = 16  # connections to Podman, as many as are made at once
FILLED = 2200  # cycles, after which the server keeps as many records and answers as it ever does
JUDGED = 6  # samples after that
GROWTH_KIB = 4.0  # a cycle
# Podman loses an empty lock file when its service is killed while it makes a container: not ours to remove
EPHEMERAL = ("/t/locks/", "journal", ".sock", "libpod_state", "bolt_state", "podman.log", "db.sql")


@dataclass
class Memory:
    """Of the server, by the number of cycles; one list for each of its lives."""

    lives: list[list[tuple[int, float]]] = field(default_factory=list)
    files: int = 0

    @property
    def rss_mib(self) -> float:
        return self.lives[-1][-1][1] if self.lives and self.lives[-1] else 0.0

    def slope_kib(self) -> float | None:
        """KiB a cycle of the longest life once it keeps all it may (least squares); None for a short one."""
        longest = max(self.lives, key=len, default=[])
        late = [(number, rss) for number, rss in longest if number >= FILLED]
        if len(late) < JUDGED:
            return None
        x, y = sum(n for n, _ in late) / len(late), sum(m for _, m in late) / len(late)
        return 1024 * sum((n - x) * (m - y) for n, m in late) / sum((n - x) ** 2 for n, _ in late)

    def rows(self) -> dict[str, object]:
        every = [rss for life in self.lives for _, rss in life]
        slope = self.slope_kib()
        return {
            "server_rss_mib": [every[0], max(every), every[-1]] if every else [],
            "server_rss_kib_per_cycle": None if slope is None else round(slope, 2),
            "server_files": self.files,
        }


class Quiet:
    """See the module's docstring."""

    def __init__(self, place: Place) -> None:
        self.place, self.memory = place, Memory()
        self._paths: set[str] = set()
        self._files: Counter[str] = Counter()
        self._starts = 0

    async def remember(self) -> None:
        """What an idle server has."""
        async with self.place.client() as client, client.sandbox() as box:
            await box.exec("true")
        await self._settled()
        self._paths, self._files = self._all_paths(), self._open_files()
        self._sample(0)

    async def look(self, number: int) -> list[str]:
        """What is left over. It has `GONE_S` to go away."""
        async with self.place.client() as client:
            await client.prefetch({})
        left = await self._settled()
        self._sample(number)
        return left

    async def ended(self) -> list[str]:
        """Stop the server; what is left of it then."""
        state = self.place.state
        code = await self.place.stop()
        left = [f"the server stopped with {code}:\n{self.place.said()}"] if code else []
        left += [f"left behind: {path}" for path in (state.root, state.storage) if path.exists()]
        left += [
            f"left running: {pid} {processes.command_line(pid)[:80]!r}"
            for pid in processes.of_server(state.token, state.cgroup)
        ]
        left += [f"left: {path}" for path in processes.cgroups_of(state.cgroup)]
        slope = self.memory.slope_kib()
        if slope is not None and slope > GROWTH_KIB:
            left.append(
                f"the server's memory grows by {slope:.1f} KiB a cycle (at most {GROWTH_KIB} is fine)"
            )
        return left

    async def _settled(self) -> list[str]:
        deadline = time.monotonic() + GONE_S
        while (left := await self._left()) and time.monotonic() < deadline:  # noqa: ASYNC110 - its own time
            await asyncio.sleep(0.2)
        return left

    async def _left(self) -> list[str]:
        place = self.place
        async with place.client() as client:
            listed = (await client.list()).sandboxes
        left = [f"sandbox {box.id} is listed as {box.state} {box.reason}" for box in listed]
        left += [f"container {name} is known to Podman" for name in await self._containers()]
        left += [f"process {pid}: {processes.command_line(pid)[:60]!r}" for pid in place.agents()]
        left += [f"conmon {pid}" for pid in place.conmons()]
        if self._paths:
            left += [f"path {path}" for path in sorted(self._all_paths() - self._paths)[:10]]
        return left + self._more_files()

    async def _containers(self) -> list[str]:
        transport = httpx.AsyncHTTPTransport(uds=str(self.place.state.socket))
        async with httpx.AsyncClient(transport=transport, timeout=30) as podman:
            try:
                got = await podman.get("http://d/v4.0.0/libpod/containers/json", params={"all": "true"})
            except httpx.TransportError:
                return []  # its service was killed and nobody has needed it since: the processes tell
            return [str(row["Id"])[:12] for row in got.json() or []]

    def _all_paths(self) -> set[str]:
        """By names that the next life of the server has too."""
        state = self.place.state
        tops = (state.root, state.storage, *processes.cgroups_of(state.cgroup))
        found = {str(path) for top in tops for path in _walk(top)}
        named = {path.replace(state.token, "STATE") for path in found}
        return {path for path in named if not any(part in path for part in EPHEMERAL)}

    def _open_files(self) -> Counter[str]:
        """The server's descriptors by kind; connections of clients are theirs to close."""
        folder, kinds = Path(f"/proc/{self.place.pid}/fd"), Counter[str]()
        network = _network_sockets()
        for file in folder.iterdir():
            with contextlib.suppress(OSError):
                target = str(file.readlink())
                kinds["tcp" if target in network else target.split(":")[0]] += 1
        del kinds["tcp"]
        return kinds

    def _more_files(self) -> list[str]:
        if not self._files:
            return []
        now = self._open_files()
        self.memory.files = now.total()
        if now.total() <= self._files.total() + FILES_MORE:
            return []
        return [f"open files of the server: {dict(now - self._files)} more than when it was idle first"]

    def _sample(self, number: int) -> None:
        if self.place.starts != self._starts:
            self._starts = self.place.starts
            self.memory.lives.append([])
        status = Path(f"/proc/{self.place.pid}/status").read_text()
        rss = int(status.split("VmRSS:")[1].split()[0]) / 1024
        self.memory.lives[-1].append((number, round(rss, 1)))


def _walk(top: Path) -> list[Path]:
    found: list[Path] = []
    for folder, folders, files in os.walk(top):  # which does not mind what goes away meanwhile
        found += [Path(folder, name) for name in (*folders, *files)]
    return found


def _network_sockets() -> set[str]:
    found = set()
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            lines = Path("/proc/net", name).read_text().splitlines()[1:]
            found |= {f"socket:[{line.split()[9]}]" for line in lines}
    return found
