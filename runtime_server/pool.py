"""Containers that wait ready, with an agent and no root directory yet: the next sandboxes take them.

What it is
    A container without a root fits every image and every snapshot, so one pool serves all: its size is what
    `prefetch` asked for in sum (or `runtime.warm`), within the places that are free. It is filled in the
    background, one after the other, and steps back while somebody waits for a container of his own.

What it does not do
    It gives no root directory, and keeps no sandbox (`making.py`, `sandboxes.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from runtime_server.agent import AgentConnection
from runtime_server.engines import Container, Recipe
from runtime_server.errors import SandboxError

WANTED_S = 900.0  # a batch that never came is forgotten
LOOK_S, REST_S = 0.5, 5.0
CALM_S = 0.2  # a burst is served first, then what it took is made again


@dataclass(frozen=True, eq=False)
class Warm:
    """One that waits."""

    container: Container
    agent: AgentConnection
    io: Path
    recipe: Recipe


class Pool:
    """`make` makes one, `drop` removes one, `room` says how many there may be now. Call `start` once."""

    def __init__(
        self,
        make: Callable[[], Awaitable[Warm]],
        drop: Callable[[Warm], Awaitable[None]],
        room: Callable[[], int],
        least: int,
    ) -> None:
        self._make, self._drop, self._room, self._least = make, drop, room, least
        self.ready: list[Warm] = []
        self.wanted: dict[str, int] = {}
        self._until = self._taken = 0.0
        self._change = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def target(self) -> int:
        return max(0, min(max(self._least, sum(self.wanted.values())), self._room()))

    def start(self) -> None:
        self._task = asyncio.create_task(self._keep())

    async def stop(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        for warm in self.ready:
            await warm.agent.close()
        self.ready.clear()

    def want(self, images: dict[str, int]) -> None:
        """In place of what was wanted before."""
        self.wanted = {name: count for name, count in images.items() if count}
        self._until = time.monotonic() + WANTED_S
        self._change.set()

    def take(self, recipe: Recipe) -> Warm | None:
        """One with the limits of this recipe, if there is one. It is no longer ours."""
        self._until = max(self._until, time.monotonic() + WANTED_S) if self.wanted else 0.0
        for warm in reversed(self.ready):
            if not warm.agent.closed and _same_limits(warm.recipe, recipe):
                self.ready.remove(warm)
                self._taken = time.monotonic()
                self._change.set()
                return warm
        return None

    async def _keep(self) -> None:
        while True:
            self._change.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._change.wait()
            try:
                await self._adjust()
            except (SandboxError, OSError):  # whoever creates one next is told; we try again later
                await asyncio.sleep(REST_S)

    async def _adjust(self) -> None:
        if self.wanted and time.monotonic() > self._until:
            self.wanted = {}
        for warm in [warm for warm in self.ready if warm.agent.closed]:
            self.ready.remove(warm)
            await self._drop(warm)
        while len(self.ready) > self.target:
            await self._drop(self.ready.pop(0))
        while len(self.ready) < self.target:
            if self.ready and (busy := self._taken + CALM_S - time.monotonic()) > 0:
                await asyncio.sleep(busy)
                continue
            self.ready.append(await self._make())


def _same_limits(one: Recipe, other: Recipe) -> bool:
    return (one.cpus, one.memory_mb, one.pids, one.shm_mb, one.user) == (
        other.cpus,
        other.memory_mb,
        other.pids,
        other.shm_mb,
        other.user,
    )
