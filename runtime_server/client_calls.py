"""How a client calls the server: one request, tried again where that does no harm, and streams of events.

What it is
    `Calls`, the base of `runtime_server.client.Client`: the connections, the key, what an answer means.

What it does not do
    It knows no route.
"""

from __future__ import annotations

import asyncio
import random
import re
import secrets
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import TypeVar
from urllib.parse import urlsplit

import httpx
from pydantic import BaseModel, TypeAdapter, ValidationError

from runtime_server import wire
from runtime_server.client_lines import ALIVE, CONNECT_S, Answer, Broken, Lines
from runtime_server.errors import BY_STATUS, Internal, Unavailable, from_failure
from runtime_server.wire import API_KEY_HEADER, IDEMPOTENCY_HEADER, Code

M = TypeVar("M", bound=BaseModel)
CALL_S = 60.0
QUIET_S = 35.0  # a stream says every ten seconds that it is alive
TRIES = 4
SHORT = 64 << 10  # a request that a socket takes at once
_PLAIN_PATH = re.compile(r"(?:/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)+")  # nothing to be quoted or shortened
_PLAIN_VALUE = re.compile(r"[\x21-\x7e]*")
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
        self._lines = Lines.of(self.url)
        self._base = urlsplit(self.url).path
        self._head = "".join(f"{name}: {value}\r\n" for name, value in self._headers.items())
        # for what is long, streamed or goes over TLS: httpx without its client, whose redirects, cookies and
        # proxies of the environment (which must never see the key) are of no use here
        self._http = httpx.AsyncHTTPTransport(
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=512, keepalive_expiry=60),
            trust_env=False,
            socket_options=ALIVE,
            verify=ssl.create_default_context() if self.url.startswith("https") else False,
        )

    async def close(self) -> None:
        if self._lines is not None:
            await self._lines.close()
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
    ) -> Answer:
        """One call; `again` says that repeating it does no harm. Raises SandboxError."""
        if body is not None:
            content, headers = said(body, headers)
        short = self._short(method, path, content, headers or {}) if not params else None
        for left in range(self._tries - 1, -1, -1):
            try:
                if short is not None and self._lines is not None:
                    return checked(await self._lines.ask(short, timeout_s), self.url + path)
                return await self._long(self._request(method, path, content, params, headers, timeout_s))
            except Broken as error:
                if not left or error.late or not (again or error.unsent):
                    raise self._unreachable(method, path, error) from error
            await pause(self._tries - left)
        raise AssertionError("unreachable")

    def _short(self, method: str, path: str, content: Content, headers: Mapping[str, str]) -> bytes | None:
        """The request as it goes over the wire; None for one that httpx has to say, or refuse."""
        size = len(content) if isinstance(content, bytes) else 0
        values = (*self._headers.values(), *headers.values())
        if (
            callable(content)
            or size > SHORT
            or not _PLAIN_PATH.fullmatch(self._base + path)
            or not all(map(_PLAIN_VALUE.fullmatch, values))
        ):
            return None
        more = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        head = f"{method} {self._base}{path} HTTP/1.1\r\n{self._head}{more}Content-Length: {size}\r\n\r\n"
        return head.encode() + (content or b"")

    async def _long(self, request: httpx.Request) -> Answer:
        try:
            async with aclosing(await self._http.handle_async_request(request)) as response:
                content = await response.aread()
        except httpx.TransportError as error:
            unsent = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
            late = isinstance(error, httpx.ReadTimeout)
            raise Broken(str(error) or type(error).__name__, unsent=unsent, late=late) from error
        return checked(Answer(response.status_code, content), str(request.url))

    def _request(
        self,
        method: str,
        path: str,
        content: Content,
        params: Mapping[str, str] | None,
        headers: Mapping[str, str] | None,
        timeout_s: float,
    ) -> httpx.Request:
        limits = {"connect": CONNECT_S, "read": timeout_s, "write": timeout_s, "pool": None}
        return httpx.Request(
            method,
            self.url + path,
            params=params,
            headers={**self._headers, **(headers or {})},
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
        content, headers = said(body, headers)
        request = self._request(method, path, content, params, headers, timeout_s)
        try:
            async with aclosing(await self._http.handle_async_request(request)) as response:
                if not response.is_success:
                    checked(Answer(response.status_code, await response.aread()), str(request.url))
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


def said(body: BaseModel | None, headers: Mapping[str, str] | None) -> tuple[bytes | None, Mapping[str, str]]:
    """A body as it is sent, and the headers that go with it."""
    if body is None:
        return None, headers or {}
    typed = {"Content-Type": "application/json", **(headers or {})}
    return body.model_dump_json(exclude_none=True).encode(), typed


def checked(answer: Answer, url: str) -> Answer:
    """The answer, or the error that it stands for."""
    if answer.good:
        answer.url = url
        return answer
    try:
        failed = wire.Failed.model_validate_json(answer.content)
    except ValidationError:  # not our server's word: a proxy's, or a crash
        kind = BY_STATUS.get(answer.status, Internal)
        raise kind(f"{answer.status} from {url}: {answer.text[:200]}") from None
    raise from_failure(answer.status, failed.error)


def parse(answer: Answer, kind: type[M]) -> M:
    try:
        return kind.model_validate_json(answer.content)
    except ValidationError as error:
        raise Internal(f"{answer.url} answered something else than {kind.__name__}: {error}") from None
