"""The sandboxes of one server: made, found, kept alive, expired, removed.

What it is
    `Sandboxes` holds the boxes and decides: how many may exist (others wait their turn, `places.py`), when
    one expires (its clock starts anew with every use), what a repeated create means (same Idempotency-Key,
    same sandbox), what is promised (`adoption.py` writes it down), and how a server stops.

How to use it
    sandboxes = Sandboxes(config, engine); await sandboxes.start(); record = await sandboxes.create(request)

What it does not do
    No HTTP (`app.py`), no containers (`engines/`), no commands (`box.py`); `making.py` makes a sandbox,
    `branching.py` snapshots and forks.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Coroutine, Sequence
from typing import Any, Literal

from orchestrator.schema import Runtime
from runtime_server import wire
from runtime_server.adoption import Ledger
from runtime_server.births import Birth, Births, new_id
from runtime_server.box import DELETED, Box
from runtime_server.capabilities import capabilities as told
from runtime_server.engines import Engine
from runtime_server.errors import NotFound, SandboxError, Unavailable
from runtime_server.making import Basis, Maker
from runtime_server.metrics import Census, Metrics
from runtime_server.places import Places, Ticket
from runtime_server.pool import Pool
from runtime_server.quotas import Quotas
from runtime_server.removal import Remover
from runtime_server.snapshots import Snapshots
from runtime_server.wire import Code

DEAD_KEPT = 1000  # records of sandboxes that ended by themselves, so that calls learn why
REAP_EVERY_S = 0.5


class Sandboxes:
    """See the module's docstring. Lives in one event loop."""

    def __init__(self, config: Runtime, engine: Engine) -> None:
        self.config, self.engine = config, engine
        self.boxes: dict[str, Box] = {}
        self.births = Births()
        self.places = Places(config.max_parallel_sandboxes)
        self.snapshots = Snapshots(engine, float(config.sandbox.ttl))
        self.metrics = Metrics(self.census)
        self.quotas = Quotas(config.max_per_run, self.runs)
        self.draining = False
        self.starts = asyncio.Semaphore(config.max_parallel_creates)
        self.remover = Remover(engine, self.starts, self.background)
        self.maker = Maker(config, engine, self.starts, self.remover, self.metrics.creating)
        self.pool = Pool(self.maker.spare, self.maker.undo, lambda: self.places.free, config.warm)
        self.ledger = Ledger(self)
        self._work: set[asyncio.Task[None]] = set()
        self._reaper: asyncio.Task[None] | None = None

    @property
    def live(self) -> list[Box]:
        return [box for box in self.boxes.values() if not box.reason]

    @property
    def state(self) -> Literal["ok", "draining"]:
        return "draining" if self.draining else "ok"

    def runs(self) -> Counter[str]:
        """Sandboxes that live or come into being, by the run that they are for."""
        labels = [*(box.labels for box in self.live), *(birth.request.labels for birth in self._unborn)]
        return Counter(each.get(wire.RUN_LABEL, "") for each in labels)

    @property
    def _unborn(self) -> Sequence[Birth]:
        return [birth for birth in self.births.unborn if birth.id not in self.boxes]

    def census(self) -> Census:
        """What there is now, for the metrics."""
        states = Counter({"running": 0, "paused": 0, "queued": 0, "starting": 0})
        states.update("paused" if box.paused else "running" for box in self.live)
        states.update("queued" if b.ticket.waiting else "starting" for b in self._unborn)
        return Census(
            states=states,
            places=self.places.number,
            in_use=len(self.live),
            queued=self.places.waiting,
            warm=len(self.pool.ready),
            runs=self.runs(),
        )

    # --- life of the server ---

    async def start(self) -> None:
        """With what an earlier server of this job left. EngineError; NotFound without a default image."""
        if self._reaper is not None:
            return
        await self.engine.start()
        try:
            await self.engine.image(self.config.sandbox.image)
            await self.ledger.take_over()
        except BaseException:  # whatever it was: what has been started must stop
            await self.engine.stop()
            raise
        if self.engine.facts.dresses:
            self.maker.pool = self.pool
            self.pool.start()
        self._reaper = asyncio.create_task(self._reap())

    async def drain(self, timeout_s: float) -> None:
        """Refuse new work at once; running commands have `timeout_s` to end."""
        self.draining = True
        self.places.close(self.refusal())
        deadline = time.monotonic() + timeout_s
        # rare, whereas an event would be a burden of every command
        while any(box.busy for box in self.live) and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.05)

    async def stop(self) -> None:
        """End and remove everything. The engine removes all containers at once, faster than one by one."""
        self.draining = True
        self.places.close(self.refusal())
        reaper, self._reaper = self._reaper, None
        if reaper is None:
            return
        reaper.cancel()
        await self.pool.stop()
        await self.births.stop()
        for box in self.live:
            box.end(Code.SERVER_DRAINING)
            box.finished = True
            await box.agent.close()
        self.ledger.close()
        await self.engine.stop()
        for work in self._work:
            work.cancel()
        await asyncio.gather(reaper, *self._work, return_exceptions=True)

    def refusal(self) -> Unavailable:
        return Unavailable("the server is stopping and takes no new work", Code.SERVER_DRAINING)

    def check_open(self) -> None:
        if self.draining:
            raise self.refusal()

    # --- what clients ask for ---

    async def create(self, request: wire.CreateSandbox, key: str | None = None) -> wire.Sandbox:
        """A new sandbox, once a place is free, or a promise of one when `wait_s` is over before.

        With a key that was used before: the sandbox of then.
        """
        self.check_open()
        birth = self.births.known(key, request)
        if birth is None:
            wait_s = self.patience(request.queue_timeout_s) if request.wait_s is None else request.wait_s
            async with self.quotas.admitted(request.labels, wait_s):
                birth = self.births.known(key, request) or await self.conceive(request, key)
        if isinstance(birth, wire.Sandbox):
            return birth
        return await self.outcome(birth, request.wait_s, mine=key is None)

    async def conceive(
        self,
        request: wire.CreateSandbox,
        key: str | None = None,
        ticket: Ticket | None = None,
        identity: str = "",
    ) -> Birth:
        """Begin to make one. `ticket`: of a place that is ours already; `identity`: the one promised."""
        self.maker.check(request.limits, request.network)
        with self.metrics.creating("image"):
            image = await self.engine.image(request.image or self.config.sandbox.image)
        basis = Basis(image)
        if request.snapshot:
            snapshot = self.snapshots.get(request.snapshot)
            basis = Basis(snapshot.base, snapshot)
        if isinstance(earlier := self.births.known(key, request), Birth):  # begun while the image was fetched
            return earlier
        if ticket is None:
            ticket = self.places.enter(1, request.group or "", request.group_size or 1)
        birth = Birth(request, basis.image.name, ticket, key or "", identity or new_id())
        self.births.begin(birth, self._create(birth, basis))
        birth.task.add_done_callback(lambda _: self.quotas.changed())
        return birth

    async def outcome(self, birth: Birth, wait_s: float | None = None, mine: bool = False) -> wire.Sandbox:
        """What came of a create, or how far it is. `mine`: nobody can ask for it again, so a caller that
        leaves takes it along."""
        try:
            await asyncio.wait({birth.task}, timeout=wait_s)
        except asyncio.CancelledError:
            if mine:
                birth.task.cancel()
            raise
        if not birth.task.done():
            await self.ledger.promised(birth)
            return self.births.record(birth, self.places)
        if birth.task.cancelled():
            raise self.refusal()
        box = birth.task.result()
        box.used = time.monotonic()
        return box.record()

    def get(self, identity: str) -> Box:
        """NotFound for an id that is not known (any more), Unavailable for one that is not ready."""
        if (box := self.boxes.get(identity)) is not None:
            return box
        if (birth := self.births.get(identity)) is not None:
            raise birth.unready()
        raise NotFound(
            f"there is no sandbox {identity!r}; GET /v1/sandboxes lists them", Code.SANDBOX_NOT_FOUND
        )

    def record(self, identity: str) -> wire.Sandbox:
        """Also of one that waits for its place, or failed before it ran."""
        if identity not in self.boxes and (birth := self.births.get(identity)) is not None:
            return self.births.record(birth, self.places)
        return self.get(identity).record()

    def usable(self, identity: str) -> Box:
        """One that can take work now; raises what became of it otherwise."""
        self.check_open()
        box = self.get(identity)
        box.check()
        return box

    def list(self) -> wire.SandboxList:
        records = [box.record() for box in self.boxes.values()]
        unborn = [self.births.record(birth, self.places) for birth in self.births.promised]
        return wire.SandboxList(sandboxes=records + unborn, queued=self.places.waiting)

    async def renew(self, identity: str, ttl_s: float) -> wire.Sandbox:
        box = self.usable(identity)
        box.ttl_s, box.used = ttl_s, time.monotonic()
        await self.ledger.changed(box)
        return box.record()

    async def pause(self, identity: str) -> wire.Sandbox:
        box = self.usable(identity)
        await box.pause(self.engine)
        await self.ledger.changed(box)
        return box.record()

    async def resume(self, identity: str) -> wire.Sandbox:
        box = self.usable(identity)
        await box.resume(self.engine)
        await self.ledger.changed(box)
        return box.record()

    async def capabilities(self, version: str) -> wire.Capabilities:
        return await told(self.config, self.engine, version)

    async def delete(self, identity: str) -> None:
        """Answers once its processes are dead; the rest is removed in the background."""
        if identity not in self.boxes and (birth := self.births.get(identity)) is not None:
            self.births.forget(birth)
            birth.task.cancel()
            await asyncio.wait({birth.task})
            await self.ledger.over(identity)
            if identity not in self.boxes:
                return
        box = self.get(identity)
        self.boxes.pop(identity, None)
        box.end(DELETED)
        await self.ledger.over(identity)
        await self._finish(box)

    async def exec(self, identity: str, request: wire.Exec, key: str = "") -> wire.ExecResult:
        box = self.usable(identity)
        started = time.perf_counter()
        result = await box.exec(request, key)
        took = time.perf_counter() - started
        self.metrics.executed(took, result.duration_ms / 1000)
        return result

    # --- making one ---

    async def _create(self, birth: Birth, basis: Basis) -> Box:
        request, asked = birth.request, time.perf_counter()
        if basis.snapshot:
            self.snapshots.hold(basis.snapshot.id)
        try:
            await self.places.wait(birth.ticket, self.patience(request.queue_timeout_s))
        except BaseException:  # whatever it was, the snapshot is not needed any more
            await self._released(basis)
            raise
        taken = time.perf_counter()
        try:
            box = await self.maker.make(birth.id, request, basis)
            box.key, box.request = birth.key, birth.request
            self.boxes[box.id] = box
            await self.ledger.born(box)
        except BaseException:  # cancelled or failed: the place is the next one's
            if (made := self.boxes.pop(birth.id, None)) is not None:
                made.end(DELETED)
                await asyncio.shield(self._finish(made))
            else:
                self.places.give()
                await self._released(basis)
            raise
        self.metrics.queue_s.observe(taken - asked)
        self.metrics.create_phase["queue"].observe(taken - asked)
        self.metrics.create_s.observe(time.perf_counter() - taken)
        self.metrics.created.inc()
        self.background(self.watch(box))
        self.births.forget(birth)
        return box

    def patience(self, asked_s: float | None) -> float:
        """How long somebody waits for places."""
        return float(self.config.queue_timeout) if asked_s is None else asked_s

    async def _released(self, basis: Basis) -> None:
        if basis.snapshot:
            await asyncio.shield(self.snapshots.release(basis.snapshot.id))

    # --- ending one ---

    async def watch(self, box: Box) -> None:
        """Notices when the agent is gone: then the sandbox is dead, and calls say why."""
        try:
            await box.agent.wait_closed()
        finally:
            await box.close_network()
        if box.end(box.death()) or box.id in self.boxes:
            await self._finish(box)

    async def _finish(self, box: Box) -> None:
        """Kill, make room, and remove in the background. Once for each box."""
        if box.finished:
            return
        box.finished = True
        self.births.over(box)
        self.metrics.ended.labels(box.reason).inc()
        if box.id in self.boxes:  # or somebody has deleted it meanwhile
            await self.ledger.changed(box)
        with contextlib.suppress(SandboxError):  # a dead service is started again; the removal kills too
            await self.engine.kill(box.container)
        self.places.give(time.monotonic() - box.begun)
        self.quotas.changed()
        self.background(self._remove(box))
        self._bury()

    async def _remove(self, box: Box) -> None:
        await box.agent.close()
        await self.remover.now(box.id, box.container, box.io)
        await self.snapshots.release(box.snapshot)

    def _bury(self) -> None:
        """Forget the oldest of the dead when there are too many."""
        for identity in [box.id for box in self.boxes.values() if box.reason][:-DEAD_KEPT]:
            del self.boxes[identity]
            self.background(self.ledger.over(identity))

    async def _reap(self) -> None:
        while True:
            await asyncio.sleep(REAP_EVERY_S)
            for box in self.live:
                if min(box.expires_in, box.ends_in) <= 0 and box.end(Code.EXPIRED):
                    self.background(self._finish(box))
            for snapshot in self.snapshots.expired():
                self.background(self.ledger.snapshot_over(snapshot))
            await self.ledger.look()

    def background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._work.add(task)
        task.add_done_callback(self._work.discard)
