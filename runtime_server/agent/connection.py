"""The server's end of one agent: run commands, follow processes, keep sessions, move files and archives.

What it is
    `AgentConnection`, which `AgentListener.accept` gives: every method a coroutine, any number at once.

What it does not do
    It starts no container and trusts no agent: code in a sandbox might have taken it over, so every frame is
    checked, every total is capped, and the first breach closes the connection (`AgentLost`).
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from runtime_server.agent import archive, frames
from runtime_server.agent.calls import Call, Wire, heard
from runtime_server.agent.frames import AgentError, AgentLost, Finished, Flag, Kind, frame
from runtime_server.agent.mirror import Mirror
from runtime_server.agent.process import Process
from runtime_server.agent.session import Session

ANSWER_S = 15.0  # beyond a command's own timeout, the agent has this long to report before it counts as lost
FILE_S = 120.0
MAX_OUTPUT = 1 << 20
T = TypeVar("T")


class AgentConnection:
    """One sandbox's agent. Calls beyond what the agent runs at once wait their turn here.

    Every call raises `AgentLost` once the connection is gone, `AgentError` when the agent cannot do it.
    """

    def __init__(self, wire: Wire, pid: int, hello: frames.Hello) -> None:
        self.pid = pid
        self.running = hello.running  # by number: what there is of an earlier connection; see `attach`
        self.max_commands = hello.max_commands
        self.environment: Mapping[str, str] = {}  # under the `env` of every command: what the image wants
        self._wire = wire
        self._slots = wire.slots = asyncio.Semaphore(hello.max_commands)
        self._last = max(hello.running, default=0)
        self._tags = {one.tag: one.number for one in hello.running.values() if one.tag}

    @property
    def closed(self) -> bool:
        return self._wire.gone.done()

    async def wait_closed(self) -> None:
        await asyncio.shield(self._wire.gone)

    async def close(self) -> None:
        """The agent tries to reconnect, and ends its sandbox when nobody answers for its orphan timeout."""
        self._wire.lose("the connection was closed here")
        await self.wait_closed()

    async def exec(
        self,
        argv: Sequence[str],
        *,
        cwd: str | None,
        env: Mapping[str, str],
        stdin: bytes | None,
        timeout_s: float,
        max_output: int,
        tag: str = "",
    ) -> Finished:
        """Runs a program to its end, or to `timeout_s`; keeps `max_output` bytes of each stream.

        `env` goes over the container's own; `stdin` None is /dev/null. A program that is missing (127) or
        cannot be run (126) is a result with a message on stderr; a `cwd` that cannot be entered is an
        AgentError. Cancelling kills whatever the command started. With a `tag` the agent keeps the result
        for `attach` until `release`.
        """
        flags = 0 if stdin is None else Flag.STDIN
        payload = frames.exec_payload(argv, cwd, self._env(env), flags, timeout_s, max_output, None, tag)
        subject = f"{argv[0]!r}" if cwd is None else f"{argv[0]!r} in {cwd!r}"
        result = await self._call(
            Kind.EXEC, payload, subject, max_output, timeout_s + ANSWER_S, stdin, stdin is not None, tag
        )
        return self._expect(Finished, result)

    def _env(self, env: Mapping[str, str] | None) -> Mapping[str, str]:
        return {**self.environment, **(env or {})} if self.environment else env or {}

    async def spawn(
        self,
        argv: Sequence[str],
        *,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        stdin: bool = False,
        pty: tuple[int, int] | None = None,
        timeout_s: float | None = None,
        max_output: int = MAX_OUTPUT,
        tag: str = "",
    ) -> Process:
        """Starts a program and returns once it runs. `pty`: on a terminal of (columns, rows), stdin included.

        AgentError when `cwd` cannot be entered or no terminal is to be had. It outlives this connection.
        """
        flags = Flag.PUSH | (Flag.STDIN if stdin or pty else 0)
        payload = frames.exec_payload(argv, cwd, self._env(env), flags, timeout_s, max_output, pty, tag)
        subject = f"{argv[0]!r}" if cwd is None else f"{argv[0]!r} in {cwd!r}"
        call = await self._open(Kind.EXEC, payload, subject, timeout_s, max_output, tag)
        return await self._begun(call, Process(self._wire, call))

    async def attach(
        self, number: int, offsets: tuple[int, int] = (0, 0), max_output: int = MAX_OUTPUT
    ) -> Process:
        """What an earlier connection started (see `running`), also when it has ended; not a session.

        Its `chunks` go on from `offsets`. AgentError ESRCH when its result was released or gave way.
        """
        call = await self._open(Kind.ATTACH, b"", f"process {number}", None, max_output, number=number)
        call.window = 0  # the agent says how much it takes
        return await self._begun(call, Process(self._wire, call, offsets))

    async def release(self, which: int | str) -> None:
        """Forgets the kept result of a command with this number or tag."""
        number = self._tags.pop(which, 0) if isinstance(which, str) else which
        if number and number not in self._wire.calls:
            self._wire.say(Kind.RELEASE, number)

    async def open_session(
        self,
        *,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        shell: str | None = None,
        pty: tuple[int, int] | None = None,
        tag: str = "",
    ) -> Session:
        """A shell that stays: bash where there is one, else sh; or `shell`.

        AgentError ENOENT in an image without a shell. It outlives this connection.
        """
        shells = [shell] if shell else ["bash", "sh"]
        flags = Flag.STDIN if pty else 0
        payload = frames.exec_payload(shells, cwd, self._env(env), flags, None, 0, pty, tag)
        subject = f"a session of {' or '.join(shells)}" + ("" if cwd is None else f" in {cwd!r}")
        call = await self._open(Kind.OPEN, payload, subject, None, 0, tag)
        return await self._session(call)

    async def attach_session(self, number: int) -> Session:
        """A session of an earlier connection; `running` of it is what it still runs, or had run untold."""
        call = await self._open(Kind.ATTACH, b"", f"session {number}", None, 0, number=number)
        runs = [one for one in self.running.values() if one.kind == "run" and one.session == number]
        current: Process | None = None
        if runs:
            with suppress(AgentError):
                current = await self.attach(max(one.number for one in runs))
        return await self._session(call, current)

    async def _session(self, call: Call, current: Process | None = None) -> Session:
        async with asyncio.timeout(ANSWER_S):
            await self._begun(call, call)
        if call.future.done():
            call.future.result()
        return Session(self._wire, call, self._start_run, current)

    async def _start_run(
        self, payload: Callable[[bool], bytes], subject: str, push: bool, timeout_s: float | None, limit: int
    ) -> tuple[Call, Process | None]:
        call = await self._open(Kind.RUN, payload(push), subject, timeout_s, limit, pushed=push)
        return call, Process(self._wire, call) if push else None

    async def _open(
        self,
        kind: Kind,
        payload: bytes,
        subject: str,
        timeout_s: float | None,
        limit: int,
        tag: str = "",
        number: int = 0,
        pushed: bool = True,
    ) -> Call:
        """Sends the first frame of something that has a life of its own; it may well outlive its caller."""
        if number in self._wire.calls:
            raise AgentError(errno.EBUSY, f"{subject} is followed on this connection already")
        call = await self._send(kind, payload, subject, limit, tag=tag, number=number)
        call.begun = asyncio.get_running_loop().create_future()
        call.future.add_done_callback(heard)
        if pushed:
            call.mirrors = (Mirror(1, limit), Mirror(2, limit))
        if timeout_s is not None:
            self._watch(call, timeout_s + ANSWER_S)
        return call

    def _watch(self, call: Call, after_s: float) -> None:
        """An agent that does not report in time is lost."""
        loop = asyncio.get_running_loop()
        late = f"{call.subject}: the agent did not report within {after_s:.0f} s"
        timer = loop.call_later(after_s, lambda: self._wire.lose(late))
        call.future.add_done_callback(lambda _: timer.cancel())

    async def _begun(self, call: Call, what: T) -> T:
        """`what`, once the call's program runs. Who stops waiting before that stops the program."""
        assert call.begun is not None
        try:
            takes_input = await asyncio.shield(call.begun)
        except asyncio.CancelledError:
            self._cancel(call)
            raise
        call.refuses = call.refuses or not takes_input
        return what

    async def pack(self, path: str, max_bytes: int) -> AsyncGenerator[bytes, None]:
        """A tar of a directory (names relative to it) or a file: files, directories, links that stay inside.

        Made as fast as it is read. AgentError E2BIG once it passes `max_bytes`, which the reader may have had
        by then. A reader that stops early closes it (`aclose`).
        """
        payload = frames.pack_payload(path, max_bytes)
        call = await self._send(Kind.PACK, payload, repr(path), max_bytes)
        call.future.add_done_callback(heard)
        call.content, call.window = deque(), frames.PUSH_WINDOW
        async with aclosing(archive.pack(self._wire, call)) as parts:
            async for data in parts:
                yield data

    async def unpack(
        self, path: str, stream: AsyncIterator[bytes], max_bytes: int, max_entries: int = 100_000
    ) -> int:
        """Unpacks a tar into the directory `path`, which is made; returns the number of entries.

        AgentError EPERM for names and links that lead out, devices and FIFOs; E2BIG; EINVAL for no tar.
        What came before stays. Never writes through a link.
        """
        payload = frames.unpack_payload(path, max_bytes, max_entries)
        call = await self._send(Kind.UNPACK, payload, repr(path), 0)
        call.future.add_done_callback(heard)
        return await archive.unpack(self._wire, call, stream)

    async def write_file(self, path: str, data: bytes, mode: int = 0o644, parents: bool = True) -> int:
        """Writes atomically inside the sandbox, following symbolic links; returns the bytes written."""
        payload = frames.write_payload(path, mode, parents, len(data))
        result = await self._call(Kind.WRITE, payload, repr(path), 0, FILE_S, data)
        written, _ = self._expect(tuple, result)
        if written != len(data):
            self._wire.lose(f"the agent claims to have written {written} of {len(data)} bytes")
            raise AgentLost(self._wire.reason)
        return int(written)

    async def read_file(self, path: str, max_bytes: int) -> bytes:
        """A regular file's bytes. AgentError E2BIG above `max_bytes`, EISDIR, EINVAL (FIFO, device)."""
        payload = frames.read_payload(path, max_bytes)
        size, content = self._expect(
            tuple, await self._call(Kind.READ, payload, repr(path), max_bytes, FILE_S)
        )
        if size != len(content):
            self._wire.lose(f"the agent sent {len(content)} of {size} bytes")
            raise AgentLost(self._wire.reason)
        return bytes(content)

    async def kill_all(self) -> None:
        """Kills every process of the sandbox but the agent, and waits until they are gone."""
        await self._call(Kind.KILL_ALL, b"", "kill_all", 0, ANSWER_S)

    async def ping(self) -> float:
        """Seconds until the agent's answer."""
        loop = asyncio.get_running_loop()
        started, token = loop.time(), os.urandom(8)
        if await self._call(Kind.PING, token, "ping", 0, ANSWER_S) != token:
            self._wire.lose("the agent answered a ping with other bytes")
            raise AgentLost(self._wire.reason)
        return loop.time() - started

    async def _call(
        self,
        kind: Kind,
        payload: bytes,
        subject: str,
        limit: int,
        timeout_s: float,
        feed: bytes | None = None,
        end: bool = False,
        tag: str = "",
    ) -> Any:
        call = await self._send(kind, payload, subject, limit, feed, end, tag)
        return await self._outcome(call, timeout_s)

    async def _send(
        self,
        kind: Kind,
        payload: bytes,
        subject: str,
        limit: int,
        feed: bytes | None = None,
        end: bool = False,
        tag: str = "",
        number: int = 0,
    ) -> Call:
        if self.closed:
            raise AgentLost(self._wire.reason)
        await self._slots.acquire()
        try:
            call = self._begin(subject, limit, feed, end, number)
            self._wire.send(frame(kind, call.number, payload), *call.next_frames())
        except BaseException:  # whatever it was, the place in the queue must not be lost with it
            self._slots.release()
            raise
        if tag:
            self._tags[tag] = call.number
        return call

    def _begin(self, subject: str, limit: int, feed: bytes | None, end: bool, number: int) -> Call:
        if self.closed:
            raise AgentLost(self._wire.reason)
        while not number:
            self._last = self._last % 0xFFFF_FFFE + 1
            if self._last not in self._wire.calls and self._last not in self.running:
                number = self._last
        future = asyncio.get_running_loop().create_future()
        call = Call(number, subject, limit, future, memoryview(feed or b""), unfed=end)
        self._wire.calls[number] = call
        return call

    def _cancel(self, call: Call) -> None:
        if call.number in self._wire.calls:
            call.feed, call.unfed = memoryview(b""), False
            with suppress(AgentLost):
                self._wire.say(Kind.CANCEL, call.number)

    async def _outcome(self, call: Call, timeout_s: float) -> Any:
        """Waits; a caller that stops waiting cancels the call, whose place is free when the agent says so."""
        try:
            async with asyncio.timeout(timeout_s):
                return await call.future
        except TimeoutError as error:
            if call.future.done() and not call.future.cancelled():
                raise
            self._wire.lose(f"{call.subject}: the agent did not report within {timeout_s:.0f} s")
            raise AgentLost(self._wire.reason) from error
        except asyncio.CancelledError:
            self._cancel(call)
            raise

    def _expect(self, kind: type[T], result: Any) -> T:
        if not isinstance(result, kind):
            self._wire.lose("the agent answered another question than was asked")
            raise AgentLost(self._wire.reason)
        return result
