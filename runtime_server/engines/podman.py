"""The engine `podman`: container lifecycle through the `podman` package, on a private API service.

What it is
    Two calls make a sandbox (create, start) and one removes it. Each goes through the package's own
    session in a small pool of threads, with a time limit; the bodies are `spec.create_body`'s. The
    first process's pid is read from the file that conmon writes, not asked for.
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
import base64
import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import requests
from podman import PodmanClient
from podman.errors import APIError

from orchestrator.schema import Runtime
from runtime_server.agent import AgentListener, AgentLost
from runtime_server.engines import SOCKET, Container, EngineError, Facts, Image, Recipe, namespace, processes
from runtime_server.engines import probe as probing
from runtime_server.engines.service import Service, find_programs
from runtime_server.engines.spec import ROOT_WAYS, USER_WAYS, Node, Way, create_body
from runtime_server.engines.state import State, sweep
from runtime_server.engines.watch import EVERY_S, Watch
from runtime_server.errors import Internal, NotFound, SandboxError
from runtime_server.wire import Code

T = TypeVar("T")
CALL_S = 60.0
PULL_S = 20.0
AGENT_S = 60.0
GONE_S = 10.0
KNOWN_S = 30.0  # how long an answer about an image is believed
HANG_UP_S = 1.0
BUSY_TRIES = 4
TASKS_EACH = 64  # an ordinary user's sandboxes share one limit of processes and threads: on average so many


class PodmanEngine:
    """See the module's docstring; implements `runtime_server.engines.Engine`."""

    def __init__(self, config: Runtime, agent: Path, image_store: Path | None, orphan_s: int = 60) -> None:
        self.config, self.agent, self.image_store = config, agent, image_store
        self._node = Node(agent, {}, orphan_s=orphan_s)
        self._threads = ThreadPoolExecutor(config.max_parallel_creates + 2, thread_name_prefix="podman")
        self._images: dict[str, tuple[float, asyncio.Task[Image]]] = {}
        self._restarting = asyncio.Lock()
        self._state: State | None = None
        self._service: Service | None = None
        self._client: PodmanClient | None = None
        self._facts: Facts | None = None
        self._watch: Watch | None = None

    @property
    def facts(self) -> Facts:
        assert self._facts is not None, "start() comes first"
        return self._facts

    @property
    def state(self) -> State:
        if self._state is None:
            raise Internal("the engine is not running", Code.SERVER_DRAINING)
        return self._state

    # --- life ---

    async def start(self) -> None:
        runtimes = find_programs()
        await asyncio.to_thread(sweep, self.config.state_dir)
        self._state = State.create(self.config.state_dir)
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
        await asyncio.to_thread(processes.end_all, lambda: processes.inside(state.cgroup))
        if self._watch is not None:
            await asyncio.to_thread(self._watch.stop)
        await self._end_service()
        await asyncio.to_thread(state.remove)
        self._threads.shutdown(wait=False)

    async def _end_service(self) -> None:
        service, self._service = self._service, None
        client, self._client = self._client, None
        if client is not None:
            client.close()
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
        self._client = PodmanClient(base_url=f"unix://{self.state.socket}", max_pool_size=16)
        driver = (await self._json("GET", "/info"))["store"]["graphDriverName"]
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
        enforced = await self._probe(runtime)
        notes += self._look_after(enforced)
        return Facts("podman", runtime, driver, probing.cgroup_version(), not root, enforced, notes)

    def _look_after(self, enforced: dict[str, bool]) -> tuple[str, ...]:
        """Where no cgroup holds memory and processes, somebody has to watch. Returns what to say about it."""
        lacking = tuple(name for name in ("memory", "pids") if not enforced[name])
        notes = () if enforced["cpus"] else ("no limit of CPUs: this user may not make cgroups here",)
        if not lacking:
            return notes
        self._watch = Watch(lacking)
        self._watch.start()
        enforced.update(dict.fromkeys(lacking, True))
        what = " and ".join(lacking)
        return (*notes, f"{what}: watched {1 / EVERY_S:g} times a second, for no cgroup holds them here")

    async def _probe(self, runtime: str) -> dict[str, bool]:
        """Start the agent in an empty root directory, and see what holds for it."""
        recipe = Recipe(
            name=f"probe-{runtime}-{self._node.limits:d}{self._node.bound_sysv:d}{self._node.own_ids}",
            image="",
            io=self.new_io("probe"),
            memory_mb=self.config.sandbox.memory,
            cpus=self.config.sandbox.cpus,
            pids=self.config.sandbox.pids,
            shm_mb=self.config.sandbox.shm,
        )
        listener = AgentListener(recipe.io / SOCKET)
        self.state.probe.mkdir(exist_ok=True)
        container = None
        try:
            await listener.start()
            container = await self.create(recipe, self.state.probe)
            agent = await listener.accept(container.pid, AGENT_S)
            enforced = probing.read_back(container.pid, recipe)
            self._node = replace(self._node, seccomp=self._compiled_seccomp(container.id))
            await agent.close()
            return enforced
        finally:
            await listener.close()
            if container is not None:
                await self.kill(container)
                await self.remove(container, recipe.io)
            shutil.rmtree(self.state.probe, ignore_errors=True)

    def _compiled_seccomp(self, container: str) -> str:
        """crun leaves the compiled default filter behind and takes it back: 18 ms of CPU for each sandbox.

        The same profile, the same capabilities, the same machine: it is byte for byte what it would make.
        """
        with contextlib.suppress(OSError):
            return base64.b64encode((self.state.oci / container / "seccomp.bpf").read_bytes()).decode()
        return ""

    # --- images ---

    async def images(self) -> list[str]:
        rows = await self._json("GET", "/images/json")
        names = {name for row in rows for name in row.get("Names") or row.get("RepoTags") or []}
        return sorted(name for name in names if "<none>" not in name)

    async def image(self, name: str) -> Image:
        """One look-up at a time for each name, believed for KNOWN_S."""
        known = self._images.get(name)
        if known is None or known[0] < time.monotonic():
            known = (time.monotonic() + KNOWN_S, asyncio.create_task(self._look_up(name)))
            self._images[name] = known
            if len(self._images) > 1000:
                self._images.pop(next(iter(self._images)))
        return await asyncio.shield(known[1])

    async def _look_up(self, name: str) -> Image:
        try:
            return await self._inspect(name)
        except NotFound:
            problem = await self._pull(name)
        try:
            return await self._inspect(name)
        except NotFound:
            here = ", ".join(await self.images()) or "none"
            said = f"image {name!r} is not here{problem}. Images here: {here}"
            raise NotFound(said, Code.IMAGE_MISSING) from None

    async def _inspect(self, name: str) -> Image:
        path = f"/images/{quote(name, safe='')}/json"
        data = await self._json("GET", path)
        wanted = data.get("Config") or {}
        user = str(wanted.get("User") or "0").split(":")[0]
        return Image(data["Id"], name, wanted.get("WorkingDir") or "/", user in ("0", "root"))

    async def _pull(self, name: str) -> str:
        """Try once, for a short time; local images have no registry. Returns why it failed."""
        if name.startswith("localhost/"):
            return ""
        try:
            params = {"reference": name, "policy": "missing", "quiet": True}
            answer = await self._call("POST", "/images/pull", params=params, timeout_s=PULL_S)
            problem = _pull_error(answer.text)
            return f", and it could not be pulled ({problem})" if problem else ""
        except SandboxError as error:
            return f", and it could not be pulled ({error})"

    # --- containers ---

    def new_io(self, name: str) -> Path:
        """Inside a private directory, but open itself: the image may run as any user."""
        folder = self.state.io / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        folder.chmod(0o755)
        return folder

    async def create(self, recipe: Recipe, rootfs: Path | None = None) -> Container:
        body = json.dumps(create_body(recipe, self._node, rootfs))
        made = await self._json("POST", "/containers/create", data=body, busy=True)
        identity = str(made["Id"])
        try:
            await self._call("POST", f"/containers/{identity}/start", busy=True)
            pid = await self._pid(identity)
        except BaseException:  # cancelled or failed: it must not stay
            await asyncio.shield(self._delete(identity))
            raise
        watched = self._watch.add(pid, recipe.memory_mb << 20, recipe.pids) if self._watch else None
        return Container(identity, pid, probing.own_cgroup(pid, "memory"), watched)

    async def kill(self, container: Container) -> None:
        if self._watch and container.watched:
            self._watch.drop(container.watched)
        conmon = self._conmon(container.id)
        parent = processes.stat_fields(container.pid)
        if parent and int(parent[1]) == conmon:  # the pid is still that of our container
            processes.send(container.pid)
            await processes.wait_gone(container.pid, GONE_S)
        if conmon:
            await processes.wait_gone(conmon, GONE_S)

    async def remove(self, container: Container, io: Path) -> None:
        await self._delete(container.id)
        await asyncio.to_thread(shutil.rmtree, io, ignore_errors=True)

    async def _delete(self, identity: str) -> None:
        params = {"force": True, "timeout": 0, "v": False}
        with contextlib.suppress(NotFound):
            await self._call("DELETE", f"/containers/{identity}", params=params, busy=True)

    def _userdata(self, identity: str) -> Path:
        return self.state.runroot / "overlay-containers" / identity / "userdata"

    async def _pid(self, identity: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            return int((self._userdata(identity) / "pidfile").read_text())
        data = await self._json("GET", f"/containers/{identity}/json")
        return int(data["State"]["Pid"])

    def _conmon(self, identity: str) -> int:
        """The pid of its monitor, 0 when that has ended."""
        with contextlib.suppress(OSError, ValueError):
            pid = int((self._userdata(identity) / "conmon.pid").read_text())
            return pid if identity.encode() in processes.command_line(pid) else 0
        return 0

    # --- calls ---

    async def _json(self, method: str, path: str, **options: Any) -> Any:
        return (await self._call(method, path, **options)).json()

    async def _call(
        self,
        method: str,
        path: str,
        *,
        data: str | None = None,
        params: dict[str, Any] | None = None,
        timeout_s: float = CALL_S,
        busy: bool = False,
    ) -> Any:
        """One API call. NotFound on 404, else Internal (create_failed). A dead service is started again."""
        session = self._session()
        call: Callable[[], Any] = lambda: _send(session, method, path, data, params, timeout_s)  # noqa: E731
        for left in range(BUSY_TRIES if busy else 1, 0, -1):
            try:
                answer = await self._in_thread(call)
            except (requests.ConnectionError, APIError) as error:
                if not await self._revive() or left == 1:
                    raise Internal(f"Podman does not answer: {error}", Code.CREATE_FAILED) from error
                continue
            except requests.RequestException as error:
                raise Internal(f"Podman took longer than {timeout_s:g} s", Code.CREATE_FAILED) from error
            if answer.status_code < 400:
                return answer
            cause = _cause(answer)
            if "database is locked" not in cause or left == 1:
                kind = NotFound if answer.status_code == 404 else Internal
                raise kind(f"Podman: {cause}", Code.CREATE_FAILED)
        raise AssertionError("unreachable")

    async def _in_thread(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    def _session(self) -> Any:
        if self._client is None or self._state is None:
            raise Internal("the engine has stopped", Code.SERVER_DRAINING)
        return self._client.api

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
            return True


def _send(
    session: Any, method: str, path: str, data: str | None, params: dict[str, Any] | None, timeout_s: float
) -> Any:
    call = {"GET": session.get, "POST": session.post, "DELETE": session.delete}[method]
    more = {"data": data} if method == "POST" else {}
    return call(path, params=params, timeout=timeout_s, **more)


def _pull_error(text: str) -> str:
    """Podman says 200 and then how it went, one JSON object a line."""
    for line in text.splitlines():
        with contextlib.suppress(ValueError, AttributeError):
            if error := json.loads(line).get("error"):
                return str(error)[:300]
    return ""


def _cause(answer: Any) -> str:
    try:
        body = answer.json()
        return str(body.get("message") or body.get("cause") or body)[:600]
    except (ValueError, AttributeError):
        return str(answer.text)[:600]
