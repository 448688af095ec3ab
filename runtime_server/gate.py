"""What every request passes first: the API key, and the limit of its body.

What it is
    An ASGI layer. The key is compared in constant time (both sides hashed first, so not even its length
    shows). Only `GET /health` without a key passes; a wrong key never does.

What it does not do
    No roles: there is one key, and who has it may do everything.
"""

from __future__ import annotations

import hashlib
import hmac
import time

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime_server.box import MAX_FILE
from runtime_server.errors import BadRequest, SandboxError, TooLarge, Unauthorized
from runtime_server.packing import ARCHIVE_MAX
from runtime_server.wire import API_KEY_HEADER, Failed

_HEADER = API_KEY_HEADER.lower().encode()
MAX_JSON = 64 << 20


class Gate:
    """Lets through who has the key; marks the scope as `authorized`."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        if len(key) < 16:
            raise ValueError("an API key has at least 16 characters")
        self.app, self._digest = app, _digest(key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope["received"] = time.perf_counter()  # how long work waits for its turn is told in the metrics
        try:
            self._check(scope)
        except SandboxError as error:
            body = Failed(error=error.failure()).model_dump_json()
            headers = {"Connection": "close"} if isinstance(error, TooLarge) else None
            await Response(body, error.status, headers, "application/json")(scope, receive, send)
            return
        await self.app(scope, receive if scope["method"] == "PUT" else _counted(receive), send)

    def _check(self, scope: Scope) -> None:
        key, length = _headers(scope)
        if key is None:
            if scope["path"] == "/health" and scope["method"] in ("GET", "HEAD"):
                return
            raise Unauthorized(f"this route needs the server's key in the header {API_KEY_HEADER}")
        if not hmac.compare_digest(_digest(key), self._digest):
            raise Unauthorized("the API key is wrong; the right one is in the run's runtime_api_key.txt")
        scope["authorized"] = True
        limit = MAX_JSON if scope["method"] != "PUT" else _put_limit(scope["path"])
        if length > limit:
            raise _too_large(limit)


def _put_limit(path: str) -> int:
    return ARCHIVE_MAX if path.endswith("/archive") else MAX_FILE


def _counted(receive: Receive) -> Receive:
    """For JSON bodies that come in chunks, without an announced length."""
    left = MAX_JSON

    async def counted() -> Message:
        nonlocal left
        message = await receive()
        left -= len(message.get("body", b""))
        if left < 0:  # the one error that the framework hands through while it reads a body
            raise HTTPException(413, f"the body is larger than the {MAX_JSON} bytes that are allowed")
        return message

    return counted


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _headers(scope: Scope) -> tuple[bytes | None, int]:
    """The key that was sent, if any, and the announced length of the body."""
    key: bytes | None = None
    length = 0
    for name, value in scope["headers"]:
        if name == _HEADER:
            key = value.strip()
        elif name == b"authorization" and key is None and value[:7].lower() == b"bearer ":
            key = value[7:].strip()
        elif name == b"content-length":
            length = int(value) if value.isdigit() else 0
    return key, length


def _too_large(limit: int) -> TooLarge:
    return TooLarge(f"the body is larger than the {limit} bytes that are allowed")


async def read_body(request: Request, limit: int = MAX_FILE) -> bytes:
    """The whole body; one that was not announced is counted while it comes."""
    data = bytearray()
    try:
        async for chunk in request.stream():
            data += chunk
            if len(data) > limit:
                raise _too_large(limit)
    except ClientDisconnect:
        raise BadRequest("the body ended before it was complete") from None
    return bytes(data)
