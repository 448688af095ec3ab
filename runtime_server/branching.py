"""Snapshots and forks of sandboxes, images fetched ahead, and what there is room for.

What it is
    The lifecycle calls that concern more than one sandbox: one prepared state for many (`fork` takes the
    places of all in one instant, copies the source's files once, and begins each with them), the wishes of
    the next batch (`prefetch`), and `capacity`.

What it does not do
    It copies and makes nothing itself (`snapshots.py`, `sandboxes.py`, `pool.py`).
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from runtime_server import wire
from runtime_server.births import Birth
from runtime_server.engines import Image
from runtime_server.errors import SandboxError
from runtime_server.sandboxes import Sandboxes
from runtime_server.wire_lifecycle import (
    Capacity,
    Fork,
    Forked,
    Prefetch,
    Prefetched,
    Snapshot,
    SnapshotList,
    TakeSnapshot,
)

SEEN_S = 0.5  # an image that is here is found so soon


class Branching:
    """See the module's docstring."""

    def __init__(self, sandboxes: Sandboxes) -> None:
        self.boxes, self.snapshots = sandboxes, sandboxes.snapshots
        self._fetching: dict[str, asyncio.Task[Image]] = {}

    async def snapshot(self, identity: str, told: TakeSnapshot) -> Snapshot:
        box = self.boxes.usable(identity)
        one = await self.snapshots.take(box, told.ttl_s, told.labels)
        await self.boxes.ledger.snapshot(one)
        return self.snapshots.record(one)

    def all(self) -> SnapshotList:
        return SnapshotList(snapshots=[self.snapshots.record(one) for one in self.snapshots.live])

    def get(self, identity: str) -> Snapshot:
        return self.snapshots.record(self.snapshots.get(identity))

    async def delete(self, identity: str) -> None:
        await self.boxes.ledger.snapshot_over(self.snapshots.get(identity))

    async def fork(self, identity: str, told: Fork) -> Forked:
        """All of them or none."""
        box = self.boxes.usable(identity)
        labels = dict(box.labels) if told.labels is None else told.labels
        taken = await self.snapshot(identity, TakeSnapshot())
        request = wire.CreateSandbox(
            snapshot=taken.id,
            image=box.image,
            env=told.env,
            ttl_s=told.ttl_s or box.ttl_s,
            max_lifetime_s=told.max_lifetime_s,
            labels=labels,
        )
        wait_s = self.boxes.patience(told.queue_timeout_s)
        async with self.boxes.quotas.admitted(labels, wait_s, told.count):
            births = await self._begin(request, told.count, wait_s)
        try:
            made = await asyncio.gather(*(self.boxes.outcome(birth, mine=True) for birth in births))
        except BaseException:  # one failed, or nobody waits any more: the others go too
            await asyncio.shield(self._drop(births))
            raise
        return Forked(snapshot=taken.id, sandboxes=[*made])

    async def _begin(self, request: wire.CreateSandbox, count: int, wait_s: float) -> list[Birth]:
        """With places for all of them."""
        places = self.boxes.places
        together = places.enter(count)
        await places.wait(together, wait_s)
        births: list[Birth] = []
        try:
            for _ in range(count):
                births.append(await self.boxes.conceive(request, ticket=places.seat()))
        except BaseException:  # what has begun gives its own place back
            for _ in range(count - len(births)):
                places.give()
            await asyncio.shield(self._drop(births))
            raise
        return births

    async def _drop(self, births: list[Birth]) -> None:
        for birth in births:
            birth.task.cancel()
        await asyncio.wait({birth.task for birth in births}) if births else None
        for birth in births:
            if birth.id in self.boxes.boxes:
                await self.boxes.delete(birth.id)

    # --- ahead of time ---

    async def prefetch(self, told: Prefetch) -> Prefetched:
        """Fetch what is not here in the background, and have containers ready for all of them."""
        self.boxes.check_open()
        default = self.boxes.config.sandbox.image  # what a create without an image gets
        wanted: Counter[str] = Counter()
        for name, count in told.images.items():
            wanted[name or default] += count
        fetching = {name: self._fetch(name) for name in wanted}
        if fetching:
            await asyncio.wait(fetching.values(), timeout=SEEN_S)
        self.boxes.pool.want(wanted)
        return Prefetched(
            images={name: _state(task) for name, task in fetching.items()},
            warm=len(self.boxes.pool.ready),
            wanted=self.boxes.pool.target,
        )

    def _fetch(self, name: str) -> asyncio.Task[Image]:
        """One at a time for each name; the engine does the same for those who create."""
        task = self._fetching.get(name)
        if task is None:
            task = asyncio.create_task(self.boxes.engine.image(name))
            self._fetching[name] = task
            task.add_done_callback(lambda done: self._fetched(name, done))
        return task

    def _fetched(self, name: str, task: asyncio.Task[Image]) -> None:
        self._fetching.pop(name, None)
        if not task.cancelled():
            task.exception()  # whoever creates one with it is told

    async def capacity(self) -> Capacity:
        boxes = self.boxes
        ready = len(boxes.pool.ready)
        total, free = _memory()
        return Capacity(
            places=boxes.places.number,
            in_use=len(boxes.live),
            free=max(0, boxes.places.free),
            queued=boxes.places.waiting,
            warm={name: min(count, ready) for name, count in boxes.pool.wanted.items()},
            warm_total=ready,
            snapshots=len(boxes.snapshots.live),
            images=await boxes.engine.images(),
            cpus=os.cpu_count() or 1,
            memory_mb=total,
            memory_free_mb=free,
            load=round(os.getloadavg()[0], 2),
            draining=boxes.draining,
        )


def _state(task: asyncio.Task[Image]) -> str:
    if not task.done():
        return "fetching"
    error = None if task.cancelled() else task.exception()
    return "here" if error is None else str(error) if isinstance(error, SandboxError) else "failed"


def _memory() -> tuple[int, int]:
    """MiB of this node, and how many of them could be given out now."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    facts: Mapping[str, int] = {line.split(":")[0]: int(line.split()[1]) >> 10 for line in lines}
    return facts["MemTotal"], facts.get("MemAvailable", facts["MemFree"])
