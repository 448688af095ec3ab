"""An engine that takes over weights only between turns: whoever is being sampled ends first.

What it is
    `Pausing` stands before another engine. `load` lets no new request in, waits until the running ones have
    ended, loads, and opens again (`rollout.update_in_flight: pause`). Without it, an engine goes on with
    running requests under the new weights from their next token (`keep`).

How to use it
    engine = Pausing(open_engine(kind, policy, directory, config))

What it does not do
    A turn is of one version then, an episode need not be. The wait is as long as the longest turn.
"""

from __future__ import annotations

import asyncio

from trainer.engines import Engine, Sample, Sampling


class Pausing:
    """See the module's docstring; implements `trainer.engines.Engine`."""

    def __init__(self, inner: Engine) -> None:
        self._inner = inner
        self._running = 0
        self._open, self._idle = asyncio.Event(), asyncio.Event()
        self._open.set()
        self._idle.set()

    @property
    def version(self) -> int:
        return self._inner.version

    async def generate(self, ids: list[int], sampling: Sampling) -> Sample:
        """As the engine behind does, once no weights are on their way."""
        await self._open.wait()
        self._running += 1
        self._idle.clear()
        try:
            return await self._inner.generate(ids, sampling)
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

    async def load(self, version: int) -> None:
        """Wait until nothing is being sampled, then load."""
        self._open.clear()
        try:
            await self._idle.wait()
            await self._inner.load(version)
        finally:
            self._open.set()

    async def probe(self, prompt: list[int]) -> float:
        return await self._inner.probe(prompt)

    async def close(self) -> None:
        await self._inner.close()
