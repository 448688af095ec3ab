"""The short way of the one call that nearly every request is: a command that is waited for.

What it is
    An ASGI layer behind the gate, in front of everything else. A request that is as clients send it (whole,
    JSON, valid, without an Idempotency-Key) is answered here, without what a framework does for the general
    case: that costs more processor than the command. Whatever is different in any respect goes on to the
    route of the same path in `app.py`, before anything has been done for it; so what is said about it, errors
    and the OpenAPI document are the route's.

How to use it
    app.add_middleware(Quick, boxes=sandboxes, refused=…)

What it does not do
    Nothing that the route would not. It needs `listening.Bounded` below it, which tells when a client leaves.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from pydantic import ValidationError
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime_server import wire
from runtime_server.errors import SandboxError
from runtime_server.listening import DEPARTURE, Departure
from runtime_server.sandboxes import Sandboxes

_BEFORE, _AFTER = "/v1/sandboxes/", "/exec"
_KEY, _TYPE = wire.IDEMPOTENCY_HEADER.lower().encode(), b"content-type"


class Quick:
    """See the module's docstring. `refused` makes the answer that an error is."""

    def __init__(self, app: ASGIApp, boxes: Sandboxes, refused: Callable[[SandboxError], Response]) -> None:
        self.app, self._boxes, self._refused = app, boxes, refused
        phases = boxes.metrics.exec_phase
        self._queue, self._serialise = phases["queue"], phases["serialise"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        identity = _sandbox(scope)
        if not identity:
            await self.app(scope, receive, send)
            return
        message = await receive()
        request = _request(message)
        if request is None:
            await self.app(scope, _again(message, receive), send)
        else:
            await self._answer(scope, identity, request, send)

    async def _answer(self, scope: Scope, identity: str, request: wire.Exec, send: Send) -> None:
        self._queue.observe(time.perf_counter() - scope["received"])
        departure: Departure = scope[DEPARTURE]
        try:
            with departure.ends_task():
                result = await self._boxes.exec(identity, request)
        except SandboxError as error:
            await self._refused(error)(scope, receive=_nothing, send=send)
            return
        except asyncio.CancelledError:
            if departure.gone:  # nobody reads it
                return
            raise
        start = time.perf_counter()
        body = result.model_dump_json().encode()
        self._serialise.observe(time.perf_counter() - start)
        headers = [(b"content-length", b"%d" % len(body)), (_TYPE, b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def _sandbox(scope: Scope) -> str:
    """The id in the path of a request that may go the short way; "" for all others."""
    if scope["type"] != "http" or scope["method"] != "POST" or DEPARTURE not in scope:
        return ""
    path: str = scope["path"]
    if not (path.startswith(_BEFORE) and path.endswith(_AFTER)) or scope["query_string"]:
        return ""
    typed = False
    for name, value in scope["headers"]:
        if name == _TYPE:
            typed = value == b"application/json"
        elif name == _KEY:
            return ""
    identity = path[len(_BEFORE) : -len(_AFTER)]
    return identity if typed and "/" not in identity else ""


def _request(message: Message) -> wire.Exec | None:
    """None for a body that came in parts, or not at all, or is wrong in any way."""
    if message["type"] != "http.request" or message.get("more_body"):
        return None
    try:
        return wire.Exec.model_validate_json(message["body"])
    except ValidationError:
        return None


def _again(first: Message, receive: Receive) -> Receive:
    """What was received, and then what comes."""
    waiting = [first]

    async def received() -> Message:
        return waiting.pop() if waiting else await receive()

    return received


async def _nothing() -> Message:
    raise AssertionError("an answer asks for nothing")
