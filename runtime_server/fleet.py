"""Several sandbox servers as one: the calls of a client, spread over whoever of a run's servers lives.

What it is
    `Fleet` watches the records that the servers of a run write (hints: a server counts once its `/health`
    answers with the run's id and the record's nonce), and sends each create to one of them: where the image
    is and where there is room. A create whose server dies goes to the next one. What is asked of a sandbox
    goes to the server that has it; a server that is lost loses its sandboxes, and their calls fail with
    codes that tell it from the policy's doing. A server that joins later is used from then on.

How to use it
    async with Fleet.of(RunDirectory(path)) as fleet:
        async with fleet.sandbox(CreateSandbox(image="alpine")) as sandbox:
            await sandbox.exec("true")

What it does not do
    It starts no server (`orchestrator.job_fleet` does) and moves no sandbox. A create that waits in the queue
    of one server stays there when another one gets room.
"""

from __future__ import annotations

import asyncio
import builtins
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any, Self, TypeVar

from orchestrator.contract import RunDirectory, ServerRecord
from runtime_server import wire
from runtime_server.client import BoundSandbox, Client
from runtime_server.errors import NotFound, SandboxError, Unavailable
from runtime_server.fleet_member import Member, placement
from runtime_server.wire import Code
from runtime_server.wire_lifecycle import Fork, Forked, Snapshot

T = TypeVar("T")
LOOK_S, ASK_S = 2.0, 3.0
GROUPS_KEPT = 10_000
_LOST = {Code.UNREACHABLE, Code.SERVER_DRAINING, Code.UNAUTHORIZED}
_NOT_HERE = {Code.IMAGE_MISSING, Code.SNAPSHOT_NOT_FOUND}


class Fleet:
    """See the module's docstring. Lives in one event loop; close it, or use it as a context manager."""

    def __init__(
        self,
        run_id: str,
        records: Callable[[], Iterable[ServerRecord]],
        key: Callable[[], str],
        look_s: float = LOOK_S,
    ) -> None:
        self.run_id, self._records, self._key, self._look_s = run_id, records, key, look_s
        self.members: dict[tuple[str, str], Member] = {}  # by nonce and key
        self._where: dict[str, Member] = {}  # sandboxes and snapshots
        self._groups: dict[str, Member] = {}
        self._looked_at = float("-inf")
        self._looking: asyncio.Task[None] | None = None

    @classmethod
    def of(cls, run: RunDirectory, look_s: float = LOOK_S) -> Self:
        """The servers of a run, by its directory."""
        return cls(run.run_id, run.read_servers, lambda: run.read_text(run.runtime_api_key), look_s)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)
        for member in self.members.values():
            await member.client.close()
        self.members.clear()

    # --- the fleet ---

    @property
    def up(self) -> builtins.list[Member]:
        """Servers that answered as themselves when they were last asked, or called."""
        return [member for member in self.members.values() if member.up]

    async def look(self) -> None:
        """Read the records and ask every server now."""
        self._begin_look()
        assert self._looking is not None
        await asyncio.shield(self._looking)

    async def life(self) -> object:
        """What changes when a server is lost, comes back, or joins; None when none answers."""
        await self.look()
        return frozenset(member.record.nonce for member in self.up) or None

    async def capabilities(self) -> wire.Capabilities:
        """Of one server, with the places of all. Unavailable when none answers."""
        await self.look()
        member = self._choose(wire.CreateSandbox(), set(), None)
        found = await member.client.capabilities()
        places = sum(each.places for each in self.up)
        return found.model_copy(update={"max_sandboxes": places})

    async def list(self) -> wire.SandboxList:
        """Those of every server that answers."""
        await self._ready()
        found = await self._everywhere(lambda member: member.client.list())
        boxes = [box for each in found for box in each.sandboxes]
        return wire.SandboxList(sandboxes=boxes, queued=sum(each.queued for each in found))

    async def prefetch(self, images: Mapping[str, int]) -> None:
        """What the next batch needs, told to each server as the creates will be spread."""
        await self._ready()
        shares = placement(self.up, images)
        await self._everywhere(lambda member: member.client.prefetch(shares[member]))

    # --- sandboxes ---

    async def create(self, request: wire.CreateSandbox | None = None, key: str | None = None) -> wire.Sandbox:
        """A new sandbox on one of the servers; waits while that one is full."""
        body, once = request or wire.CreateSandbox(), key or secrets.token_hex(16)
        await self._ready()
        tried: set[Member] = set()
        last: SandboxError | None = None
        while True:
            member = self._choose(body, tried, last)
            try:
                made = await self._create(member, body, once)
            except SandboxError as error:
                if error.code not in _LOST | _NOT_HERE:
                    raise
                last = error
                tried.add(member)
                if error.code in _LOST:
                    self._lost(member)
                continue
            self._where[made.id] = member
            return made

    @asynccontextmanager
    async def sandbox(self, request: wire.CreateSandbox | None = None) -> AsyncIterator[BoundSandbox]:
        """A sandbox for the time of a `with`; deleted also when the caller fails or is cancelled."""
        creating = asyncio.ensure_future(self.create(request))
        try:
            made = await asyncio.shield(creating)
        except asyncio.CancelledError:
            with suppress(SandboxError):
                await self.delete((await creating).id)
            raise
        try:
            yield BoundSandbox(self._where[made.id].client, made)
        finally:
            with suppress(SandboxError):  # it went with its server, or expires by itself
                await asyncio.shield(self.delete(made.id))

    async def delete(self, sandbox: str) -> None:
        """Deleting what is not there (any more) is no error; a server that does not answer is."""
        with suppress(NotFound):
            await self._at(sandbox, lambda client: client.delete(sandbox))
            if (member := self._where.pop(sandbox, None)) is not None:
                member.released(sandbox)

    async def exec(self, sandbox: str, request: wire.Exec) -> wire.ExecResult:
        return await self._at(sandbox, lambda client: client.exec(sandbox, request))

    async def kill(self, sandbox: str) -> None:
        await self._at(sandbox, lambda client: client.kill(sandbox))

    async def write_file(self, sandbox: str, path: str, data: bytes, mode: int = 0o644) -> wire.FileInfo:
        return await self._at(sandbox, lambda client: client.write_file(sandbox, path, data, mode))

    async def read_file(self, sandbox: str, path: str) -> bytes:
        return await self._at(sandbox, lambda client: client.read_file(sandbox, path))

    async def get(self, sandbox: str) -> wire.Sandbox:
        return await self._at(sandbox, lambda client: client.get(sandbox))

    async def renew(self, sandbox: str, ttl_s: float) -> wire.Sandbox:
        return await self._at(sandbox, lambda client: client.renew(sandbox, ttl_s))

    async def snapshot(self, sandbox: str) -> Snapshot:
        """It stays where the sandbox is, and so do the sandboxes that begin with it."""
        taken = await self._at(sandbox, lambda client: client.snapshot(sandbox))
        self._where[taken.id] = self._where[sandbox]
        return taken

    async def fork(self, sandbox: str, count: int = 1, request: Fork | None = None) -> Forked:
        """On the server of the source."""
        made = await self._at(sandbox, lambda client: client.fork(sandbox, count, request))
        member = self._where[sandbox]
        for box in made.sandboxes:
            self._where[box.id] = member
            member.took(box.id)
        return made

    async def client_of(self, sandbox: str) -> Client:
        """The client of the server that has this sandbox, for every call that is not here. NotFound."""
        known = self._where.get(sandbox)
        if known is not None and not known.up:  # a server that came back has its sandboxes again
            known = next((m for m in self.up if m.record.name == known.record.name), known)
        if known is None:
            known = await self._search(sandbox)
        self._where[sandbox] = known
        return known.client

    # --- choosing ---

    async def _create(self, member: Member, body: wire.CreateSandbox, key: str) -> wire.Sandbox:
        with member.expecting():
            made = await member.client.create(body, key)
        member.took(made.id, made.image, body.image)
        return made

    def _choose(self, body: wire.CreateSandbox, tried: set[Member], last: SandboxError | None) -> Member:
        """Where there is room and the image; where its group or its snapshot is already."""
        left = [member for member in self.up if member not in tried]
        if not left:
            raise last or self._nobody()
        bound = self._where.get(body.snapshot or "") or self._groups.get(body.group or "")
        if bound not in left:
            bound = min(left, key=lambda member: member.score(body.image))
        if body.group:
            self._groups[body.group] = bound
            if len(self._groups) > GROUPS_KEPT:
                del self._groups[next(iter(self._groups))]
        return bound

    def _nobody(self) -> Unavailable:
        known = ", ".join(m.record.url for m in self.members.values()) or "no server has registered"
        return Unavailable(
            f"no sandbox server of {self.run_id} answers ({known}). `orchestrate status` tells.",
            Code.UNREACHABLE,
        )

    async def _search(self, sandbox: str) -> Member:
        await self._ready()
        for member in self.up:
            with suppress(SandboxError):
                await member.client.get(sandbox)
                return member
        raise NotFound(
            f"no server of {self.run_id} has a sandbox {sandbox!r}; list() shows them", Code.SANDBOX_NOT_FOUND
        )

    async def _at(self, sandbox: str, call: Callable[[Client], Awaitable[T]]) -> T:
        client = await self.client_of(sandbox)
        try:
            return await call(client)
        except SandboxError as error:
            if error.code in _LOST and (member := self._where.get(sandbox)) is not None:
                self._lost(member)
            raise

    async def _everywhere(self, call: Callable[[Member], Coroutine[Any, Any, T]]) -> builtins.list[T]:
        """The answers of those that gave one."""
        found = await asyncio.gather(*(call(member) for member in self.up), return_exceptions=True)
        for error in found:
            if isinstance(error, BaseException) and not isinstance(error, SandboxError):
                raise error
        return [answer for answer in found if not isinstance(answer, BaseException)]

    # --- watching ---

    async def _ready(self) -> None:
        """Nobody waits for a look while there is a server to go to."""
        if not self.up:
            await self.look()
        elif asyncio.get_running_loop().time() - self._looked_at >= self._look_s:
            self._begin_look()

    def _lost(self, member: Member) -> None:
        """Until it answers again as itself."""
        member.up = False
        self._begin_look()

    def _begin_look(self) -> None:
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look())
            self._looking.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def _look(self) -> None:
        self._looked_at = asyncio.get_running_loop().time()
        with suppress(OSError):  # a filesystem that hiccups: those that are known go on
            self._meet(await asyncio.to_thread(lambda: ([*self._records()], self._key())))
        await asyncio.gather(*(member.ask(self.run_id, ASK_S) for member in self.members.values()))
        for name, member in [*self.members.items()]:
            if not (member.listed or member.up or member.held):
                del self.members[name]
                await member.client.close()

    def _meet(self, said: tuple[builtins.list[ServerRecord], str]) -> None:
        records, key = said
        now = {(record.nonce, key): record for record in records if key}
        for name, member in self.members.items():
            member.listed = name in now
        for name, record in now.items():
            if name not in self.members:
                self.members[name] = Member(record, Client(record.url, key, tries=2))
