"""The engine `podman`: container lifecycle through the `podman` package, on a private API service.

What it is
    Two calls make a container (create, start) and one removes it; the bodies are `spec.create_body`'s. The
    first process's pid is read from the file that conmon writes, not asked for. Where the kernel can, a
    container starts with an empty root (`blank`) and is given its image's layers later (`dress`).
    `start` tries the OCI runtimes until one really starts a container (`Podman` cannot tell: crun refuses
    hybrid cgroups only then), and learns from that container what is enforced.

What it does not do
    No commands: `podman exec` costs a hundred times what the agent does and leaves two conmon behind.

How a container is ended
    Its first process gets SIGKILL from us, and its conmon is awaited; then the API call has nothing to wait
    for. (Podman's own kill polls every 100 ms.)
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.schema import Runtime
from runtime_server.agent import AgentConnection, AgentError, AgentListener, AgentLost
from runtime_server.engines import (
    SOCKET,
    Container,
    EngineError,
    Facts,
    Image,
    Recipe,
    leftovers,
    monitors,
    namespace,
    pausing,
    processes,
)
from runtime_server.engines import probe as probing
from runtime_server.engines.common import Grounded
from runtime_server.engines.layers import Frozen, writable
from runtime_server.engines.podman_api import Api
from runtime_server.engines.podman_images import Images
from runtime_server.engines.roots import Roots
from runtime_server.engines.service import Service, find_programs
from runtime_server.engines.spec import ROOT_WAYS, USER_WAYS, Node, Way, create_body
from runtime_server.engines.state import State, sweep
from runtime_server.engines.watch import EVERY_S, Watch
from runtime_server.errors import Gone, Internal, NotFound, SandboxError
from runtime_server.wire import Code

AGENT_S = 60.0
GONE_S = 10.0
HANG_UP_S = 1.0
TASKS_EACH = 64  # an ordinary user's sandboxes share one limit of processes and threads: on average so many


class PodmanEngine(Grounded):
    """See the module's docstring; implements `runtime_server.engines.Engine`."""

    def __init__(
        self, config: Runtime, agent: Path, image_store: Path | None, orphan_s: int = 60, claim: str = ""
    ) -> None:
        super().__init__(config, agent)
        self.image_store, self.claim = image_store, claim
        self._node = Node(agent, {}, orphan_s=orphan_s)
        self._api = Api(config.max_parallel_creates + 2, self._revive)
        self._images = Images(self._api, config.image_budget << 20, float(config.pull_timeout))
        self._restarting = asyncio.Lock()
        self._service: Service | None = None
        self._roots = Roots()
        self._watch: Watch | None = None
        self._leftovers: asyncio.Task[None] | None = None

    # --- life ---

    @property
    def journal(self) -> Path | None:
        """Where it is to be written down what a later server with the same claim has to know."""
        return self.state.journal if self.claim else None

    async def start(self) -> None:
        runtimes = find_programs()
        found = await asyncio.to_thread(State.claimed, self.config.state_dir, self.claim)
        if found is not None:  # one service at a time
            await asyncio.to_thread(processes.end_all, lambda: processes.services(found.token))
        await asyncio.to_thread(sweep, self.config.state_dir)
        self._state = found or State.create(self.config.state_dir, self.claim)
        try:
            await self._find_runtime(runtimes)
        except BaseException:  # whatever stops us, a half-started service must not stay
            await self.stop()
            raise

    async def stop(self) -> None:
        """Containers first, then the service, then every directory. Mounts end with their namespace."""
        if self._state is None:
            return
        state, self._state = self._state, None
        await asyncio.to_thread(pausing.thaw_all, state.cgroup)
        await asyncio.to_thread(processes.end_all, lambda: processes.inside(state.cgroup))
        if self._watch is not None:
            await asyncio.to_thread(self._watch.stop)
        await self._gauge.stop()
        await self._end_service()
        await asyncio.to_thread(state.remove)
        self._api.close()

    async def _end_service(self) -> None:
        service, self._service = self._service, None
        self._forget_leftovers()
        self._api.disconnect()
        await self._roots.stop()
        if service is not None:
            await service.stop()

    async def _find_runtime(self, runtimes: list[str]) -> None:
        """Start a probe with each runtime, with limits and without, until one works. Raises EngineError."""
        problems: list[str] = []
        ways = ROOT_WAYS if os.getuid() == 0 else USER_WAYS
        for runtime, way in [(name, way) for way in ways for name in runtimes]:
            try:
                self._facts = await self._try(runtime, way, tuple(problems))
                return
            except (SandboxError, AgentLost) as error:
                problems.append(f"{runtime}{'' if way.limits else ' without limits'}: {error}")
                await self._end_service()
        raise EngineError("no OCI runtime starts a container on this node: " + "; ".join(problems))

    async def _try(self, runtime: str, way: Way, notes: tuple[str, ...]) -> Facts:
        """Start the service with this runtime, and a probe container on it."""
        entry = await asyncio.to_thread(namespace.entry)
        self._service = Service(self.state, self.image_store, runtime)
        await self._service.start()
        self._api.connect(self.state.socket)
        driver = (await self._api.json("GET", "/info"))["store"]["graphDriverName"]
        notes = (*notes, *entry.notes, *namespace.storage_notes(self.state.graphroot))
        root = os.getuid() == 0
        cgroup = self.state.cgroup if root and way.limits else ""
        crowd = self.config.max_parallel_sandboxes * max(TASKS_EACH, self.config.sandbox.pids)
        ulimits = probing.ulimits(self._service.pid, probing.PIDS_MAX if root else crowd)
        self._node = replace(
            self._node,
            ulimits=ulimits,
            limits=way.limits,
            cgroup=cgroup,
            bound_sysv=way.bound_sysv,
            own_ids=entry.ids if way.own_users else 0,
            own_tasks=way.own_users and probing.tasks_by_namespace(),
            protect_agent=probing.may_protect(),
            seccomp="",
        )
        await self._roots.start(self.state, self._service.pid)
        await self._gauge.start(self.state.storage, self._service.pid)
        enforced, problem = await self._probe()
        self._roots.needed = not problem
        enforced["disk"] = self._gauge.works
        notes += (*self._look_after(enforced), *problem)
        version = probing.cgroup_version()
        return Facts("podman", runtime, driver, version, not root, enforced, notes, not problem)

    def _look_after(self, enforced: dict[str, bool]) -> tuple[str, ...]:
        """Where no cgroup holds memory and processes, somebody has to watch. Returns what to say about it."""
        lacking = tuple(name for name in ("memory", "pids") if not enforced[name])
        notes = () if enforced["cpus"] else ("no limit of CPUs: this user may not make cgroups here",)
        if not lacking:
            return notes
        self._watch = Watch(lacking)
        self._watch.start()
        enforced.update(dict.fromkeys(lacking, True))
        return (
            *notes,
            f"{' and '.join(lacking)}: watched {1 / EVERY_S:g} times a second, for no cgroup holds them here",
        )

    async def _probe(self) -> tuple[dict[str, bool], tuple[str, ...]]:
        """Start the agent in an empty root directory, and see what holds for it, and why it cannot be
        given another root, if it cannot."""
        recipe = Recipe(
            name=f"probe-{secrets.token_hex(4)}",
            image="",
            io=self.new_io("probe"),
            memory_mb=self.config.sandbox.memory,
            cpus=self.config.sandbox.cpus,
            pids=self.config.sandbox.pids,
            shm_mb=self.config.sandbox.shm,
        )
        listener = AgentListener(recipe.io / SOCKET)
        (self.state.probe / "new").mkdir(parents=True, exist_ok=True)
        container = None
        try:
            await listener.start()
            container = await self.create(recipe, self.state.probe)
            agent = await listener.accept(container.pid, AGENT_S)
            enforced = probing.read_back(container.pid, recipe)
            self._node = replace(self._node, seccomp=probing.compiled_seccomp(self.state.oci / container.id))
            problem = await self._try_dress(container, agent, recipe)
            await agent.close()
            return enforced, problem
        finally:
            await listener.close()
            if container is not None:
                await self.kill(container)
                await self.remove(container, recipe.io)
            shutil.rmtree(self.state.probe, ignore_errors=True)

    async def _try_dress(
        self, container: Container, agent: AgentConnection, recipe: Recipe
    ) -> tuple[str, ...]:
        """Give the probe another empty root, and have it find a directory there. Says why not."""
        try:
            lower = self.state.blank / "new"
            found = await self.dress(container, replace(recipe, layers=(str(lower),), workdir="/found"))
            await agent.write_file("/found/here", b"x", parents=False)
            await self.discard(found.layer or lower)
            return ()
        except (SandboxError, AgentError, OSError) as error:
            return (f"sandboxes start slowly and cannot be forked: no root can be changed here ({error})",)

    # --- images ---

    async def images(self) -> list[str]:
        return await self._images.names()

    async def image(self, name: str) -> Image:
        return await self._images.image(name)

    # --- containers ---

    async def create(self, recipe: Recipe, rootfs: Path | None = None) -> Container:
        body, identity = json.dumps(create_body(recipe, self._node, rootfs)), recipe.name
        try:
            identity = str((await self._api.json("POST", "/containers/create", data=body, busy=True))["Id"])
            return await self._begun(identity, recipe, rootfs)
        except BaseException as error:  # cancelled or failed, and it may have been made all the same
            with contextlib.suppress(SandboxError):  # whoever wanted it tries that again
                await asyncio.shield(self._delete(identity))
            if isinstance(error, NotFound) and error.code != Code.IMAGE_MISSING:
                raise Internal(f"the new container is gone: {error}", Code.CREATE_FAILED) from error
            raise

    async def _begun(self, identity: str, recipe: Recipe, rootfs: Path | None) -> Container:
        await self._api.call("POST", f"/containers/{identity}/start", busy=True)
        pid = await self._pid(identity)
        upper = None if rootfs else writable((await self._inspect(identity)).get("GraphDriver"))
        limits = recipe.memory_mb, recipe.pids, recipe.disk_mb
        container = self._watched(Container(identity, pid, None, None, None, *limits))
        return replace(container, usage=self._gauge.add(upper, pid, recipe.disk_mb))

    def _watched(self, container: Container) -> Container:
        """With whoever counts its memory."""
        pid, watched = container.pid, None
        if self._watch is not None:
            watched = self._watch.add(pid, container.memory_mb << 20, container.pids)
        return replace(container, memory=probing.own_cgroup(pid, "memory"), watched=watched)

    async def blank(self, recipe: Recipe) -> Container:
        return await self.create(recipe, self.state.blank)

    async def dress(self, container: Container, recipe: Recipe) -> Container:
        helpers, name = await self._roots.helpers(), self._layer(container).name
        layer = await helpers.dress(container.pid, name, recipe.layers, recipe.workdir or "/")
        self._images.hold(recipe.image)
        usage = self._gauge.add(layer, container.pid, recipe.disk_mb)
        return replace(container, layer=layer, image=recipe.image, disk_mb=recipe.disk_mb, usage=usage)

    def _layer(self, container: Container) -> Path:
        """What it writes to once it is dressed; it may be there also where that has failed."""
        return container.layer or self.state.layers / container.id[:16]

    async def freeze(self, container: Container, name: str) -> Frozen:
        if container.layer is None:
            raise Internal("this sandbox has no layer of its own that could be copied", Code.CREATE_FAILED)
        helpers = await self._roots.helpers()
        try:
            return await helpers.freeze(container.layer, name)
        except BaseException:  # cancelled or failed: half a copy, or one that nobody knows of
            await asyncio.shield(self.discard(self.state.frozen / name))
            raise

    async def discard(self, frozen: Path) -> None:
        await self._roots.discard(frozen)

    async def adopt(self, container: Container) -> Container:
        if not monitors.is_of(self.state, container.id, container.pid):
            raise Gone("its first process has ended", Code.EVICTED)
        self._images.hold(container.image)
        usage = self._gauge.add(container.layer, container.pid, container.disk_mb)
        return replace(self._watched(container), usage=usage)

    async def remove_others(self, containers: set[str], frozen: set[Path]) -> None:
        rows = await self._api.json("GET", "/containers/json", params={"all": True})
        for identity in {str(row["Id"]) for row in rows} - containers:
            await self.kill(Container(identity, await self._pid(identity)))
            await self._delete(identity)
        names = {str(name) for row in rows if str(row["Id"]) in containers for name in row["Names"]}
        for folder in self.state.io.iterdir():  # each has the name of its container
            if folder.name not in names:
                shutil.rmtree(folder, ignore_errors=True)
        await asyncio.to_thread(monitors.end_others, self.state, containers)
        used = {identity[:16] for identity in containers}
        layers = [folder for folder in self.state.layers.iterdir() if folder.name not in used]
        for folder in [*layers, *(set(self.state.frozen.iterdir()) - frozen)]:
            await self.discard(folder)

    async def kill(self, container: Container) -> None:
        if self._watch and container.watched:
            self._watch.drop(container.watched)
        self._gauge.drop(container.usage)
        conmon = monitors.pid_of(self.state, container.id)
        if monitors.is_of(self.state, container.id, container.pid):
            pausing.thaw_of(container.pid)
            processes.send(container.pid)
            await processes.wait_gone(container.pid, GONE_S)
        if conmon:
            await processes.wait_gone(conmon, GONE_S)
        else:
            monitors.tell_end(self.state, container.id)

    async def remove(self, container: Container, io: Path) -> None:
        await self._delete(container.id if container.pid else await self._identity(container.id))
        await asyncio.to_thread(shutil.rmtree, io, ignore_errors=True)
        if (layer := self._layer(container)).exists():
            await (await self._roots.helpers()).remove(layer)
        if container.layer is not None:
            self._images.release(container.image)

    async def _delete(self, identity: str) -> None:
        params = {"force": True, "timeout": 0, "v": False}
        with contextlib.suppress(NotFound):
            await self._api.call("DELETE", f"/containers/{identity}", params=params, busy=True)
        monitors.forget_end(self.state, identity)
        if self._node.cgroup:  # a runtime that was killed in the middle of a start does not come back to it
            processes.remove_cgroups(f"{self._node.cgroup}/libpod-{identity}")

    async def _identity(self, name: str) -> str:
        """Of one that was not acknowledged; its name where there is none."""
        with contextlib.suppress(NotFound):
            return str((await self._inspect(name))["Id"])
        return name

    async def _identities(self) -> set[str]:
        """Of all containers that Podman knows."""
        rows = await self._api.json("GET", "/containers/json", params={"all": True})
        return {str(row["Id"]) for row in rows or []}

    async def _inspect(self, identity: str) -> Any:
        return await self._api.json("GET", f"/containers/{identity}/json")

    async def _pid(self, identity: str) -> int:
        if pid := monitors.first_process(self.state, identity):
            return pid
        return int((await self._inspect(identity))["State"]["Pid"])

    async def _revive(self) -> bool:
        """Start the service again when it has died. False when it is not the service's death."""
        async with self._restarting:
            if self._service is None or self._state is None:
                return False
            # a killed process hangs up a moment before it is seen to be gone
            seen = time.monotonic() + HANG_UP_S
            while self._service.alive:
                if time.monotonic() > seen:
                    return False
                await asyncio.sleep(0.01)
            try:
                await self._service.start()
            except EngineError:
                return False
            await self._roots.start(self._state, self._service.pid)
            self._forget_leftovers()
            self._leftovers = asyncio.create_task(
                leftovers.remove(self._state, self._node.cgroup, self._identities)
            )
            return True

    def _forget_leftovers(self) -> None:
        if self._leftovers is not None:
            self._leftovers.cancel()
