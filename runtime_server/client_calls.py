"""How a client calls the server: one request, tried again where that does no harm, and streams of events.

What it is
    `Calls`, the base of `runtime_server.client.Client`: the connections, the key, what an answer means.

What it does not do
    It knows no route.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import socket
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import TypeVar

import httpx
from pydantic import BaseModel, TypeAdapter, ValidationError

from runtime_server import wire
from runtime_server.errors import BY_STATUS, Internal, Unavailable, from_failure
from runtime_server.wire import API_KEY_HEADER, IDEMPOTENCY_HEADER, Code

M = TypeVar("M", bound=BaseModel)
CONNECT_S = 5.0
CALL_S = 60.0
QUIET_S = 35.0  # a stream says every ten seconds that it is alive
TRIES = 4
# A node that lost power says no goodbye: a call that waits there for an answer must not wait for as long as
# a command may run. Half a minute without any sign of the other machine breaks the connection.
_ALIVE = [
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000),
]
Content = bytes | Callable[[], AsyncIterator[bytes]] | None  # the latter makes it anew for every try
Event = wire.OutputStarted | wire.OutputChunk | wire.OutputAlive | wire.OutputEnd | wire.OutputError
EVENT: TypeAdapter[Event] = TypeAdapter(wire.OutputEvent)


def once(key: str | None = None) -> dict[str, str]:
    """Sent with a call that must not happen twice, so that it may be sent twice. None: a fresh key."""
    return {IDEMPOTENCY_HEADER: key or secrets.token_hex(16)}


class Dropped(Exception):
    """A stream broke off before its last event: it may be asked for again, from where it was."""


class Calls:
    """One server. Any number of calls at once."""

    def __init__(self, url: str, key: str, *, tries: int = TRIES) -> None:
        self.url = url.rstrip("/")
        self._tries = tries
        self._headers = {API_KEY_HEADER: key, "Host": httpx.URL(self.url).netloc.decode()}
        # httpx without its client, whose redirects, cookies and proxies of the environment (which must
        # never see the key) are of no use here and cost every command a quarter of a millisecond
        self._http = httpx.AsyncHTTPTransport(
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=512, keepalive_expiry=60),
            trust_env=False,
            socket_options=_ALIVE,
            verify=ssl.create_default_context() if self.url.startswith("https") else False,
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def _get(self, path: str, kind: type[M], params: Mapping[str, str] | None = None) -> M:
        return parse(await self._send("GET", path, params=params, again=True), kind)

    async def _send(
        self,
        method: str,
        path: str,
        *,
        body: BaseModel | None = None,
        content: Content = None,
        params: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = CALL_S,
        again: bool = False,
    ) -> httpx.Response:
        """One call; `again` says that repeating it does no harm. Raises SandboxError."""
        for left in range(self._tries - 1, -1, -1):
            request = self._request(method, path, body, content, params, headers, timeout_s)
            try:
                async with aclosing(await self._http.handle_async_request(request)) as response:
                    response.request = request
                    await response.aread()
                return checked(response)
            except httpx.TransportError as error:
                unsent = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
                late = isinstance(error, httpx.ReadTimeout)
                if not left or late or not (again or unsent):
                    raise self._unreachable(method, path, error) from error
            await pause(self._tries - left)
        raise AssertionError("unreachable")

    def _request(
        self,
        method: str,
        path: str,
        body: BaseModel | None,
        content: Content,
        params: Mapping[str, str] | None,
        headers: Mapping[str, str] | None,
        timeout_s: float,
    ) -> httpx.Request:
        sent = {**self._headers, **(headers or {})}
        if body is not None:
            sent["Content-Type"] = "application/json"
            content = body.model_dump_json(exclude_none=True).encode()
        limits = {"connect": CONNECT_S, "read": timeout_s, "write": timeout_s, "pool": None}
        return httpx.Request(
            method,
            self.url + path,
            params=params,
            headers=sent,
            content=content() if callable(content) else content,
            extensions={"timeout": limits},
        )

    @asynccontextmanager
    async def _open(
        self,
        method: str,
        path: str,
        *,
        body: BaseModel | None = None,
        params: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = QUIET_S,
    ) -> AsyncIterator[httpx.Response]:
        """An answer whose body is read by the caller. Raises SandboxError, and Dropped while it is read."""
        request = self._request(method, path, body, None, params, headers, timeout_s)
        try:
            async with aclosing(await self._http.handle_async_request(request)) as response:
                response.request = request
                if not response.is_success:
                    await response.aread()
                    checked(response)
                yield response
        except httpx.TransportError as error:
            raise Dropped(str(self._unreachable(method, path, error))) from error

    async def _events(
        self,
        method: str,
        path: str,
        *,
        body: BaseModel | None = None,
        params: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> AsyncGenerator[Event, None]:
        """Up to the last event. Raises SandboxError, also one that came as an event; Dropped."""
        opened = self._open(method, path, body=body, params=params, headers=headers)
        async with opened as response, aclosing(_lines(response)) as lines:
            async for line in lines:
                event = EVENT.validate_json(line)
                if isinstance(event, wire.OutputError):
                    raise from_failure(event.status, event.error)
                yield event
                if isinstance(event, wire.OutputEnd):
                    return
        raise Dropped(f"{method} {self.url}{path}: the stream ended before its last event")

    def _unreachable(self, method: str, path: str, error: Exception) -> Unavailable:
        return Unavailable(
            f"{method} {self.url}{path}: {error or type(error).__name__}. Is the sandbox server running? "
            "`orchestrate status` tells.",
            Code.UNREACHABLE,
        )


async def pause(tried: int) -> None:
    await asyncio.sleep(0.1 * 2**tried * random.uniform(0.5, 1))  # noqa: S311 - jitter


async def _lines(response: httpx.Response) -> AsyncGenerator[bytes, None]:
    """The complete ones; what a broken connection left of the last is none."""
    rest = bytearray()
    async for data in response.aiter_bytes():
        rest += data
        *lines, last = rest.split(b"\n")
        rest = bytearray(last)
        for line in lines:
            yield bytes(line)


def checked(response: httpx.Response) -> httpx.Response:
    """The answer, or the error that it stands for."""
    if response.is_success:
        return response
    try:
        failed = wire.Failed.model_validate_json(response.content)
    except ValidationError:  # not our server's word: a proxy's, or a crash
        kind = BY_STATUS.get(response.status_code, Internal)
        raise kind(f"{response.status_code} from {response.url}: {response.text[:200]}") from None
    raise from_failure(response.status_code, failed.error)


def parse(response: httpx.Response, kind: type[M]) -> M:
    try:
        return kind.model_validate_json(response.content)
    except ValidationError as error:
        raise Internal(f"{response.url} answered something else than {kind.__name__}: {error}") from None
