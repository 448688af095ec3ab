"""The processes that were started in a sandbox and run on by themselves: found, followed, fed, signalled.

What it is
    `Processes` of one sandbox. Each has the agent's number, which a later connection to the same agent
    knows as well: what an earlier server had started is found again there. Ended ones are remembered, with
    the output that was kept, until they are deleted or newer ones push them out.

How to use it
    processes = await running.of(identity)          # Running(sandboxes)
    record = await processes.start(request); record = processes.get(record.number).record()

What it does not do
    No HTTP (`routes/processes.py`), no sessions (`sessions.py`). A process keeps no sandbox from expiring:
    whoever follows it does.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from runtime_server import wire
from runtime_server.agent import AgentConnection, AgentError, AgentLost, Finished
from runtime_server.agent import Process as AgentProcess
from runtime_server.box import SHELL, Box, decoded
from runtime_server.errors import Conflict, NotFound, Unavailable
from runtime_server.output import Cutter, Event, chunks_of, events_of, offsets_of
from runtime_server.sandboxes import Sandboxes
from runtime_server.wire import Code

RUNNING_MAX = 128  # of a sandbox, so that its agent always has room for a command
ENDED_KEPT = 64
ENDED_BYTES = 16 << 20  # of their output, for each sandbox
TAG = "process"


@dataclass(eq=False)
class Program:
    """One process, as this server keeps it."""

    box: Box
    process: AgentProcess
    command: str | list[str]
    cwd: str
    pty: bool
    started_at: float = field(default_factory=time.time)
    oom_before: int = 0
    finished: Finished | None = None
    oom: bool = False
    over: asyncio.Event = field(default_factory=asyncio.Event)
    typing: asyncio.Lock = field(default_factory=asyncio.Lock)  # what one writes stays together

    @property
    def number(self) -> int:
        return self.process.number

    @property
    def size(self) -> int:
        return sum(len(one.data) for one in self.process.kept())

    def record(self) -> wire.Process:
        done = self.finished
        stdout, stderr = (done.stdout, done.stderr) if done else self.process.kept()
        record = wire.Process(
            number=self.number,
            command=self.command,
            cwd=self.cwd,
            pty=self.pty,
            state="ended" if done else "running",
            started_at=self.started_at,
            stdout_bytes=stdout.total,
            stderr_bytes=stderr.total,
        )
        if done is not None:
            record.exit_code, record.signal, record.timed_out = done.exit_code, done.signal, done.timed_out
            record.duration_ms, record.oom = done.duration_ms, self.oom
        return record

    async def watch(self) -> None:
        """Until its end. What becomes of the sandbox is told to those who ask for it."""
        with contextlib.suppress(AgentLost, AgentError):
            self.finished = await self.process.wait()
            self.oom = self.box.kills() > self.oom_before
        self.over.set()

    async def wait(self, seconds: float) -> wire.Process:
        """Its record, at its end or when the time is up."""
        async with self.box.in_use():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self.over.wait()
            if self.over.is_set() and self.finished is None:
                await self.process.wait()  # which says why there is no end
        return self.record()

    async def feed(self, request: wire.Input) -> None:
        data = decoded(request.data, request.encoding)
        async with self.box.in_use(), self.typing:
            with said():
                if data:
                    await self.process.write(data)
                if request.close:
                    await self.process.close_stdin()

    async def signal(self, number: int | str) -> None:
        async with self.box.in_use():
            await self.process.signal(number if isinstance(number, int) else signal.Signals[number])

    async def resize(self, size: wire.Terminal) -> None:
        async with self.box.in_use():
            await self.process.resize(size.columns, size.rows)

    async def output(self, offset: str, stream: str, follow: bool) -> AsyncGenerator[Event, None]:
        """Events from this offset on: until it ends, or without `follow` what there is now."""
        at = offsets_of(offset, stream)
        if follow:
            async for event in events_of(self.process.chunks(at), at):
                yield event
            await self.over.wait()
        else:
            for event in now(self.process, at):
                yield event
        yield wire.OutputEnd(process=self.record())


def now(process: AgentProcess, at: tuple[int, int]) -> Iterator[wire.OutputChunk]:
    cutter = Cutter(at)
    for chunk in chunks_of(process.kept(), at):
        yield from cutter.cut(chunk)
    if process.ended:
        yield from cutter.rest()


@contextlib.contextmanager
def said() -> Iterator[None]:
    """What an agent says about input, in the words of the service."""
    try:
        yield
    except AgentError as error:
        if error.errno == errno.EPIPE:
            raise Conflict(f"{error}. Start it with stdin, or on a terminal.", Code.INPUT_CLOSED) from None
        raise


class Processes:
    """Of one sandbox, and one connection to its agent."""

    def __init__(self, box: Box) -> None:
        self.box, self.agent = box, box.agent
        self._known: dict[int, Program] = {}
        self._watching: set[asyncio.Task[None]] = set()

    async def adopt(self) -> None:
        """What an earlier connection had started."""
        for number, one in self.agent.running.items():
            if one.tag == TAG:
                with contextlib.suppress(AgentError):  # released, or pushed out, in the meantime
                    process = await self.agent.attach(number, max_output=self.box.defaults.max_output)
                    self._keep(Program(self.box, process, "", "", False, started_at=0.0))

    def list(self) -> wire.ProcessList:
        return wire.ProcessList(processes=[program.record() for program in self._known.values()])

    def get(self, number: int) -> Program:
        try:
            return self._known[number]
        except KeyError:
            raise NotFound(
                f"sandbox {self.box.id} has no process {number} (any more); GET …/processes lists them",
                Code.PROCESS_NOT_FOUND,
            ) from None

    async def start(self, request: wire.StartProcess) -> wire.Process:
        """Returns once it runs. Conflict when too many do."""
        box, command = self.box, request.command
        if sum(not program.process.ended for program in self._known.values()) >= RUNNING_MAX:
            raise Conflict(f"{RUNNING_MAX} processes run in {box.id}: end one first", Code.TOO_MANY)
        cwd, limit = box.resolve(request.cwd) if request.cwd else box.workdir, request.max_output
        before = box.kills()
        async with box.in_use():
            process = await self.agent.spawn(
                [SHELL, "-c", command] if isinstance(command, str) else command,
                cwd=cwd,
                env=request.env,
                stdin=request.stdin,
                pty=(request.pty.columns, request.pty.rows) if request.pty else None,
                timeout_s=request.timeout_s,
                max_output=box.defaults.max_output if limit is None else limit,
                tag=TAG,
            )
        program = Program(box, process, command, cwd, request.pty is not None, oom_before=before)
        self._keep(program)
        return program.record()

    async def delete(self, number: int) -> None:
        """End its whole tree, and forget it."""
        program = self.get(number)
        async with self.box.in_use():
            await program.process.kill()
            await self._forget(program)

    def _keep(self, program: Program) -> None:
        self._known[program.number] = program
        task = asyncio.create_task(self._watch(program))
        self._watching.add(task)
        task.add_done_callback(self._watching.discard)

    async def _watch(self, program: Program) -> None:
        await program.watch()
        ended = [one for one in self._known.values() if one.over.is_set()]
        size = sum(one.size for one in ended)
        for oldest in ended[:-1]:
            if len(ended) <= ENDED_KEPT and size <= ENDED_BYTES:
                break
            ended.remove(oldest)
            size -= oldest.size
            await self._forget(oldest)

    async def _forget(self, program: Program) -> None:
        self._known.pop(program.number, None)
        with contextlib.suppress(AgentLost):
            await self.agent.release(program.number)


class Running:
    """The processes of every sandbox of a server; those that nobody asked about are not looked for."""

    def __init__(self, sandboxes: Sandboxes) -> None:
        self.sandboxes = sandboxes
        self._of = PerAgent(Processes)

    async def of(self, identity: str) -> Processes:
        """Of a sandbox that can be worked with; raises what became of it otherwise."""
        return await self._of.get(self.sandboxes.usable(identity))

    def stopping(self) -> Unavailable | None:
        """What those who follow are told when the server stops."""
        if not self.sandboxes.draining:
            return None
        return Unavailable("the server is stopping", Code.SERVER_DRAINING)


class Adopting(Protocol):
    """What belongs to one sandbox and one connection to its agent."""

    async def adopt(self) -> None: ...


A = TypeVar("A", bound=Adopting)


class PerAgent(Generic[A]):
    """One of a kind for each agent, made when it is first asked for, gone with the connection."""

    def __init__(self, make: Callable[[Box], A]) -> None:
        self._make = make
        self._known: dict[AgentConnection, asyncio.Task[A]] = {}
        self._leaving: set[asyncio.Task[None]] = set()

    async def get(self, box: Box) -> A:
        task = self._known.get(box.agent)
        if task is None:
            task = self._known[box.agent] = asyncio.create_task(self._adopted(box))
            leaving = asyncio.create_task(self._forget(box.agent))
            self._leaving.add(leaving)
            leaving.add_done_callback(self._leaving.discard)
        async with box.in_use():
            return await asyncio.shield(task)

    async def _adopted(self, box: Box) -> A:
        made = self._make(box)
        await made.adopt()
        return made

    async def _forget(self, agent: AgentConnection) -> None:
        await agent.wait_closed()
        self._known.pop(agent, None)
