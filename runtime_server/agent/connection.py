"""The server's end of the agent's wire: accept the agent of one sandbox, run many calls at once over it.

What it is
    `AgentListener`    a Unix socket that only the sandbox's first process can make anything of
    `AgentConnection`  exec, write_file, read_file, kill_all, ping; each a coroutine, any number at once

What it does not do
    It starts no container and trusts no agent: code in a sandbox might have taken it over, so every frame is
    checked, every total is capped, and the first breach closes the connection (`AgentLost`).
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

from runtime_server.agent import frames
from runtime_server.agent.frames import AgentLost, Finished, Kind, frame

SOCKET_PATH_MAX = 107
ANSWER_S = 15.0  # beyond a command's own timeout, the agent has this long to report before it counts as lost
FILE_S = 120.0
_PEER = struct.Struct("3i")
T = TypeVar("T")


@dataclass(eq=False)
class _Call:
    """One id in flight. `feed`: bytes not sent yet; `window`: how many of them may be sent now."""

    number: int
    subject: str
    limit: int  # bytes of content, or of each output stream, that the agent may send
    future: asyncio.Future[Any]
    feed: memoryview = field(default_factory=lambda: memoryview(b""))
    window: int = frames.WINDOW
    unfed: bool = False  # the end of the feed has not been said
    parts: tuple[bytearray, bytearray] = field(default_factory=lambda: (bytearray(), bytearray()))

    def take(self, which: int, data: bytes) -> None:
        if which not in (0, 1) or len(self.parts[which]) + len(data) > self.limit:
            raise AgentLost(f"{self.subject}: the agent sent more than the {self.limit} bytes asked for")
        self.parts[which].extend(data)

    def settle(self, value: Any) -> None:
        if not self.future.done():
            self.future.set_result(value)

    def fail(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)

    def next_frames(self) -> list[bytes]:
        """What the window allows to be sent now."""
        out: list[bytes] = []
        while self.feed and self.window:
            part = self.feed[: min(frames.CHUNK, self.window)]
            self.feed = self.feed[len(part) :]
            self.window -= len(part)
            out.append(frame(Kind.DATA, self.number, bytes(part)))
        if self.unfed and not self.feed:
            self.unfed = False
            out.append(frame(Kind.DATA, self.number))
        return out


class _Wire(asyncio.Protocol):
    """Bytes to calls: what the event loop talks to. Knows the calls in flight and who waits for them."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.transport: asyncio.Transport | None = None
        self.calls: dict[int, _Call] = {}
        self.hello: asyncio.Future[frames.Hello] = loop.create_future()
        self.gone: asyncio.Future[None] = loop.create_future()
        self.slots: asyncio.Semaphore | None = None
        self.reason = "the sandbox's agent closed the connection"
        self._buffer = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports have every method of asyncio.Transport and do not inherit from it
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        lost = AgentLost(self.reason if exc is None else f"{self.reason} ({exc})")
        for call in self.calls.values():
            call.fail(lost)
        self.calls.clear()
        if not self.hello.done():
            self.hello.set_exception(lost)
            self.hello.exception()  # nobody has to ask for it
        if not self.gone.done():
            self.gone.set_result(None)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        try:
            for kind, number, payload in frames.split(self._buffer):
                self._on_frame(kind, number, payload)
        except AgentLost as error:
            self.lose(str(error))

    def lose(self, reason: str) -> None:
        """Hangs up; everything in flight fails at once."""
        self.reason = reason
        if self.transport is not None:
            self.transport.abort()
        self.connection_lost(None)

    def send(self, *out: bytes) -> None:
        if self.transport is None or self.gone.done():
            raise AgentLost(self.reason)
        self.transport.write(b"".join(out))

    def _on_frame(self, kind: int, number: int, payload: bytes) -> None:
        if self.gone.done():
            return
        if not self.hello.done():
            if kind != Kind.HELLO:
                raise AgentLost("the agent did not greet")
            self.hello.set_result(frames.hello_from(payload))
            return
        call = self.calls.get(number)
        if call is None:
            raise AgentLost(f"the agent speaks of call {number}, which is not in flight")
        if not self._on_progress(kind, call, payload):
            self._on_last(kind, call, payload)
            del self.calls[number]
            if self.slots is not None:
                self.slots.release()

    def _on_progress(self, kind: int, call: _Call, payload: bytes) -> bool:
        if kind == Kind.OUTPUT and payload:
            call.take(payload[0] - 1, payload[1:])
        elif kind == Kind.CONTENT:
            call.take(0, payload)
        elif kind == Kind.CREDIT and len(payload) == 4:
            self._on_credit(call, int.from_bytes(payload, "little"))
        else:
            return False
        return True

    def _on_credit(self, call: _Call, count: int) -> None:
        if count == frames.STDIN_CLOSED:
            call.feed, call.unfed = memoryview(b""), False
            return
        call.window += count
        if call.window > frames.WINDOW:
            raise AgentLost(f"{call.subject}: the agent took more bytes than it was sent")
        if out := call.next_frames():
            self.send(*out)

    def _on_last(self, kind: int, call: _Call, payload: bytes) -> None:
        if kind == Kind.FINISHED:
            call.settle(frames.finished_from(payload, bytes(call.parts[0]), bytes(call.parts[1])))
        elif kind == Kind.DONE:
            call.settle((frames.number_from(payload), call.parts[0]))
        elif kind == Kind.FAILED:
            call.fail(frames.failure_from(payload, call.subject))
        elif kind == Kind.PONG:
            call.settle(payload)
        else:
            raise AgentLost(f"the agent sent a frame of unknown kind {kind}")


class AgentConnection:
    """One sandbox's agent. Calls beyond what the agent runs at once wait their turn here.

    Every call raises `AgentLost` once the connection is gone, `AgentError` when the agent cannot do it.
    """

    def __init__(self, wire: _Wire, pid: int, hello: frames.Hello) -> None:
        self.pid = pid
        self.running = hello.running  # commands of an earlier connection, still running in the sandbox
        self.max_commands = hello.max_commands
        self._wire = wire
        self._slots = wire.slots = asyncio.Semaphore(hello.max_commands)
        self._last = max(hello.running, default=0)

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
    ) -> Finished:
        """Runs a program to its end, or to `timeout_s`; keeps `max_output` bytes of each stream.

        `env` goes over the container's own; `stdin` None is /dev/null. A program that is missing (127) or
        cannot be run (126) is a result with a message on stderr; a `cwd` that cannot be entered is an
        AgentError. Cancelling kills whatever the command started.
        """
        payload = frames.exec_payload(argv, cwd, env, stdin is not None, timeout_s, max_output)
        subject = f"{argv[0]!r}" if cwd is None else f"{argv[0]!r} in {cwd!r}"
        result = await self._call(
            Kind.EXEC, payload, subject, max_output, timeout_s + ANSWER_S, stdin, end=stdin is not None
        )
        return self._expect(Finished, result)

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
    ) -> Any:
        if self.closed:
            raise AgentLost(self._wire.reason)
        await self._slots.acquire()
        try:
            call = self._begin(subject, limit, feed, end)
            self._wire.send(frame(kind, call.number, payload), *call.next_frames())
        except BaseException:  # whatever it was, the place in the queue must not be lost with it
            self._slots.release()
            raise
        return await self._outcome(call, timeout_s)

    def _begin(self, subject: str, limit: int, feed: bytes | None, end: bool) -> _Call:
        if self.closed:
            raise AgentLost(self._wire.reason)
        while True:
            self._last = self._last % 0xFFFF_FFFE + 1
            if self._last not in self._wire.calls and self._last not in self.running:
                break
        future = asyncio.get_running_loop().create_future()
        call = _Call(self._last, subject, limit, future, memoryview(feed or b""), unfed=end)
        self._wire.calls[call.number] = call
        return call

    async def _outcome(self, call: _Call, timeout_s: float) -> Any:
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
            if call.number in self._wire.calls:
                call.feed, call.unfed = memoryview(b""), False
                with suppress(AgentLost):
                    self._wire.send(frame(Kind.CANCEL, call.number))
            raise

    def _expect(self, kind: type[T], result: Any) -> T:
        if not isinstance(result, kind):
            self._wire.lose("the agent answered another question than was asked")
            raise AgentLost(self._wire.reason)
        return result


class AgentListener:
    """The socket one sandbox's agent connects to. Listening starts before the container does."""

    def __init__(self, socket_path: Path) -> None:
        if len(os.fsencode(socket_path)) > SOCKET_PATH_MAX:
            raise ValueError(
                f"{socket_path} is longer than the {SOCKET_PATH_MAX} bytes a Unix socket's path may have: "
                "choose a shorter directory"
            )
        self.path = socket_path
        self._socket: socket.socket | None = None

    async def start(self) -> None:
        """Listens; the agent may run as any user of the sandbox, so the socket is open to all who see it."""
        await self.close()
        server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            server.bind(os.fspath(self.path))
            self.path.chmod(0o777)
            server.listen(16)
        except OSError:
            server.close()
            raise
        self._socket = server

    async def accept(self, pid: int | None, timeout_s: float) -> AgentConnection:
        """The agent, once it has greeted; then nobody else can connect. Listens first when it has to.

        `pid` is the container's first process as this host sees it; every other peer is hung up on. None
        takes whoever comes. AgentLost when the agent does not appear within `timeout_s`.
        """
        if self._socket is None:
            await self.start()
        try:
            async with asyncio.timeout(timeout_s):
                while (connection := await self._accept_one(pid)) is None:
                    pass
        except TimeoutError as error:
            raise AgentLost(f"the sandbox's agent did not connect within {timeout_s:g} s") from error
        await self.close()
        return connection

    async def close(self) -> None:
        """Stops listening and removes the socket file."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        self.path.unlink(missing_ok=True)

    async def _accept_one(self, pid: int | None) -> AgentConnection | None:
        assert self._socket is not None
        loop = asyncio.get_running_loop()
        peer, _ = await loop.sock_accept(self._socket)
        who = _PEER.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))[0]
        if pid is not None and who != pid:
            peer.close()
            return None
        _, wire = await loop.create_unix_connection(_Wire, sock=peer)
        try:
            hello = await wire.hello
            wire.send(frame(Kind.WELCOME, 0, frames.PROTOCOL.to_bytes(4, "little")))
        except AgentLost:
            return None
        except asyncio.CancelledError:
            wire.lose("nobody waits for this agent any more")
            raise
        return AgentConnection(wire, who, hello)
