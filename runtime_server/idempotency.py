"""A mutating call that is repeated with the same Idempotency-Key has one effect, and the same answer.

What it is
    An ASGI layer behind the gate. The first call with a key does the work; one that comes while it runs
    waits for its answer, and one that comes later gets the answer again: for an hour, unless newer answers
    need the room. A key belongs to its method and path. A call with a key goes on when its client hangs up,
    for the client is expected to ask again. What failed is not kept: it may be tried again.

How to use it
    app.add_middleware(Idempotency)

What it does not do
    A PUT has the same effect however often it is sent, and needs none of this. A create has a mechanism of
    its own, tied to the sandbox it made (`sandboxes.py`). An answer that is streamed is not kept: a repeat
    is told where to go on reading. Nothing outlives the server.
"""

from __future__ import annotations

import asyncio
import hashlib
import marshal
import time
from collections import OrderedDict
from dataclasses import dataclass, field

from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime_server.errors import BadRequest, Conflict, SandboxError, TooLarge, Unavailable
from runtime_server.wire import IDEMPOTENCY_HEADER, KEY_MAX, Code, Failed

KEPT_S = 3600.0
KEPT_ANSWERS = 10_000
KEPT_BYTES = 64 << 20
STREAMS = (b"application/x-ndjson", b"text/event-stream")
_HEADER = IDEMPOTENCY_HEADER.lower().encode()
_OWN = "/v1/sandboxes"
_METHODS = ("POST", "DELETE")


@dataclass(eq=False)
class _Answer:
    """What the first call with a key said, as far as it has."""

    asked: bytes  # a digest of the whole request
    messages: list[Message] = field(default_factory=list)
    streamed: bool = False
    told: asyncio.Event = field(default_factory=asyncio.Event)  # it is over, or streamed

    @property
    def good(self) -> bool:
        return bool(self.messages) and 200 <= self.messages[0]["status"] < 300

    async def say(self, send: Send) -> None:
        for message in self.messages:
            await send(message)

    def kept(self) -> _Kept:
        start, *rest = self.messages
        body = b"".join(message.get("body", b"") for message in rest)
        said = marshal.dumps((start["status"], [(*pair,) for pair in start["headers"]], body))
        return _Kept(self.asked, said, self.streamed, time.monotonic())


@dataclass(eq=False, frozen=True, slots=True)
class _Kept:
    """The same, once it is over: thousands are kept, so each is two strings of bytes."""

    asked: bytes
    said: bytes
    streamed: bool
    over: float

    @property
    def size(self) -> int:
        return len(self.said)

    async def say(self, send: Send) -> None:
        status, headers, body = marshal.loads(self.said)  # noqa: S302 - of our own making
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


class Idempotency:
    """See the module's docstring. Lives in one event loop."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._running: dict[bytes, _Answer] = {}
        self._kept: OrderedDict[bytes, _Kept] = OrderedDict()
        self._bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in _METHODS:
            await self.app(scope, receive, send)
            return
        key = next((value for name, value in scope["headers"] if name == _HEADER), None)
        if key is None or scope["path"] == _OWN:
            await self.app(scope, receive, send)
            return
        try:
            await self._once(key, scope, receive, send)
        except SandboxError as error:
            body = Failed(error=error.failure()).model_dump_json()
            await Response(body, error.status, media_type="application/json")(scope, receive, send)

    async def _once(self, key: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        if not 1 <= len(key) <= KEY_MAX:
            raise BadRequest(f"an {IDEMPOTENCY_HEADER} has 1 to {KEY_MAX} characters")
        body = await _whole(receive)
        if body is None:
            return
        asked, key = _digest(scope, body), f"{scope['method']} {scope['path']} ".encode() + key
        answer: _Answer | _Kept | None = self._running.get(key) or self._kept.get(key)
        if answer is None:
            await self._first(key, _Answer(asked), scope, body, send)
        elif answer.asked != asked:
            raise BadRequest(f"this {IDEMPOTENCY_HEADER} was used for another request; take a new one")
        else:
            await _repeat(answer, send)

    async def _first(self, key: bytes, answer: _Answer, scope: Scope, body: bytes, send: Send) -> None:
        self._running[key] = answer

        async def take(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer.streamed = _is_stream(message)
            if not answer.streamed or not answer.messages:
                answer.messages.append(message)
            if answer.streamed:
                answer.told.set()
                await send(message)

        try:
            await self.app(scope, _given(body), take)
        finally:  # also when the server stops: those who wait must not wait for ever
            self._settle(key, answer)
            if not answer.streamed:
                await answer.say(send)

    def _settle(self, key: bytes, answer: _Answer) -> None:
        del self._running[key]
        answer.told.set()
        if answer.good:
            self._kept[key] = kept = answer.kept()
            self._bytes += kept.size
        self._forget()

    def _forget(self) -> None:
        """The oldest, where they are old or too many."""
        while self._kept:
            key, oldest = next(iter(self._kept.items()))
            few = len(self._kept) <= KEPT_ANSWERS and self._bytes <= KEPT_BYTES
            if few and oldest.over > time.monotonic() - KEPT_S:
                return
            del self._kept[key]
            self._bytes -= oldest.size


async def _repeat(answer: _Answer | _Kept, send: Send) -> None:
    if isinstance(answer, _Answer):
        await answer.told.wait()
    if answer.streamed:
        raise Conflict(
            "this call was made before, and its answer is a stream: go on with GET …/output", Code.STREAMED
        )
    if isinstance(answer, _Answer) and not answer.messages:
        raise Unavailable("the first call with this key was broken off: repeat it", Code.SERVER_DRAINING)
    await answer.say(send)


def _is_stream(start: Message) -> bool:
    kind = next((value for name, value in start["headers"] if name.lower() == b"content-type"), b"")
    return bool(kind.startswith(STREAMS))


def _digest(scope: Scope, body: bytes) -> bytes:
    line = f"{scope['method']} {scope['path']} ".encode() + scope["query_string"] + b"\n"
    return hashlib.sha256(line + body).digest()


async def _whole(receive: Receive) -> bytes | None:
    """The body; None when the client left before it was complete. The gate limits its size."""
    body = bytearray()
    while True:
        try:
            message = await receive()
        except HTTPException as error:  # how the gate speaks to the framework, which is further inside
            raise TooLarge(error.detail) from None
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if not message.get("more_body"):
            return bytes(body)


def _given(body: bytes) -> Receive:
    """The body once; after that, a client that never hangs up."""
    given = False

    async def receive() -> Message:
        nonlocal given
        if given:
            await asyncio.Event().wait()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive
