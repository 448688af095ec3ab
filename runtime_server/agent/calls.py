"""Calls in flight on an agent's connection, and the protocol that feeds them: what the event loop talks to.

What it is
    `Call`   one id: what is still to be sent for it, what has come, and who waits for its end
    `Wire`   frames to calls and back; counts every window, and hangs up at the first breach

What it does not do
    It does not know what the calls are for: `connection.py` and the modules beside it do.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field
from typing import Any, cast

from runtime_server.agent import frames
from runtime_server.agent.frames import AgentError, AgentLost, Kind, frame
from runtime_server.agent.mirror import Mirror

ACK_S = 0.005  # the least time between two permissions to push: bounds what one sandbox can flood us with


def heard(future: asyncio.Future[Any]) -> None:
    """Nobody has to ask for the outcome."""
    if not future.cancelled():
        future.exception()


@dataclass(eq=False)
class Call:
    """One id in flight. `feed`: bytes not sent yet; `window`: how many of them may be sent
    now, or, of an archive that is made, how many bytes the agent may send."""

    number: int
    subject: str
    limit: int  # bytes of content, or of each output stream, that the agent may send
    future: asyncio.Future[Any]
    feed: memoryview = field(default_factory=lambda: memoryview(b""))
    window: int = frames.WINDOW
    unfed: bool = False  # the end of the feed has not been said
    parts: tuple[bytearray, bytearray] = field(default_factory=lambda: (bytearray(), bytearray()))
    mirrors: tuple[Mirror, Mirror] | None = None  # of a command whose output is pushed
    content: deque[bytes] | None = None  # of an archive: bytes that nobody has taken
    begun: asyncio.Future[bool] | None = None  # set by STARTED: whether it takes stdin
    waiting: asyncio.Event | None = None  # somebody waits for something new
    refuses: bool = False  # its stdin is closed

    @property
    def changed(self) -> asyncio.Event:
        """Set by the next news; to be taken before looking for what there is."""
        if self.waiting is None:
            self.waiting = asyncio.Event()
        return self.waiting

    def pulse(self) -> None:
        """Wakes everybody who waits for something new."""
        if self.waiting is not None:
            self.waiting.set()
            self.waiting = None

    def take(self, which: int, data: bytes) -> None:
        if which not in (0, 1) or len(self.parts[which]) + len(data) > self.limit:
            raise AgentLost(f"{self.subject}: the agent sent more than the {self.limit} bytes asked for")
        self.parts[which].extend(data)

    def take_content(self, data: bytes) -> None:
        if self.content is None:
            self.take(0, data)
            return
        self.window -= len(data)
        if self.window < 0:
            raise AgentLost(f"{self.subject}: the agent sent more than it was allowed to")
        self.content.append(data)
        self.pulse()

    def settle(self, value: Any) -> None:
        if not self.future.done():
            self.future.set_result(value)
        self._over(None)

    def fail(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)
        self._over(error)

    def _over(self, error: Exception | None) -> None:
        self.refuses = True
        if self.begun is not None and not self.begun.done():
            if error is None:
                self.begun.set_result(False)
            else:
                self.begun.set_exception(error)
                self.begun.exception()
        self.pulse()

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

    def credit(self, count: int) -> list[bytes]:
        if count == frames.STDIN_CLOSED:
            self.feed, self.unfed, self.refuses = memoryview(b""), False, True
            self.pulse()
            return []
        self.window += count
        if self.window > frames.WINDOW:
            raise AgentLost(f"{self.subject}: the agent took more bytes than it was sent")
        out = self.next_frames()
        self.pulse()
        return out

    def result(self, payload: bytes) -> frames.Finished:
        if self.mirrors is None:
            return frames.finished_from(payload, bytes(self.parts[0]), bytes(self.parts[1]))
        return frames.pushed_from(payload, self.mirrors[0].kept(), self.mirrors[1].kept())


class Wire(asyncio.Protocol):
    """Bytes to calls: what the event loop talks to. Knows the calls in flight and who waits for them."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.transport: asyncio.Transport | None = None
        self.calls: dict[int, Call] = {}
        self.hello: asyncio.Future[frames.Hello] = loop.create_future()
        self.gone: asyncio.Future[None] = loop.create_future()
        self.slots: asyncio.Semaphore | None = None
        self.reason = "the sandbox's agent closed the connection"
        self._buffer = bytearray()
        self._unacked = 0
        self._ack_due = False

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

    def lose(self, reason: str) -> AgentLost:
        """Hangs up; everything in flight fails at once. Returns what to raise."""
        self.reason = reason
        if self.transport is not None:
            self.transport.abort()
        self.connection_lost(None)
        return AgentLost(reason)

    def send(self, *out: bytes) -> None:
        if self.transport is None or self.gone.done():
            raise AgentLost(self.reason)
        self.transport.write(b"".join(out))

    def say(self, kind: Kind, number: int, payload: bytes = b"") -> None:
        self.send(frame(kind, number, payload))

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

    def _on_progress(self, kind: int, call: Call, payload: bytes) -> bool:
        if kind == Kind.OUTPUT and payload:
            call.take(payload[0] - 1, payload[1:])
        elif kind == Kind.CHUNK and call.mirrors is not None:
            self._on_chunk(call, *frames.chunk_from(payload))
        elif kind == Kind.CONTENT:
            call.take_content(payload)
        elif kind == Kind.CREDIT and len(payload) == 4:
            if out := call.credit(int.from_bytes(payload, "little")):
                self.send(*out)
        elif kind == Kind.STARTED and call.begun is not None and not call.begun.done():
            call.begun.set_result(frames.started_from(payload))
        else:
            return False
        return True

    def _on_chunk(self, call: Call, stream: int, offset: int, data: bytes) -> None:
        assert call.mirrors is not None
        call.mirrors[stream - 1].take(offset, data)
        call.pulse()
        self._unacked += len(data)
        if self._unacked > frames.PUSH_WINDOW:
            raise AgentLost("the agent pushed more output than it was allowed to")
        if self._unacked >= frames.PUSH_WINDOW // 4 and not self._ack_due:
            self._ack_due = True
            asyncio.get_running_loop().call_later(ACK_S, self._acknowledge)

    def _acknowledge(self) -> None:
        self._ack_due = False
        if not self.gone.done():
            self.say(Kind.ACK, 0, self._unacked.to_bytes(4, "little"))
            self._unacked = 0

    def _on_last(self, kind: int, call: Call, payload: bytes) -> None:
        if kind == Kind.FINISHED:
            call.settle(call.result(payload))
        elif kind == Kind.DONE:
            call.settle((frames.number_from(payload), call.parts[0]))
        elif kind == Kind.FAILED:
            call.fail(frames.failure_from(payload, call.subject))
        elif kind == Kind.PONG:
            call.settle(payload)
        else:
            raise AgentLost(f"the agent sent a frame of unknown kind {kind}")


async def feed(wire: Wire, call: Call, data: bytes) -> None:
    """Sends bytes as fast as the agent takes them. AgentError EPIPE once its end is closed."""
    rest = memoryview(data)
    while rest:
        changed = call.changed
        if call.refuses:
            raise AgentError(32, f"{call.subject}: takes no more input")
        if not call.window:
            await changed.wait()
            continue
        part = rest[: min(frames.CHUNK, call.window)]
        rest = rest[len(part) :]
        call.window -= len(part)
        wire.say(Kind.DATA, call.number, bytes(part))
