"""Who may work in a sandbox: from a path or a key to a runtime that is ready, or an answer that says why not.

What it does not do
    The server's own key opens nothing here. An unknown sandbox and a wrong key look the same.
"""

from __future__ import annotations

from starlette.requests import Request

from runtime_server.box import Box
from runtime_server.dialects.common import Fault, gone
from runtime_server.dialects.keys import SESSION_HEADER
from runtime_server.dialects.records import Phase
from runtime_server.dialects.runtimes import Runtime, Runtimes
from runtime_server.wire import API_KEY_HEADER


def by_path(runtimes: Runtimes, request: Request, header: str, status: int, detail: str) -> Runtime:
    """The runtime that the path names, when the header holds its key. Fault `status` otherwise."""
    found = runtimes.of_key(request.headers.get(header))
    if found is None or found.id != request.path_params["runtime"]:
        raise Fault(status, detail)
    return found


def v0(runtimes: Runtimes, request: Request) -> Runtime:
    return by_path(runtimes, request, SESSION_HEADER, 403, "Invalid API Key")


def swerex(runtimes: Runtimes, request: Request) -> Runtime:
    return by_path(runtimes, request, API_KEY_HEADER, 401, "Invalid API Key")


def v1(runtimes: Runtimes, request: Request) -> Runtime:
    """Its url has no path: the key alone says which sandbox."""
    found = runtimes.of_key(request.headers.get(SESSION_HEADER))
    if found is None:
        raise Fault(401, "Invalid API Key")
    return found


def ready(runtime: Runtime, paused: int = 503) -> Box:
    """Its sandbox, when one can work with it. Fault 502 when it is over, `paused` while it is paused."""
    runtime.touch()
    if (end := runtime.end) is not None:
        raise gone(end)
    if runtime.phase == Phase.PAUSED:
        raise Fault(paused, "the runtime is paused: POST /resume with its runtime_id")
    if runtime.phase == Phase.STOPPED or runtime.box is None:
        raise Fault(502, "infra:died the runtime was stopped or is not ready")
    return runtime.box
