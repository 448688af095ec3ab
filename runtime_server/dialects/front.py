"""The door to the dialects: which paths are theirs, who may pass, how large a body may be.

What it is
    An ASGI layer around the server's own API, whose paths it leaves alone. The control API opens with
    the server's key, everything inside a sandbox with that sandbox's session key and nothing else.

How to use it
    app.add_middleware(Front, runtimes=Runtimes(sandboxes), key=key)

What it does not do
    It forwards nothing. No redirects, no HTML, no 429, no 500 without a JSON object.
"""

from __future__ import annotations

import hmac
import logging

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime_server.box import MAX_FILE
from runtime_server.dialects.common import Fault, answer, gone
from runtime_server.dialects.control import Control
from runtime_server.dialects.keys import digest
from runtime_server.dialects.runtimes import Runtimes
from runtime_server.dialects.swerex import SweRex
from runtime_server.dialects.v0 import V0
from runtime_server.dialects.v1 import V1
from runtime_server.errors import SandboxError
from runtime_server.wire import API_KEY_HEADER

log = logging.getLogger("runtime_server")

CONTROL = frozenset({"start", "stop", "pause", "resume", "sessions", "runtime", "list"})
CONTROL |= {"registry_prefix", "image_exists", "build", "build_status"}
INSIDE = frozenset({"sandbox", "api", "alive", "ready", "server_info", "sockets"})
BODY_MAX = MAX_FILE + (MAX_FILE >> 1)  # a file in base64, or in a form


class Front:
    """See the module's docstring."""

    def __init__(self, app: ASGIApp, runtimes: Runtimes, key: str) -> None:
        self.app, self._digest = app, digest(key)
        self.inside = _application(runtimes, key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope.get("path", "")
        if scope["type"] != "http" or path.startswith("/v1/"):
            await self.app(scope, receive, send)
            return
        first = path[1:].partition("/")[0]
        if first not in CONTROL and first not in INSIDE:
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if refusal := self._refusal(first, headers):
            await refusal(scope, receive, send)
            return
        await self.inside(scope, _counted(receive), send)

    def _refusal(self, first: str, headers: Headers) -> Response | None:
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > BODY_MAX:
            return _closing(413, f"the body is larger than the {BODY_MAX} bytes that are allowed")
        if first in CONTROL and not hmac.compare_digest(digest(_key(headers)), self._digest):
            return answer({"detail": f"this needs the server's key in the header {API_KEY_HEADER}"}, 401)
        return None


def _key(headers: Headers) -> str:
    bearer = headers.get("authorization", "")
    return headers.get(API_KEY_HEADER) or (bearer[7:].strip() if bearer[:7].lower() == "bearer " else "")


def _closing(status: int, detail: str) -> Response:
    response = answer({"detail": detail}, status)
    response.headers["connection"] = "close"
    return response


def _counted(receive: Receive) -> Receive:
    """For bodies that come in chunks, without an announced length."""
    left = BODY_MAX

    async def counted() -> Message:
        nonlocal left
        message = await receive()
        left -= len(message.get("body", b""))
        if left < 0:
            raise HTTPException(413, f"the body is larger than the {BODY_MAX} bytes that are allowed")
        return message

    return counted


def _application(runtimes: Runtimes, key: str) -> Starlette:
    # SWE-ReX first: its base is a path below V0's
    parts = (Control(runtimes, key), SweRex(runtimes), V0(runtimes), V1(runtimes))
    app = Starlette(routes=[route for part in parts for route in part.routes()])
    app.router.redirect_slashes = False  # their clients follow none
    app.add_exception_handler(Fault, _fault)
    app.add_exception_handler(SandboxError, _sandbox)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _unknown)
    return app


async def _fault(_: Request, error: Exception) -> Response:
    assert isinstance(error, Fault)
    return answer(error.body, error.status)


async def _sandbox(_: Request, error: Exception) -> Response:
    """Ours, said as the dialects say it: 4xx stay, what the server cannot do is 502."""
    assert isinstance(error, SandboxError)
    if error.status < 500 and error.status != 410:
        return answer({"detail": str(error)}, error.status)
    fault = gone(error)
    return answer(fault.body, fault.status)


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return answer({"detail": f"{request.method} {request.url.path}: {error.detail}"}, error.status_code)


async def _unknown(_: Request, error: Exception) -> Response:  # uvicorn's log has the traceback
    return answer({"detail": f"the server made a mistake ({type(error).__name__}); its log says more"}, 500)
