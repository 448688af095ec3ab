"""Removing what a sandbox was, until it is gone.

What it is
    `Remover` asks the engine again when it could not: Podman's service may just have been killed, or be
    waiting for a container's monitor. A sandbox is given up only after minutes, and the log says so; the end
    of the server removes whatever is left.

How to use it
    remover = Remover(engine, starts, background); await remover.now("s-1", container, io)
    await remover.soon(...)         one try, the others in the background

What it does not do
    It makes no room for others: that is done before (`sandboxes.py`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from runtime_server.engines import Container, Engine
from runtime_server.errors import SandboxError

PAUSES_S = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0)
_log = logging.getLogger("runtime_server")


class Remover:
    """`starts` bounds how many are made or removed at once."""

    def __init__(
        self,
        engine: Engine,
        starts: asyncio.Semaphore,
        background: Callable[[Coroutine[Any, Any, None]], None],
        pauses_s: Sequence[float] = PAUSES_S,
    ) -> None:
        self.engine, self._starts, self._background, self._pauses_s = engine, starts, background, pauses_s

    async def now(self, name: str, container: Container, io: Path) -> bool:
        """Of one whose processes are dead already. False when it is still there after the last try."""
        async with self._starts:
            gone = await self._once(name, container, io, kill=False)
        return gone or await self._again(name, container, io)

    async def soon(self, name: str, container: Container, io: Path) -> None:
        """Processes included. For who holds one of `starts`, and must not be held up for minutes."""
        if not await self._once(name, container, io, kill=True):
            self._background(self._later(name, container, io))

    async def _later(self, name: str, container: Container, io: Path) -> None:
        await self._again(name, container, io)

    async def _again(self, name: str, container: Container, io: Path) -> bool:
        for pause_s in self._pauses_s:
            await asyncio.sleep(pause_s)
            async with self._starts:
                if await self._once(name, container, io, kill=True):
                    return True
        _log.error("%s could not be removed; the end of this server removes it", name)
        return False

    async def _once(self, name: str, container: Container, io: Path, *, kill: bool) -> bool:
        """`kill`: what it ran may be what is in the way."""
        try:
            if kill:
                await self.engine.kill(container)
            await self.engine.remove(container, io)
        except SandboxError as error:
            _log.warning("%s is not removed yet: %s", name, error)
            return False
        return True
