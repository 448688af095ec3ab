"""uvicorn's HTTP protocol with bounds on what comes before a body: how much of it, and for how long.

What it is
    uvicorn takes headers of any size, for any time, from anybody: a client without a key could fill the
    memory, or hold every descriptor. Here a request line and its headers have `HEAD_MAX` bytes and
    `HEAD_S` seconds together; then the connection ends, with 431 where an answer can still be given.

How to use it
    uvicorn.Config(app, http=Bounded)

    An answer's head and body, which uvicorn writes one after the other, go out together: that is one system
    call less, and the client wakes up once.

    A connection tells who works for it that its client has left: `scope[DEPARTURE].ends_task()`.

What it does not do
    How large a body may be is the gate's; here only: what was answered before all of it came has no longer.
    A request whose head comes in one piece costs nothing but a comparison.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

DEPARTURE = "orchestrate.departure"
HEAD_MAX = 64 << 10
SMALL = 4 << 10  # a head; what is larger is a body, and waits for nothing
HEAD_S = 30.0
_REFUSAL = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\n"
    b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%s"
)
_SAID = (
    b'{"error":{"code":"too_large","message":"the headers are larger than the %d bytes that are allowed"}}'
)


class Departure:
    """Of the client of one connection: without it each request needs a task that waits for nothing else."""

    def __init__(self) -> None:
        self.gone = False
        self._working: set[asyncio.Task[Any]] = set()

    @contextmanager
    def ends_task(self) -> Iterator[None]:
        """For the time of this `with` the current task is cancelled when the client leaves."""
        task = asyncio.current_task()
        assert task is not None
        if self.gone:
            task.cancel()
        self._working.add(task)
        try:
            yield
        finally:
            self._working.discard(task)

    def happens(self) -> None:
        self.gone = True
        for task in self._working:
            task.cancel()


class Together:
    """A transport that sends at once what was written in one turn of the event loop."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._parts: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if not self._parts and len(data) < SMALL:
            self._loop.call_soon(self._flush)
            self._parts.append(data)
            return
        self._parts.append(data)
        self._flush()

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        parts, self._parts = self._parts, []
        if parts and not self._transport.is_closing():
            self._transport.write(parts[0] if len(parts) == 1 else b"".join(parts))


class Bounded(HttpToolsProtocol):
    """See the module's docstring."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._in_head, self._came, self._held = True, 0, 0
        self._departure = Departure()
        self._late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(cast(asyncio.Transport, Together(transport, self.loop)))
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._rest()
        super().connection_lost(exc)
        self._departure.happens()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._in_head and self.parser is not None and not self.transport.is_closing():
            self._came += len(data)
            if self._came > HEAD_MAX:
                self._refuse()
            elif self._late is None:
                self._wait()

    def on_message_begin(self) -> None:
        self._in_head, self._came, self._held = True, 0, 0
        super().on_message_begin()
        self.scope[DEPARTURE] = self._departure  # type: ignore[literal-required]  # ASGI lets servers add keys

    def on_url(self, url: bytes) -> None:
        self._hold(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._hold(len(name) + len(value) + 4)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._rest()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        if self._held > HEAD_MAX:
            self._refuse()
        else:
            super().send_400_response(msg)

    def on_response_complete(self) -> None:
        """A body that was answered before all of it came is not waited for much longer: it may never end."""
        super().on_response_complete()
        if self.cycle.more_body and not self.pipeline and self._late is None:
            self._wait()

    def on_message_complete(self) -> None:
        self._rest()
        super().on_message_complete()

    def _hold(self, size: int) -> None:
        """What is raised in here is the parser's error, and answered by `send_400_response`."""
        self._held += size
        if self._held > HEAD_MAX:
            raise ValueError("the head of the request is too large")

    def _wait(self) -> None:
        self._late = self.loop.call_later(HEAD_S, self.timeout_keep_alive_handler)

    def _rest(self) -> None:
        late, self._late = self._late, None
        if late is not None:
            late.cancel()

    def _refuse(self) -> None:
        said = _SAID % HEAD_MAX
        self.transport.write(_REFUSAL % (len(said), said))
        self.transport.close()
