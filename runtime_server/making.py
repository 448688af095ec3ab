"""How a sandbox comes to be: a warm container that is given its root, a new one, or Podman's own way.

What it is
    `Maker.make` takes the cheapest way that works: a container from the pool, else an empty one made
    for it, and its root directory from the image's layers or a snapshot's; where the node or the image does
    not allow that, a container as the engine makes it. Then the commands of `setup`. What fails on the way
    leaves nothing behind.

What it does not do
    It waits for no place and keeps no list (`sandboxes.py`).
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from orchestrator.schema import Runtime
from runtime_server import egress, wire
from runtime_server.agent import AgentListener, AgentLost
from runtime_server.box import Box
from runtime_server.engines import SOCKET, Container, Engine, Image, Recipe
from runtime_server.errors import BadRequest, Internal, SandboxError
from runtime_server.pool import Pool, Warm
from runtime_server.removal import Remover
from runtime_server.snapshots import Snapshot
from runtime_server.wire import Code

AGENT_S = 30.0
SETUP_S = 600.0
SAID_MAX = 2000
# what Podman gives to every container that it makes from an image, and an empty one lacks
ENVIRONMENT = {"HOME": "/root", "TERM": "xterm", "container": "podman"}


@dataclass(frozen=True)
class Basis:
    """What a sandbox begins with: an image, or a snapshot with what its source was given."""

    image: Image
    snapshot: Snapshot | None = None

    @property
    def layers(self) -> tuple[str, ...]:
        return self.snapshot.layers if self.snapshot else self.image.layers

    @property
    def env(self) -> Mapping[str, str]:
        return self.snapshot.env if self.snapshot else {}

    @property
    def workdir(self) -> str:
        return self.snapshot.workdir if self.snapshot else self.image.workdir


class Maker:
    """See the module's docstring. `starts` limits how many containers are made or removed at once."""

    def __init__(
        self,
        config: Runtime,
        engine: Engine,
        starts: asyncio.Semaphore,
        remover: Remover,
        phase: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        self.config, self.engine, self.starts, self.phase = config, engine, starts, phase
        self.remover = remover
        self.pool: Pool | None = None

    async def make(self, identity: str, request: wire.CreateSandbox, basis: Basis) -> Box:
        recipe = self.recipe(request, basis)
        warm, dressed = await self._warm(recipe, only=basis.snapshot is not None)
        box = self._box(identity, request, basis, dressed, warm)
        try:
            await box.open_network()
            with self.phase("setup"):
                await self._set_up(box, request.setup)
        except BaseException:  # cancelled or failed: nothing of it may stay
            await asyncio.shield(box.close_network())
            await asyncio.shield(self.undo(Warm(dressed, warm.agent, warm.io, recipe)))
            raise
        return box

    async def _warm(self, recipe: Recipe, *, only: bool) -> tuple[Warm, Container]:
        """A container with its agent, and the same with its root. `only` layers make it, no image."""
        if not (self.engine.facts.dresses and recipe.layers and recipe.as_root):
            with self.phase("container"):
                warm = await self.start(recipe, empty=False)
            return warm, warm.container
        with self.phase("container"):
            warm = (self.pool.take(recipe) if self.pool else None) or await self.start(recipe, empty=True)
        try:
            with self.phase("root"):
                return warm, await self.engine.dress(warm.container, recipe)
        except BaseException as error:  # cancelled or failed: nothing of it may stay
            await asyncio.shield(self.undo(warm))
            if not isinstance(error, SandboxError) or only:
                raise
        # an image with a link where a mount belongs, or whatever else only Podman can do
        warm = await self.start(recipe, empty=False)
        return warm, warm.container

    async def spare(self) -> Warm:
        """One for the pool, of the default limits."""
        nothing = Image("", "", "/")
        return await self.start(self.recipe(wire.CreateSandbox(), Basis(nothing)), empty=True)

    async def start(self, recipe: Recipe, *, empty: bool) -> Warm:
        """A new container whose agent has come."""
        async with self.starts:
            name = f"c-{secrets.token_hex(4)}"
            recipe = replace(recipe, name=name, io=self.engine.new_io(name))
            listener = AgentListener(recipe.io / SOCKET)
            container: Container | None = None
            try:
                await listener.start()
                container = await (self.engine.blank if empty else self.engine.create)(recipe)
                return Warm(container, await listener.accept(container.pid, AGENT_S), recipe.io, recipe)
            except BaseException as error:  # cancelled or failed: nothing of it may stay
                await asyncio.shield(self._undo(container, recipe, listener))
                if isinstance(error, AgentLost):
                    raise Internal(f"the sandbox did not start: {error}", Code.CREATE_FAILED) from error
                raise

    async def undo(self, warm: Warm) -> None:
        await warm.agent.close()
        await self.remover.soon(warm.io.name, warm.container, warm.io)

    async def _undo(self, container: Container | None, recipe: Recipe, listener: AgentListener) -> None:
        """Without a container there may be one all the same, whose engine could not say so any more."""
        await listener.close()
        await self.remover.soon(recipe.name, container or Container(recipe.name, 0), recipe.io)

    async def _set_up(self, box: Box, commands: list[str]) -> None:
        for command in commands:
            done = await box.exec(wire.Exec(command=command, timeout_s=SETUP_S))
            if not done.ok:
                said = (done.stderr.text or done.stdout.text).strip()[-SAID_MAX:]
                raise BadRequest(
                    f"the setup command {command[:200]!r} ended with {done.exit_code}: {said}",
                    Code.CREATE_FAILED,
                )

    def check(self, limits: wire.Limits, network: wire.Network) -> None:
        """BadRequest for more than this node has, and for hosts that cannot be allowed."""
        egress.rules(network)
        cpus = os.cpu_count() or 1
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
        if (limits.cpus or 0) > cpus or (limits.memory_mb or 0) > memory:
            raise BadRequest(
                f"this node has {cpus} CPUs and {memory} MiB of memory; ask for no more than that"
            )

    def recipe(self, request: wire.CreateSandbox, basis: Basis) -> Recipe:
        """Its name and directory come later, for a warm container has its own."""
        limits, defaults, given = request.limits, self.config.sandbox, basis.snapshot
        return Recipe(
            name="",
            image=basis.image.id,
            io=Path(),
            env={**basis.env, **(egress.ENVIRONMENT if request.network.allow else {}), **request.env},
            workdir=request.workdir or basis.workdir,
            as_root=basis.image.as_root,
            cpus=limits.cpus or (given.cpus if given else defaults.cpus),
            memory_mb=limits.memory_mb or (given.memory_mb if given else defaults.memory),
            pids=limits.pids or (given.pids if given else defaults.pids),
            shm_mb=defaults.shm,
            disk_mb=limits.disk_mb or defaults.disk,
            layers=basis.layers,
            allow=tuple(request.network.allow),
        )

    def _box(
        self,
        identity: str,
        request: wire.CreateSandbox,
        basis: Basis,
        container: Container,
        warm: Warm,
    ) -> Box:
        recipe = self.recipe(request, basis)
        if container.layer is not None:
            own = {**ENVIRONMENT, **basis.image.env} if basis.image.env else ENVIRONMENT
            warm.agent.environment = {**own, **recipe.env}
        limit = request.max_lifetime_s or float(self.config.max_lifetime)
        return Box(
            id=identity,
            image=basis.image.name,
            workdir=recipe.workdir or "/",
            labels=dict(request.labels),
            ttl_s=request.ttl_s or float(self.config.sandbox.ttl),
            container=container,
            agent=warm.agent,
            io=warm.io,
            defaults=self.config.sandbox,
            recipe=recipe,
            base=basis.image,
            snapshot=basis.snapshot.id if basis.snapshot else "",
            max_lifetime_s=limit or None,
        )
