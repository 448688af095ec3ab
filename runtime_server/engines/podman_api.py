"""Calls to one Podman API service, through the `podman` package's own session in a small pool of threads.

What it is
    `Api.call`: one request with a time limit; a database that is locked for a moment is asked again, a
    service that has died is started again (`revive`), everything else is a SandboxError.

What it does not do
    It knows no containers and no images: `podman.py` and `podman_images.py` do.
"""

from __future__ import annotations

import asyncio
import socket
import traceback
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import requests
from podman import PodmanClient
from podman.errors import APIError

from runtime_server.errors import Internal, NotFound, SandboxError
from runtime_server.wire import Code

T = TypeVar("T")
CALL_S = 60.0
BUSY_TRIES = 4
NO_IMAGE = ("image not known", "no such image")


class Api:
    """See the module's docstring."""

    def __init__(self, threads: int, revive: Callable[[], Awaitable[bool]]) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="podman")
        self._client: PodmanClient | None = None
        self._revive, self._reviving = revive, asyncio.Lock()
        self._life = 0  # of the service: how often it was started again

    def connect(self, address: Path) -> None:
        self._client = PodmanClient(base_url=f"unix://{address}", max_pool_size=16)

    def disconnect(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def close(self) -> None:
        self.disconnect()
        self._threads.shutdown(wait=False)

    async def json(self, method: str, path: str, **options: Any) -> Any:
        return (await self.call(method, path, **options)).json()

    async def call(
        self,
        method: str,
        path: str,
        *,
        data: str | None = None,
        params: dict[str, Any] | None = None,
        timeout_s: float = CALL_S,
        busy: bool = False,
    ) -> Any:
        """One API call; `busy`: one that changes a container, whole or not at all. NotFound on 404
        (image_missing, not_found), else Internal (create_failed). A dead service is started again."""
        session, life = self._session(), self._life
        call: Callable[[], Any] = lambda: _send(session, method, path, data, params, timeout_s)  # noqa: E731
        tries = BUSY_TRIES if busy or method == "GET" else 1  # what does no harm when it is done twice
        for left in range(tries, 0, -1):
            try:
                answer = await self._in_thread(call, whole=busy)
            except (requests.ConnectionError, APIError) as error:
                _let_go(error)
                if not await self._lives_again(life) or left == 1:
                    raise Internal(f"Podman does not answer: {error}", Code.CREATE_FAILED) from error
                life = self._life
                continue
            except requests.RequestException as error:
                _let_go(error)
                raise Internal(f"Podman took longer than {timeout_s:g} s", Code.CREATE_FAILED) from error
            if answer.status_code < 400:
                return answer
            cause = _cause(answer)
            if "database is locked" not in cause or left == 1:
                raise _failure(answer.status_code, path, cause)
        raise AssertionError("unreachable")

    async def _lives_again(self, life: int) -> bool:
        """Whether the service was started again since a call in that life of it: by us, or for another call
        that broke off in the same instant."""
        async with self._reviving:
            if self._life == life:
                self._life += await self._revive()
            return self._life != life

    async def _in_thread(self, call: Callable[[], T], *, whole: bool) -> T:
        """`whole`: who gives up waiting is held until it is over, so that what it did can be undone."""
        work = asyncio.get_running_loop().run_in_executor(self._threads, call)
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            if whole:
                await asyncio.wait({work})
            raise

    def _session(self) -> Any:
        if self._client is None:
            raise Internal("the engine has stopped", Code.SERVER_DRAINING)
        return self._client.api


def _let_go(error: BaseException | None) -> None:
    """Close the socket that could not be connected: the package leaves it to the frames of the failed call,
    and these to the garbage collector, which comes rarely while we serve."""
    while error is not None:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if isinstance(held := frame.f_locals.get("sock"), socket.socket):
                held.close()
        error = error.__cause__ or error.__context__


def _send(
    session: Any, method: str, path: str, data: str | None, params: dict[str, Any] | None, timeout_s: float
) -> Any:
    call = {"GET": session.get, "POST": session.post, "DELETE": session.delete}[method]
    more = {"data": data} if method == "POST" else {}
    return call(path, params=params, timeout=timeout_s, **more)


def _failure(status: int, path: str, cause: str) -> SandboxError:
    """For an image that a container is to be made of, Podman's status is 500 or 404, as versions have it."""
    of_images = path.startswith("/images/") and status == 404
    if of_images or (path == "/containers/create" and any(words in cause for words in NO_IMAGE)):
        return NotFound(f"Podman: {cause}", Code.IMAGE_MISSING)
    if status == 404:
        return NotFound(f"Podman: {cause}")
    return Internal(f"Podman: {cause}", Code.CREATE_FAILED)


def _cause(answer: Any) -> str:
    try:
        body = answer.json()
        return str(body.get("message") or body.get("cause") or body)[:600]
    except (ValueError, AttributeError):
        return str(answer.text)[:600]
