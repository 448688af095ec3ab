"""The sandboxes of one server: made, found, kept alive, expired, removed.

What it is
    `Sandboxes` holds the boxes and decides: how many may exist (others wait their turn), how many
    containers are made or removed at once, when one expires (its clock starts anew with every use), what a
    repeated create means (same Idempotency-Key, same sandbox), and how a server stops.

How to use it
    sandboxes = Sandboxes(config, engine); await sandboxes.start(); record = await sandboxes.create(request)

What it does not do
    No HTTP (`app.py`), no containers (`engines/`), no commands (`box.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import time
from collections.abc import Coroutine
from typing import Any, Literal

from orchestrator.schema import Runtime
from runtime_server import wire
from runtime_server.agent import AgentListener, AgentLost
from runtime_server.box import DELETED, Box
from runtime_server.engines import SOCKET, Container, Engine, Image, Recipe
from runtime_server.errors import BadRequest, Internal, NotFound, SandboxError, Unavailable
from runtime_server.metrics import Metrics
from runtime_server.places import Places
from runtime_server.wire import Code

AGENT_S = 30.0
DEAD_KEPT = 1000  # records of sandboxes that ended by themselves, so that calls learn why
KEYS_KEPT = 10_000
REAP_EVERY_S = 0.5


class Sandboxes:
    """See the module's docstring. Lives in one event loop."""

    def __init__(self, config: Runtime, engine: Engine) -> None:
        self.config, self.engine = config, engine
        self.boxes: dict[str, Box] = {}
        self.places = Places(config.max_parallel_sandboxes)
        self.metrics = Metrics(lambda: float(len(self.live)), lambda: float(self.places.waiting))
        self.draining = False
        self._starts = asyncio.Semaphore(config.max_parallel_creates)
        self._keys: dict[str, tuple[wire.CreateSandbox, asyncio.Task[Box]]] = {}
        self._creating: set[asyncio.Task[Box]] = set()
        self._work: set[asyncio.Task[None]] = set()
        self._reaper: asyncio.Task[None] | None = None

    @property
    def live(self) -> list[Box]:
        return [box for box in self.boxes.values() if not box.reason]

    @property
    def state(self) -> Literal["ok", "draining"]:
        return "draining" if self.draining else "ok"

    # --- life of the server ---

    async def start(self) -> None:
        """Starts the engine, and looks whether the default image is there. EngineError, NotFound."""
        if self._reaper is not None:
            return
        await self.engine.start()
        try:
            await self.engine.image(self.config.sandbox.image)
        except BaseException:  # whatever it was: what has been started must stop
            await self.engine.stop()
            raise
        self._reaper = asyncio.create_task(self._reap())

    async def drain(self, timeout_s: float) -> None:
        """Refuse new work at once; running commands have `timeout_s` to end."""
        self.draining = True
        self.places.close(self._refusal())
        deadline = time.monotonic() + timeout_s
        # rare, whereas an event would be a burden of every command
        while any(box.busy for box in self.live) and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.05)

    async def stop(self) -> None:
        """End and remove everything. The engine removes all containers at once, faster than one by one."""
        self.draining = True
        self.places.close(self._refusal())
        reaper, self._reaper = self._reaper, None
        if reaper is None:
            return
        reaper.cancel()
        creating = [*self._creating]
        for task in creating:
            task.cancel()
        await asyncio.gather(*creating, return_exceptions=True)
        for box in self.live:
            box.end(Code.SERVER_DRAINING)
            box.finished = True
            await box.agent.close()
        await self.engine.stop()
        for work in self._work:
            work.cancel()
        await asyncio.gather(reaper, *self._work, return_exceptions=True)

    def _refusal(self) -> Unavailable:
        return Unavailable("the server is stopping and takes no new work", Code.SERVER_DRAINING)

    # --- what clients ask for ---

    async def create(self, request: wire.CreateSandbox, key: str | None = None) -> wire.Sandbox:
        """A new sandbox, once a place is free. With a key that was used before: the sandbox of then."""
        if self.draining:
            raise self._refusal()
        if key is None:
            return await self._unkeyed(request)
        box = await self._once(key, request)
        box.used = time.monotonic()
        return box.record()

    def get(self, identity: str) -> Box:
        """NotFound for an id that is not known (any more)."""
        try:
            return self.boxes[identity]
        except KeyError:
            raise NotFound(
                f"there is no sandbox {identity!r}; GET /v1/sandboxes lists them", Code.SANDBOX_NOT_FOUND
            ) from None

    def usable(self, identity: str) -> Box:
        """One that can take work now; raises what became of it otherwise."""
        if self.draining:
            raise self._refusal()
        box = self.get(identity)
        if box.reason:
            raise box.gone()
        return box

    def list(self) -> wire.SandboxList:
        return wire.SandboxList(
            sandboxes=[box.record() for box in self.boxes.values()], queued=self.places.waiting
        )

    def renew(self, identity: str, ttl_s: float) -> wire.Sandbox:
        box = self.usable(identity)
        box.ttl_s, box.used = ttl_s, time.monotonic()
        return box.record()

    async def delete(self, identity: str) -> None:
        """Answers once its processes are dead; the rest is removed in the background."""
        box = self.get(identity)
        self.boxes.pop(identity, None)
        if box.end(DELETED):
            await self._finish(box)

    async def exec(self, identity: str, request: wire.Exec) -> wire.ExecResult:
        box = self.usable(identity)
        started = time.perf_counter()
        result = await box.exec(request)
        took = time.perf_counter() - started
        self.metrics.exec_s.observe(took)
        self.metrics.overhead_s.observe(max(0.0, took - result.duration_ms / 1000))
        return result

    async def capabilities(self, version: str) -> wire.Capabilities:
        facts, limits = self.engine.facts, self.config.sandbox
        return wire.Capabilities(
            version=version,
            engine=facts.engine,
            oci_runtime=facts.oci_runtime,
            storage_driver=facts.storage_driver,
            cgroup_version=facts.cgroup_version,
            rootless=facts.rootless,
            enforced=dict(facts.enforced),
            max_sandboxes=self.config.max_parallel_sandboxes,
            default_image=limits.image,
            images=await self.engine.images(),
            limits={
                "cpus": limits.cpus,
                "memory_mb": limits.memory,
                "pids": limits.pids,
                "shm_mb": limits.shm,
                "ttl_s": limits.ttl,
                "command_timeout_s": limits.command_timeout,
                "max_output": limits.max_output,
            },
            features=["exec", "files", "idempotent-create", "queue", "renew"],
            notes=[*facts.notes],
        )

    # --- making one ---

    async def _unkeyed(self, request: wire.CreateSandbox) -> wire.Sandbox:
        """Nobody can ask for it again, so a caller that leaves takes it along."""
        task = self._begin(request)
        try:
            return (await self._outcome(task)).record()
        except asyncio.CancelledError:
            task.cancel()
            raise

    def _begin(self, request: wire.CreateSandbox) -> asyncio.Task[Box]:
        task = asyncio.create_task(self._create(request))
        self._creating.add(task)
        task.add_done_callback(self._creating.discard)
        return task

    async def _once(self, key: str, request: wire.CreateSandbox) -> Box:
        """One create for each key, however often it is asked; a failed one may be tried again."""
        known = self._keys.get(key)
        if known is None or _failed(known[1]):
            known = (request, self._begin(request))
            self._keys[key] = known
            if len(self._keys) > KEYS_KEPT:
                self._forget_keys()
        if known[0] != request:
            raise BadRequest(f"the Idempotency-Key {key[:40]!r} was used for another request; take a new one")
        return await self._outcome(known[1])

    async def _outcome(self, task: asyncio.Task[Box]) -> Box:
        """What came of a create. Only `stop` cancels one that somebody waits for."""
        await asyncio.wait({task})
        if task.cancelled():
            raise self._refusal()
        return task.result()

    def _forget_keys(self) -> None:
        """Of creates that are over and whose sandbox is gone."""
        for key, (_, task) in [*self._keys.items()]:
            if task.done() and (_failed(task) or task.result().reason):
                del self._keys[key]

    async def _create(self, request: wire.CreateSandbox) -> Box:
        self._check(request.limits)
        image = await self.engine.image(request.image or self.config.sandbox.image)
        asked = time.perf_counter()
        wait_s = self.config.queue_timeout if request.queue_timeout_s is None else request.queue_timeout_s
        await self.places.take(wait_s)
        try:
            async with self._starts:
                taken = time.perf_counter()
                box = await self._start(request, image)
        except BaseException:  # cancelled or failed: the place is the next one's
            self.places.give()
            raise
        self.metrics.queue_s.observe(taken - asked)
        self.metrics.create_s.observe(time.perf_counter() - taken)
        self.metrics.created.inc()
        self.boxes[box.id] = box
        self._background(self._watch(box))
        return box

    async def _start(self, request: wire.CreateSandbox, image: Image) -> Box:
        identity = f"s-{secrets.token_hex(4)}"
        recipe = self._recipe(identity, request, image)
        listener = AgentListener(recipe.io / SOCKET)
        container: Container | None = None
        try:
            await listener.start()
            container = await self.engine.create(recipe)
            agent = await listener.accept(container.pid, AGENT_S)
        except BaseException as error:  # cancelled or failed: nothing of it may stay
            await asyncio.shield(self._undo(container, recipe, listener))
            if isinstance(error, AgentLost):
                raise Internal(f"the sandbox did not start: {error}", Code.CREATE_FAILED) from error
            raise
        return Box(
            id=identity,
            image=image.name,
            workdir=recipe.workdir or "/",
            labels=request.labels,
            ttl_s=request.ttl_s or float(self.config.sandbox.ttl),
            container=container,
            agent=agent,
            io=recipe.io,
            defaults=self.config.sandbox,
        )

    async def _undo(self, container: Container | None, recipe: Recipe, listener: AgentListener) -> None:
        await listener.close()
        if container is not None:
            with contextlib.suppress(SandboxError):
                await self.engine.kill(container)
                await self.engine.remove(container, recipe.io)

    def _recipe(self, identity: str, request: wire.CreateSandbox, image: Image) -> Recipe:
        limits, defaults = request.limits, self.config.sandbox
        return Recipe(
            name=identity,
            image=image.id,
            io=self.engine.new_io(identity),
            env=request.env,
            workdir=request.workdir or image.workdir,
            as_root=image.as_root,
            cpus=limits.cpus or defaults.cpus,
            memory_mb=limits.memory_mb or defaults.memory,
            pids=limits.pids or defaults.pids,
            shm_mb=defaults.shm,
        )

    def _check(self, limits: wire.Limits) -> None:
        cpus = os.cpu_count() or 1
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
        if (limits.cpus or 0) > cpus or (limits.memory_mb or 0) > memory:
            raise BadRequest(
                f"this node has {cpus} CPUs and {memory} MiB of memory; ask for no more than that"
            )

    # --- ending one ---

    async def _watch(self, box: Box) -> None:
        """Notices when the agent is gone: then the sandbox is dead, and calls say why."""
        await box.agent.wait_closed()
        if box.end(box.death()) or box.id in self.boxes:
            await self._finish(box)

    async def _finish(self, box: Box) -> None:
        """Kill, make room, and remove in the background. Once for each box."""
        if box.finished:
            return
        box.finished = True
        self.metrics.ended.labels(box.reason).inc()
        with contextlib.suppress(SandboxError):  # a dead service is started again; the removal kills too
            await self.engine.kill(box.container)
        self.places.give()
        self._background(self._remove(box))
        self._bury()

    async def _remove(self, box: Box) -> None:
        await box.agent.close()
        async with self._starts:
            with contextlib.suppress(SandboxError):
                await self.engine.remove(box.container, box.io)

    def _bury(self) -> None:
        """Forget the oldest of the dead when there are too many."""
        dead = [box.id for box in self.boxes.values() if box.reason]
        for identity in dead[: max(0, len(dead) - DEAD_KEPT)]:
            del self.boxes[identity]

    async def _reap(self) -> None:
        while True:
            await asyncio.sleep(REAP_EVERY_S)
            for box in self.live:
                if box.expires_in <= 0 and box.end(Code.EXPIRED):
                    self._background(self._finish(box))

    def _background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._work.add(task)
        task.add_done_callback(self._work.discard)


def _failed(task: asyncio.Task[Box]) -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)
