"""Engines whose sandbox is a command line that this server starts, with the agent as its PID 1.

What it is
    What `process` and `apptainer` share: directories, starting the command and finding the agent below it,
    the watched limits, ending. Nothing has to be asked of a daemon, and nothing outlives the server: the
    launcher is told to die with it, and the agent ends when nobody comes back for it.

What it does not do
    No forks, no warm containers, no adoption after a restart: `facts.dresses` is False. No cgroups: memory,
    processes and disk are looked at (`watch.py`, `disk.py`), CPUs are not limited.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from orchestrator.schema import Runtime
from runtime_server.agent import AgentListener, AgentLost
from runtime_server.engines import SOCKET, Container, EngineError, Facts, Image, Recipe, pausing, processes
from runtime_server.engines import probe as probing
from runtime_server.engines.common import Grounded
from runtime_server.engines.layers import Frozen
from runtime_server.engines.state import State, sweep
from runtime_server.engines.watch import Watch
from runtime_server.errors import Gone, Internal, SandboxError
from runtime_server.wire import Code

AGENT_S, START_S, GONE_S = 60.0, 60.0, 10.0
LOOK_S = 0.005
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
KEPT = ("LANG", "LC_ALL", "TZ")  # of the server's own environment; never a key


class SpawnedEngine(Grounded, ABC):
    """See the module's docstring; implements `runtime_server.engines.Engine`."""

    name: str
    runtime: str = ""
    ways: tuple[str, ...] = ("",)  # to be tried in this order; `way` is the one that works
    confines = True  # whether it is to be refused where sandboxes would share the node's network

    def __init__(self, config: Runtime, agent: Path, orphan_s: int = 60) -> None:
        super().__init__(config, agent)
        self.orphan_s = orphan_s
        self._watch = Watch()
        self._launchers: dict[str, subprocess.Popen[bytes]] = {}
        self.way = self.ways[0]

    # --- what an engine has of its own ---

    @abstractmethod
    def command(self, recipe: Recipe, layer: Path) -> list[str]:
        """What starts the agent as PID 1 of a new process namespace, with `layer` as what it may write."""

    def environment(self, recipe: Recipe) -> dict[str, str]:
        """Of that command."""
        return {**{name: os.environ[name] for name in KEPT if name in os.environ}, "PATH": PATH, **recipe.env}

    @abstractmethod
    async def image(self, name: str) -> Image: ...

    @abstractmethod
    async def images(self) -> list[str]: ...

    async def prepare(self) -> tuple[str, ...]:
        """Before the probe. Notes about this node; EngineError when nothing can work."""
        return ()

    async def probe_image(self) -> str:
        """What the probe is made of."""
        return (await self.image(self.config.sandbox.image)).id

    # --- life ---

    @property
    def journal(self) -> Path | None:
        return None

    async def start(self) -> None:
        await asyncio.to_thread(sweep, self.config.state_dir)
        self._state = State.create(self.config.state_dir)
        try:
            notes = await self.prepare()
            self._watch.start()
            await self._gauge.start(self.state.storage, 0)
            self._facts = await self._find_way(notes)
        except BaseException:  # whatever it was: nothing half-started may stay
            await self.stop()
            raise

    async def stop(self) -> None:
        if self._state is None:
            return
        for launcher in [*self._launchers.values()]:
            await self._end(launcher)
        await asyncio.to_thread(self._watch.stop)
        await self._gauge.stop()
        state, self._state = self._state, None
        await asyncio.to_thread(state.remove)

    async def _find_way(self, notes: tuple[str, ...]) -> Facts:
        problems: list[str] = []
        for way in self.ways:
            self.way = way
            try:
                facts = await self._probe(notes)
            except EngineError as error:
                problems.append(str(error))
                continue
            if facts.enforced["network_isolation"] or not self.confines:
                return facts
            problems.append("sandboxes would have the network of this node")
        raise EngineError(
            f"the engine {self.name} starts no sandbox on this node: {'; '.join(dict.fromkeys(problems))}"
        )

    async def _probe(self, notes: tuple[str, ...]) -> Facts:
        """Start the agent once, and see what holds for it."""
        limits = self.config.sandbox
        recipe = Recipe(name="probe", image=await self.probe_image(), io=self.new_io("probe"))
        recipe = replace(
            recipe, memory_mb=limits.memory, cpus=limits.cpus, pids=limits.pids, shm_mb=limits.shm
        )
        listener = AgentListener(recipe.io / SOCKET)
        container: Container | None = None
        try:
            await listener.start()
            container = await self.create(recipe)
            agent = await listener.accept(container.pid, AGENT_S)
            enforced = probing.read_back(container.pid, recipe)
            await agent.close()
        except (SandboxError, AgentLost) as error:
            raise EngineError(str(error)) from error
        finally:
            await listener.close()
            if container is not None:
                await self.kill(container)
                await self.remove(container, recipe.io)
        enforced |= {"memory": True, "pids": True, "disk": self._gauge.works}
        watched = ("memory, pids and disk: looked at again and again, for no cgroup holds them here",)
        version = probing.cgroup_version()
        return Facts(
            self.name, self.runtime, "directory", version, os.getuid() != 0, enforced, (*notes, *watched)
        )

    # --- containers ---

    async def create(self, recipe: Recipe) -> Container:
        identity = f"p-{secrets.token_hex(8)}"
        layer = self.state.layers / identity
        layer.mkdir(mode=0o755)
        log = self.state.storage / f"{identity}.log"
        try:
            launcher = self._spawn(recipe, layer, log)
            self._launchers[identity] = launcher
            pid = await self._agent_below(launcher, log)
        except BaseException as error:  # cancelled or failed: nothing of it may stay
            await asyncio.shield(self._undo(identity, layer))
            if isinstance(error, OSError):
                raise Internal(f"{self.name}: {error}", Code.CREATE_FAILED) from error
            raise
        finally:
            log.unlink(missing_ok=True)
        watched = self._watch.add(pid, recipe.memory_mb << 20, recipe.pids)
        usage = self._gauge.add(layer, pid, recipe.disk_mb)
        limits = recipe.memory_mb, recipe.pids, recipe.disk_mb
        return Container(identity, pid, None, watched, layer, *limits, usage)

    def _spawn(self, recipe: Recipe, layer: Path, log: Path) -> subprocess.Popen[bytes]:
        mortal = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
        with log.open("wb") as said:
            return subprocess.Popen(
                [*mortal, *self.command(recipe, layer)],
                env=self.environment(recipe),
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )

    def options(self, recipe: Recipe) -> list[str]:
        """The agent's own."""
        workdir = ["--workdir", recipe.workdir] if recipe.workdir else []
        return ["--orphan-timeout", str(self.orphan_s), *workdir]

    async def _agent_below(self, launcher: subprocess.Popen[bytes], log: Path) -> int:
        """Its pid as this host sees it: the one below the launcher that is PID 1 where it lives."""
        deadline = time.monotonic() + START_S
        while launcher.poll() is None and time.monotonic() < deadline:
            for pid in [launcher.pid, *pausing.below(launcher.pid)]:
                if _is_agent(pid):
                    return pid
            await asyncio.sleep(LOOK_S)
        said = (await asyncio.to_thread(log.read_text, errors="replace")).strip()[-500:]
        raise Internal(
            f"{self.name} did not start the agent: {said or 'it said nothing'}", Code.CREATE_FAILED
        )

    async def adopt(self, container: Container) -> Container:
        raise Gone(f"the engine {self.name} takes nothing over", Code.EVICTED)

    async def remove_others(self, containers: set[str], frozen: set[Path]) -> None:
        return None  # an earlier server's sandboxes ended with it

    async def blank(self, recipe: Recipe) -> Container:
        raise self._cannot()

    async def dress(self, container: Container, recipe: Recipe) -> Container:
        raise self._cannot()

    async def freeze(self, container: Container, name: str) -> Frozen:
        raise self._cannot()

    async def discard(self, frozen: Path) -> None:
        raise self._cannot()

    def _cannot(self) -> Internal:
        return Internal(f"the engine {self.name} cannot change or copy roots", Code.CREATE_FAILED)

    async def kill(self, container: Container) -> None:
        if container.watched is not None:
            self._watch.drop(container.watched)
        self._gauge.drop(container.usage)
        if (launcher := self._launchers.pop(container.id, None)) is not None:
            if _is_agent(container.pid):
                processes.send(container.pid)
                await processes.wait_gone(container.pid, GONE_S)
            await self._end(launcher)

    async def remove(self, container: Container, io: Path) -> None:
        await asyncio.to_thread(shutil.rmtree, io, ignore_errors=True)
        await self._undo(container.id, self.state.layers / container.id)

    async def _undo(self, identity: str, layer: Path) -> None:
        if (launcher := self._launchers.pop(identity, None)) is not None:
            await self._end(launcher)
        await asyncio.to_thread(shutil.rmtree, layer, ignore_errors=True)

    async def _end(self, launcher: subprocess.Popen[bytes]) -> None:
        """The agents first: all else in a namespace goes with its PID 1."""
        below = [pid for pid in pausing.below(launcher.pid) if _is_agent(pid)]
        for pid in below:
            processes.send(pid)
            await processes.wait_gone(pid, GONE_S)
        if launcher.poll() is None:
            launcher.kill()
        await asyncio.to_thread(launcher.wait)


def _is_agent(pid: int) -> bool:
    """PID 1 of a namespace below ours, and started as the agent."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    numbers: Mapping[str, Sequence[str]] = {
        line.split(":")[0]: line.split()[1:] for line in status.splitlines() if line.startswith("NSpid")
    }
    inside = numbers.get("NSpid", ())
    line = processes.command_line(pid).split(b"\0")
    return len(inside) > 1 and inside[-1] == "1" and any(part.endswith(b"/agent.sock") for part in line[-2:])
