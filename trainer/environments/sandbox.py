"""The environment of a run: one container per trajectory, from the runtime server, over HTTP.

What it is
    `SandboxEnvironment` finds the server, makes a sandbox for each trajectory and removes it. What it raises,
    and whose fault that is: `trainer.environments.workspace`.

How to use it
    environment = SandboxEnvironment.of(config, run)
    async with environment.open(task) as workspace: ...

What it does not do
    No retries (`trainer.rollout`), no containers (`runtime_server`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import TYPE_CHECKING, Any, Protocol, Self, runtime_checkable

from orchestrator.contract import Env, RunDirectory
from runtime_server.errors import SandboxError
from runtime_server.wire import RUN_LABEL, Code, CreateSandbox, Sandbox
from trainer.environments import Workspace
from trainer.environments.address import Address, find_server
from trainer.environments.workspace import SandboxWorkspace, Service, Several, blame
from trainer.errors import EnvironmentFailure, Lost, Refused
from trainer.tasks import Task

if TYPE_CHECKING:
    from orchestrator.schema import Config


@runtime_checkable
class Fetching(Protocol):
    """A service that can be told what is wanted next."""

    async def prefetch(self, images: Mapping[str, int]) -> object: ...


PREFETCH_S = 5.0
MOVED_S = 60.0
"""How long to look for a server that is started again, to remove a sandbox that it took over."""
DELETE_TIMEOUT_S = 30.0
CREATE_SLACK_S = 120.0
"""How long a create may take beyond its time in the queue."""
MOVING_S = 90.0


class SandboxEnvironment:
    """See the module's docstring; implements `trainer.environments.Environment`.

    `find` says where the server is now and is asked before every sandbox; `connect` makes a client of
    it. `ttl_s` bounds the life of a sandbox whose trainer has died. A server that moves publishes its new
    address and key one after the other: for `moving_s` a wrong key is no reason to stop.
    """

    def __init__(
        self,
        find: Callable[[], Address],
        connect: Callable[[Address], Service],
        ttl_s: float = 3600.0,
        queue_timeout_s: float = 600.0,
        moving_s: float = 0.0,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        self._labels = dict(labels or {})
        self._find, self._connect, self._moving_s = find, connect, moving_s
        self._refused_since: float | None = None
        self._ttl_s, self._queue_timeout_s = ttl_s, queue_timeout_s
        self._clients: dict[Address, Service] = {}  # episodes that began on an old server end on it
        self._leaving: set[asyncio.Task[None]] = set()
        self._closing = asyncio.Event()

    @classmethod
    def of(cls, config: Config, run: RunDirectory | None) -> Self:
        """The environment that a run's configuration asks for."""
        ttl_s = max(config.runtime.sandbox.ttl, 2 * config.rollout.turn_timeout)
        moves = run is not None and not os.environ.get(Env.RUNTIME_URL)
        queue_timeout, moving_s = config.runtime.queue_timeout, MOVING_S if moves else 0.0
        labels = {RUN_LABEL: run.run_id} if run is not None else {}  # a server may serve several runs
        return cls(lambda: find_server(run), connect, ttl_s, queue_timeout, moving_s, labels)

    @asynccontextmanager
    async def open(self, task: Task) -> AsyncIterator[Workspace]:
        start = time.perf_counter()
        client = self._connected()
        request = CreateSandbox(
            image=task.image or None,
            workdir=task.workdir or None,
            ttl_s=self._ttl_s,
            labels=self._labels | {"task": task.id[:60]},
            queue_timeout_s=self._queue_timeout_s,
        )
        with self._moving(), blame("create", policy=False):
            async with asyncio.timeout(self._queue_timeout_s + CREATE_SLACK_S):
                sandbox = await self._create(client, request)
        workspace = SandboxWorkspace(task=task, client=client, sandbox=sandbox, again=self.open)
        workspace.add("create_s", time.perf_counter() - start)
        try:
            await workspace.prepare()
            yield workspace
        finally:
            self._remove(client, sandbox.id)

    async def wait_ready(self, timeout_s: float) -> None:
        """Ask for the server's health until it answers. Raises Lost after `timeout_s`, Refused at once."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                client = self._connected()
                await self._greet(client)
                return
            except Lost as error:
                if time.monotonic() >= deadline:
                    raise Lost(f"no runtime server answered within {timeout_s:g} s: {error}") from error
            await asyncio.sleep(0.5)

    async def prefetch(self, images: Mapping[str, int], most: int) -> None:
        """See `Prefetching`. What goes wrong is no matter: the sandboxes only come slower."""
        wanted = dict(images)
        while sum(wanted.values()) > most:  # the images stay wanted, if not all of their sandboxes
            fullest = max(wanted, key=lambda name: wanted[name])
            wanted[fullest] -= 1
        with suppress(EnvironmentFailure, SandboxError, OSError, TimeoutError):
            client = self._connected()
            if isinstance(client, Fetching):
                async with asyncio.timeout(PREFETCH_S):
                    await client.prefetch(wanted)

    async def life(self) -> object:
        """The present server's address and key, which a new life never shares with an old one; of several
        servers, which ones they are."""
        try:
            address, client = self._find(), self._connected()
            if isinstance(client, Several):
                return await client.life()
            await self._greet(client)
        except (EnvironmentFailure, OSError):
            return None
        return address

    async def _greet(self, client: Service) -> None:
        with self._moving(), blame("health", policy=False):
            async with asyncio.timeout(10):
                await client.capabilities()

    @contextmanager
    def _moving(self) -> Iterator[None]:
        """See the class. On a shared filesystem either file may be seen late, too."""
        try:
            yield
            self._refused_since = None
        except Refused as error:
            cause, now = error.__cause__, time.monotonic()
            if not (isinstance(cause, SandboxError) and cause.code == Code.UNAUTHORIZED):
                raise
            self._refused_since = self._refused_since or now
            if now - self._refused_since >= self._moving_s:
                raise
            raise Lost(f"{error} (the server may be moving)") from cause

    async def close(self) -> None:
        """Wait until every sandbox is removed, then hang up."""
        self._closing.set()
        while self._leaving:
            await asyncio.gather(*self._leaving, return_exceptions=True)
        while self._clients:
            await self._clients.popitem()[1].close()

    def _connected(self) -> Service:
        """The client of the present server; a server that came back elsewhere gets a new one."""
        try:
            address = self._find()
        except OSError as error:
            raise Lost(f"the runtime server's address cannot be read: {error}") from error
        if address not in self._clients:
            self._clients[address] = self._connect(address)
        return self._clients[address]

    async def _create(self, client: Service, request: CreateSandbox) -> Sandbox:
        """Create; when the caller is cancelled meanwhile, the sandbox that still comes is removed."""
        creating = asyncio.ensure_future(client.create(request))
        try:
            return await asyncio.shield(creating)
        except asyncio.CancelledError:
            self._background(_abandon(client, creating))
            raise

    def _remove(self, client: Service, sandbox: str) -> None:
        """Delete in the background: neither a cancelled nor a finished episode has to wait for it."""
        self._background(self._deleted(client, sandbox))

    async def _deleted(self, client: Service, sandbox: str) -> None:
        """Where it is by then: a server that is started again has the sandboxes of its last life."""
        if await _delete(client, sandbox):
            return
        deadline = time.monotonic() + MOVED_S
        while not self._closing.is_set() and time.monotonic() < deadline:
            with suppress(TimeoutError):
                async with asyncio.timeout(1):
                    await self._closing.wait()
            with suppress(EnvironmentFailure):
                if (now := self._connected()) is not client:
                    await _delete(now, sandbox)
                    return

    def _background(self, work: Coroutine[Any, Any, None]) -> None:
        leaving = asyncio.get_running_loop().create_task(work)
        self._leaving.add(leaving)
        leaving.add_done_callback(self._leaving.discard)


def connect(address: Address) -> Service:
    """The HTTP client of a server, or of all servers of a run."""
    from runtime_server.client import Client
    from runtime_server.fleet import Fleet

    if address.fleet is not None:
        return Fleet.of(RunDirectory(address.fleet))
    return Client(address.url, address.key)


async def _abandon(client: Service, creating: asyncio.Future[Sandbox]) -> None:
    with contextlib.suppress(SandboxError, TimeoutError):
        async with asyncio.timeout(DELETE_TIMEOUT_S):
            sandbox = await creating
        await _delete(client, sandbox.id)


async def _delete(client: Service, sandbox: str) -> bool:
    """False when nobody answered. What cannot be deleted expires by itself."""
    try:
        async with asyncio.timeout(DELETE_TIMEOUT_S):
            await client.delete(sandbox)
    except (SandboxError, TimeoutError) as error:
        return isinstance(error, SandboxError) and error.code != Code.UNREACHABLE
    return True
