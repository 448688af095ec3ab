"""A shell that was opened in a sandbox and stays: commands in it share directory, variables, jobs.

What it is
    `OpenSession`, which `sessions.py` keeps by name. It runs one command at a time; each has a number, so
    that who lost the connection can go on reading the output of that command and of no other.

What it does not do
    No HTTP (`routes/sessions.py`). What a command means is the agent's business.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field

from runtime_server import wire
from runtime_server.agent import AgentError, Chunk, Finished, Process, SessionEnded
from runtime_server.agent import Session as Shell
from runtime_server.box import Box, decoded, result_of
from runtime_server.errors import BadRequest, Conflict, Gone, NotFound
from runtime_server.output import Event, events_of, offsets_of
from runtime_server.running import now, said
from runtime_server.wire import Code

SETTLE_S = 5.0  # what a client that hung up was running has so long to be gone
PATIENCE_S = 0.5  # it may take a moment until it is known that a client hung up
LOOK_S = 0.02
Work = Callable[[], Awaitable[Finished]]
FIRST = asyncio.FIRST_COMPLETED


@dataclass(eq=False)
class Command:
    """One command of a session."""

    number: int
    followed: bool  # its output is kept for those who ask for it
    left: bool  # when nobody waits for it any more
    oom_before: int = 0
    process: Process | None = None  # once there is output
    result: wire.SessionResult | None = None
    news: asyncio.Event = field(default_factory=asyncio.Event)  # it has a process, or a result

    def tell(self, process: Process | None, result: wire.SessionResult | None = None) -> None:
        self.process, self.result = process or self.process, result
        self.news.set()


@dataclass(eq=False)
class OpenSession:
    """One session, as this server keeps it."""

    name: str
    box: Box
    shell: Shell
    cwd: str = ""
    pty: bool = False
    created_at: float = field(default_factory=time.time)
    commands: int = 0
    exit_code: int | None = None
    command: Command | None = None  # the last one
    waiting: int = 0  # for the end of a command
    settling: float = 0.0  # until then, the command of a client that hung up may still be ending
    typing: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def ended(self) -> bool:
        return self.exit_code is not None or self.shell.ended

    @property
    def busy(self) -> bool:
        left = self.shell.running
        return self.waiting > 0 or (left is not None and not left.ended)

    def record(self) -> wire.Session:
        return wire.Session(
            name=self.name,
            state="ended" if self.ended else "running" if self.busy else "idle",
            cwd=self.cwd,
            pty=self.pty,
            created_at=self.created_at,
            commands=self.commands,
            exit_code=self.exit_code,
        )

    # --- commands ---

    async def run(self, request: wire.Run) -> wire.SessionResult:
        """To its end, or that of its time. Conflict while another runs, Gone when the shell has ended."""
        await self.ready()
        with self._begun(request) as command:
            return await self._result(command, self._work(request, command))

    async def stream(self, request: wire.Run) -> AsyncGenerator[Event, None]:
        """The same, with its output while it runs. Who stops listening ends it, unless it is to be left."""
        await self.ready()
        with self._begun(request) as command:
            running = asyncio.create_task(self._result(command, self._work(request, command)))
            try:
                yield wire.OutputStarted(command=command.number)
                await asyncio.wait({running, asyncio.ensure_future(command.news.wait())}, return_when=FIRST)
                if command.process is not None:
                    async for event in _until(events_of(command.process.chunks(), (0, 0)), running):
                        yield event
                yield wire.OutputEnd(result=await running)
            finally:
                running.cancel()
                command.news.set()
                await asyncio.gather(running, return_exceptions=True)

    async def rest(self, timeout_s: float | None) -> wire.SessionResult:
        command = self.command
        if self.shell.running is None or command is None:
            self._alive()
            raise BadRequest(f"nothing was left running in the session {self.name!r}")
        with self._waits():
            return await self._result(
                command, lambda: self.shell.rest(self._limit(timeout_s), self._heard(command))
            )

    async def interrupt(self, grace_s: float) -> wire.Interrupted:
        """None when nothing ran. Whoever waits for the command gets the result as well."""
        finished: Finished | None
        async with self.box.in_use():
            try:
                finished = await self.shell.interrupt(grace_s)
            except SessionEnded as ended:
                finished = self._over(ended)
        if finished is None or self.command is None:
            return wire.Interrupted()
        return wire.Interrupted(result=self._said(self.command, finished, False))

    async def feed(self, request: wire.Input) -> None:
        data = decoded(request.data, request.encoding)
        self._alive()
        async with self.box.in_use(), self.typing:
            with said():
                if data:
                    await self.shell.send(data)
                if request.close:
                    await self.shell.end_input()

    async def resize(self, size: wire.Terminal) -> None:
        self._alive()
        async with self.box.in_use():
            await self.shell.resize(size.columns, size.rows)

    def output(
        self, number: int | None, offset: str, stream: str, follow: bool
    ) -> AsyncGenerator[Event, None]:
        """Of the last command. NotFound when it is another, or its output is not to be followed."""
        command = self.command
        if command is None or not command.followed or number not in (None, command.number):
            raise NotFound(
                f"the output of {f'command {number}' if number else 'the last command'} of the session "
                f"{self.name!r} cannot be followed: it is not the last one, or was neither streamed nor left",
                Code.PROCESS_NOT_FOUND,
            )
        return self._output(command, offset, stream, follow)

    async def _output(
        self, command: Command, offset: str, stream: str, follow: bool
    ) -> AsyncGenerator[Event, None]:
        at = offsets_of(offset, stream)
        if follow:
            await command.news.wait()
        process = command.process
        if process is not None and follow:
            async for event in events_of(process.chunks(at), at):
                yield event
        elif process is not None:
            for event in now(process, at):
                yield event
        if process is not None and process.ended:
            command.result = self._said(command, await process.wait(), False)
        yield wire.OutputEnd(result=command.result)

    # --- how they are run ---

    @contextlib.contextmanager
    def _waits(self) -> Iterator[None]:
        self.waiting += 1
        try:
            yield
        finally:
            self.waiting -= 1

    @contextlib.contextmanager
    def _begun(self, request: wire.Run) -> Iterator[Command]:
        self.commands += 1
        left = request.on_timeout == "leave"
        followed = request.stream or request.stdin or left
        self.command = Command(self.commands, followed, left, self.box.kills())
        try:
            with self._waits():
                yield self.command
        finally:  # whatever came of it, nobody must wait for news any more
            self.command.news.set()

    def _heard(self, command: Command) -> Callable[[Chunk], None]:
        """Told of every chunk: at the first one it is known where they can be read."""

        def heard(_: Chunk) -> None:
            if command.process is None:
                command.tell(self.shell.running)

        return heard

    def _work(self, request: wire.Run, command: Command) -> Work:
        limit = self.box.defaults.max_output if request.max_output is None else request.max_output
        return lambda: self.shell.run(
            request.command,
            timeout_s=self._limit(request.timeout_s),
            max_output=limit,
            on_timeout=request.on_timeout,
            on_output=self._heard(command) if command.followed else None,
            stdin=request.stdin,
        )

    async def _result(self, command: Command, work: Work) -> wire.SessionResult:
        """What came of it, in the words of the service."""
        try:
            async with self.box.in_use():
                finished = await self._settled(work)
        except SessionEnded as ended:
            finished = self._over(ended)
        except asyncio.CancelledError:  # it may be left
            command.tell(self.shell.running)
            self.settling = 0.0 if command.left else time.monotonic() + SETTLE_S
            raise
        left = self.shell.running
        result = self._said(command, finished, finished.timed_out and left is not None)
        command.tell(left, result)
        return result

    async def _settled(self, work: Work) -> Finished:
        """Once the command of a client that hung up is gone, which takes the agent a moment."""
        while True:
            try:
                return await work()
            except AgentError as error:
                if error.errno == errno.ESRCH:  # it has ended a moment ago, and that is on its way to us
                    raise self._end() from None
                if error.errno != errno.EBUSY:
                    raise
                if time.monotonic() > self.settling:
                    raise self._taken() from None
            await asyncio.sleep(LOOK_S)

    # --- states ---

    async def ready(self) -> None:
        """For a command. A stream asks before its answer begins, so that a refusal has its own status."""
        patience = time.monotonic() + PATIENCE_S
        while True:
            self._alive()
            if not self.busy:
                return
            if time.monotonic() > max(patience, self.settling):
                raise self._taken()
            await asyncio.sleep(LOOK_S)

    def _alive(self) -> None:
        """Raises what became of the sandbox, or else of the shell: with the agent both are gone."""
        self.box.check()
        if self.ended:
            raise self._end()

    def _end(self) -> Gone:
        code = self.exit_code
        return Gone(
            f"the shell of the session {self.name!r} has ended"
            f"{'' if code is None else f' with exit code {code}'}: open another",
            Code.SESSION_ENDED,
            exit_code=code,
        )

    def _taken(self) -> Conflict:
        return Conflict(
            f"the session {self.name!r} still runs a command: wait for it, interrupt it, or open another",
            Code.SESSION_BUSY,
        )

    def _over(self, ended: SessionEnded) -> Finished:
        self.exit_code = ended.exit_code
        if ended.finished is None:
            self._alive()
        assert ended.finished is not None
        return ended.finished

    def _said(self, command: Command, finished: Finished, running: bool) -> wire.SessionResult:
        plain = result_of(finished, self.box.kills() > command.oom_before)
        facts = {name: getattr(plain, name) for name in type(plain).model_fields}
        ended = finished.ended or self.ended
        return wire.SessionResult(**facts, command=command.number, running=running, ended=ended)

    def _limit(self, timeout_s: float | None) -> float:
        return timeout_s or float(self.box.defaults.command_timeout)


async def _until(
    events: AsyncGenerator[Event, None], over: asyncio.Task[wire.SessionResult]
) -> AsyncGenerator[Event, None]:
    """The events until the command has ended, or was left."""
    coming: asyncio.Task[Event | None] | None = None
    try:
        while True:
            coming = asyncio.create_task(_next(events))
            await asyncio.wait({coming, over}, return_when=asyncio.FIRST_COMPLETED)
            if not coming.done() and over.result().running:
                return
            if (event := await coming) is None:
                return
            yield event
    finally:
        if coming is not None:
            coming.cancel()
            await asyncio.wait({coming})
        await events.aclose()


async def _next(events: AsyncGenerator[Event, None]) -> Event | None:
    return await anext(events, None)
