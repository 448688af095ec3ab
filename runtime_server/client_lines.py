"""Kept connections that carry one short request at a time: what a client's quick calls go over.

What it is
    `Lines` of one server, and `Answer`. A general HTTP client costs a millisecond of processor for each call,
    as much as everything that happens inside of the sandbox; this one costs a tenth of that.

How to use it
    lines = Lines.of("http://host:port"); answer = await lines.ask(head_and_body, timeout_s)

What it does not do
    Plain HTTP/1.1 only, no TLS, no proxy, no redirect, no request that is larger than a socket takes at once:
    `client_calls.py` gives those to httpx. It repeats nothing: who asks knows what may be repeated, by the
    kind of `Broken` that is raised.
"""

from __future__ import annotations

import asyncio
import select
import socket
from collections import deque
from dataclasses import dataclass
from typing import Any, Self, cast
from urllib.parse import urlsplit

import httptools

CONNECT_S = 5.0
IDLE_S = 60.0  # less than the server's, so that a request does not meet a connection that is being closed
IDLE_MOST = 512
EYEBALLS_S = 0.25  # until another address of the same name is tried, beside the first
# A node that lost power says no goodbye: a call that waits there for an answer must not wait for as long as
# a command may run. Half a minute without any sign of the other machine breaks the connection.
ALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000),
)


@dataclass(slots=True)
class Answer:
    """What a server said, whole."""

    status: int
    content: bytes
    url: str = ""

    @property
    def good(self) -> bool:
        return 200 <= self.status < 300

    @property
    def text(self) -> str:
        return self.content.decode(errors="replace")


class Broken(Exception):
    """There is no answer. `unsent`: the server cannot have seen the request; `late`: it may still work."""

    def __init__(self, message: str, *, unsent: bool = False, late: bool = False) -> None:
        super().__init__(message)
        self.unsent, self.late = unsent, late


class Line(asyncio.Protocol):
    """One connection, and the one request that is on it."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.open, self.since = True, 0.0
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[Answer] | None = None
        self._silent_s = self._heard = 0.0
        self._parser = httptools.HttpResponseParser(self)
        self._body: list[bytes] = []
        self._sized = self._to_the_end = False

    # --- what the one who asks does ---

    async def ask(self, request: bytes, silent_s: float) -> Answer:
        """Raises Broken when it ends without an answer, or nothing is heard for `silent_s`."""
        assert self._transport is not None
        answer: asyncio.Future[Answer] = self.loop.create_future()
        self._answer = answer
        self._silent_s, self._heard = silent_s, self.loop.time()
        self._timer = self.loop.call_at(self._heard + silent_s, self._tick)
        self._transport.write(request)
        try:
            return await answer
        except BaseException:  # also who stops waiting: the server must see it, and nobody reads the rest
            self.abort()
            raise
        finally:
            self._answer = None
            self._timer.cancel()

    def quiet(self) -> bool:
        """Whether it can be used (again): it is open and the server has neither said anything nor hung up,
        which the loop may not have had the time to notice."""
        return self.open and not self._look.poll(0)

    def abort(self) -> None:
        self.open = False
        if self._transport is not None and not self.loop.is_closed():
            self._transport.abort()

    # --- what the event loop does ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's do not inherit from it
        plug = transport.get_extra_info("socket")
        for option in ALIVE:
            plug.setsockopt(*option)
        self._look = select.poll()
        self._look.register(plug.fileno(), select.POLLIN)

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False
        if exc is None and self._to_the_end:
            self.on_message_complete()
        self._fail(Broken(f"the connection was lost ({exc})" if exc else "the server closed the connection"))

    def data_received(self, data: bytes) -> None:
        self._heard = self.loop.time()
        if self._answer is None:  # nobody has asked: a proxy's farewell
            self.abort()
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(Broken(f"what came is no HTTP ({error})"))
            self.abort()

    def _tick(self) -> None:
        left = self._heard + self._silent_s - self.loop.time()
        if left > 0:
            self._timer = self.loop.call_later(left, self._tick)
        else:
            self._fail(Broken(f"no answer within {self._silent_s:.0f} s", late=True))

    def _fail(self, error: Broken) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)

    # --- what the parser says ---

    def on_message_begin(self) -> None:
        self._sized = self._to_the_end = False
        if self._answer is None or self._answer.done():  # more than was asked for
            self.abort()

    def on_header(self, name: bytes, _: bytes) -> None:
        self._sized |= name.lower() in (b"content-length", b"transfer-encoding")

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        self._to_the_end = not self._sized and status >= 200 and status not in (204, 304)

    def on_body(self, data: bytes) -> None:
        self._body.append(data)

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200:  # the answer comes after it
            return
        body, self._body, self._to_the_end = self._body, [], False
        if not self._parser.should_keep_alive() or self._unsaid():
            self.abort()
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(Answer(status, body[0] if len(body) == 1 else b"".join(body)))

    def _unsaid(self) -> bool:
        """Answered before all of the request was sent: what follows would be taken for another one."""
        return self._transport is None or self._transport.get_write_buffer_size() > 0


class Lines:
    """The connections to one server that wait for their next request; as many more as are needed."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._idle: deque[Line] = deque()  # the last that was used is the next to be

    @classmethod
    def of(cls, url: str) -> Self | None:
        """None for what is not plain HTTP."""
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            return None
        return cls(parts.hostname, parts.port or 80)

    async def ask(self, request: bytes, silent_s: float) -> Answer:
        line = self._kept() or await self._connect()
        answer = await line.ask(request, silent_s)
        self._keep(line)
        return answer

    async def close(self) -> None:
        while self._idle:
            self._idle.pop().abort()
        await asyncio.sleep(0)  # the loop closes them in its next turn

    def _kept(self) -> Line | None:
        loop = asyncio.get_running_loop()
        while self._idle:
            line = self._idle.pop()
            if line.loop is loop and loop.time() - line.since < IDLE_S and line.quiet():
                return line
            line.abort()
        return None

    def _keep(self, line: Line) -> None:
        line.since = line.loop.time()
        if line.open:
            self._idle.append(line)
        while self._idle and self._too_old(self._idle[0], line.since):
            self._idle.popleft().abort()

    def _too_old(self, line: Line, now: float) -> bool:
        return not line.open or now - line.since > IDLE_S or len(self._idle) > IDLE_MOST

    async def _connect(self) -> Line:
        loop = asyncio.get_running_loop()
        both: dict[str, Any] = {}
        if isinstance(loop, asyncio.BaseEventLoop):  # uvloop tries one address after the other
            both = {"happy_eyeballs_delay": EYEBALLS_S}
        try:
            async with asyncio.timeout(CONNECT_S):
                _, line = await loop.create_connection(Line, self._host, self._port, **both)
        except TimeoutError:
            raise Broken(f"no connection within {CONNECT_S:.0f} s", unsent=True) from None
        except OSError as error:
            raise Broken(str(error), unsent=True) from error
        return line
