"""The client of the sandbox server: the same methods as the thing that is served.

How to use it
    async with Client(url, key) as client:
        async with client.sandbox() as sandbox:                 # always deleted at the end
            result = await sandbox.exec("echo hello")
            print(result.stdout.text)

Errors
    Those of `runtime_server.errors`, whichever side they come from: what the server answers is raised as
    it was there; a server that cannot be reached is `Unavailable` with the code `unreachable`.

What it does not do
    A command that may have arrived is never sent again: whether it ran cannot be known. Tried again is
    what means the same when repeated: reading, deleting, renewing, writing a file, and a create, which
    carries an Idempotency-Key.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import socket
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Self, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from runtime_server import wire
from runtime_server.errors import BY_STATUS, Internal, SandboxError, Unavailable, from_failure
from runtime_server.wire import API_KEY_HEADER, IDEMPOTENCY_HEADER, Code

M = TypeVar("M", bound=BaseModel)
CONNECT_S = 5.0
CALL_S = 60.0
EXEC_GRACE_S = 30.0  # an answer may come so much later than the command's own time limit
DEFAULT_COMMAND_S = 86_400.0  # no limit in the request: the server's holds, which we do not know
CREATE_S = 900.0
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


class Client:
    """One server. Any number of calls at once; close it, or use it as a context manager."""

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

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    # --- the server ---

    async def health(self) -> wire.Health:
        return await self._get("/health", wire.Health)

    async def capabilities(self) -> wire.Capabilities:
        return await self._get("/v1/capabilities", wire.Capabilities)

    async def metrics(self) -> str:
        return (await self._send("GET", "/metrics", again=True)).text

    # --- sandboxes ---

    async def create(self, request: wire.CreateSandbox | None = None, key: str | None = None) -> wire.Sandbox:
        """A new sandbox; waits while the server is full. `key`: the Idempotency-Key, a fresh one if None."""
        body = request or wire.CreateSandbox()
        wait_s = CREATE_S if body.queue_timeout_s is None else body.queue_timeout_s + 2 * CALL_S
        headers = {IDEMPOTENCY_HEADER: key or secrets.token_hex(16)}
        got = await self._send(
            "POST", "/v1/sandboxes", body=body, headers=headers, timeout_s=wait_s, again=True
        )
        return _parse(got, wire.Sandbox)

    async def get(self, sandbox: str) -> wire.Sandbox:
        return await self._get(f"/v1/sandboxes/{sandbox}", wire.Sandbox)

    async def list(self) -> wire.SandboxList:
        return await self._get("/v1/sandboxes", wire.SandboxList)

    async def renew(self, sandbox: str, ttl_s: float) -> wire.Sandbox:
        body = wire.Renew(ttl_s=ttl_s)
        got = await self._send("POST", f"/v1/sandboxes/{sandbox}/renew", body=body, again=True)
        return _parse(got, wire.Sandbox)

    async def delete(self, sandbox: str) -> None:
        """Deleting what is not there (any more) is no error."""
        try:
            await self._send("DELETE", f"/v1/sandboxes/{sandbox}", again=True)
        except SandboxError as error:
            if error.code != Code.SANDBOX_NOT_FOUND:
                raise

    @asynccontextmanager
    async def sandbox(self, request: wire.CreateSandbox | None = None) -> AsyncIterator[BoundSandbox]:
        """A sandbox for the time of a `with`; deleted also when the caller fails or is cancelled."""
        creating = asyncio.ensure_future(self.create(request))
        try:
            made = await asyncio.shield(creating)
        except asyncio.CancelledError:
            with suppress(SandboxError):
                await self.delete((await creating).id)
            raise
        try:
            yield BoundSandbox(self, made)
        finally:
            with suppress(SandboxError):  # it expires by itself; what went wrong inside is more important
                await asyncio.shield(self.delete(made.id))

    # --- in a sandbox ---

    async def exec(self, sandbox: str, request: wire.Exec) -> wire.ExecResult:
        """Run a command, once. A timeout is a result, with the output up to then."""
        wait_s = (request.timeout_s or DEFAULT_COMMAND_S) + EXEC_GRACE_S
        path = f"/v1/sandboxes/{sandbox}/exec"
        return _parse(await self._send("POST", path, body=request, timeout_s=wait_s), wire.ExecResult)

    async def kill(self, sandbox: str) -> None:
        """End every process in it, background ones too; its files stay."""
        await self._send("POST", f"/v1/sandboxes/{sandbox}/kill", again=True)

    async def write_file(self, sandbox: str, path: str, data: bytes, mode: int = 0o644) -> wire.FileInfo:
        """Replace a file as a whole; missing folders are made."""
        params = {"path": path, "mode": f"{mode:03o}"}
        where = f"/v1/sandboxes/{sandbox}/files"
        got = await self._send("PUT", where, params=params, content=data, timeout_s=2 * CALL_S, again=True)
        return _parse(got, wire.FileInfo)

    async def read_file(self, sandbox: str, path: str) -> bytes:
        where = f"/v1/sandboxes/{sandbox}/files"
        got = await self._send("GET", where, params={"path": path}, timeout_s=2 * CALL_S, again=True)
        return got.content

    # --- calls ---

    async def _get(self, path: str, kind: type[M]) -> M:
        return _parse(await self._send("GET", path, again=True), kind)

    async def _send(
        self,
        method: str,
        path: str,
        *,
        body: BaseModel | None = None,
        content: bytes | None = None,
        params: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = CALL_S,
        again: bool = False,
    ) -> httpx.Response:
        """One call; `again` says that repeating it does no harm. Raises SandboxError."""
        sent = {**self._headers, **(headers or {})}
        if body is not None:
            sent["Content-Type"] = "application/json"
            content = body.model_dump_json(exclude_none=True).encode()
        limits = {"connect": CONNECT_S, "read": timeout_s, "write": timeout_s, "pool": None}
        request = httpx.Request(
            method,
            self.url + path,
            params=params,
            headers=sent,
            content=content,
            extensions={"timeout": limits},
        )
        for left in range(self._tries - 1, -1, -1):
            try:
                async with aclosing(await self._http.handle_async_request(request)) as response:
                    response.request = request
                    await response.aread()
                return _checked(response)
            except httpx.TransportError as error:
                unsent = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
                late = isinstance(error, httpx.ReadTimeout)
                if not left or late or not (again or unsent):
                    raise self._unreachable(method, path, error) from error
            await asyncio.sleep(0.1 * 2 ** (self._tries - left) * random.uniform(0.5, 1))  # noqa: S311 - jitter
        raise AssertionError("unreachable")

    def _unreachable(self, method: str, path: str, error: Exception) -> Unavailable:
        return Unavailable(
            f"{method} {self.url}{path}: {error or type(error).__name__}. Is the sandbox server running? "
            "`orchestrate status` tells.",
            Code.UNREACHABLE,
        )


@dataclass(frozen=True)
class BoundSandbox:
    """One sandbox and its client: the calls of `Client` without the id."""

    client: Client
    record: wire.Sandbox

    @property
    def id(self) -> str:
        return self.record.id

    async def exec(
        self,
        command: str | list[str],
        *,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        stdin: str | None = None,
        timeout_s: float | None = None,
        max_output: int | None = None,
    ) -> wire.ExecResult:
        request = wire.Exec(
            command=command,
            cwd=cwd,
            env=dict(env or {}),
            stdin=stdin,
            timeout_s=timeout_s,
            max_output=max_output,
        )
        return await self.client.exec(self.id, request)

    async def kill(self) -> None:
        await self.client.kill(self.id)

    async def write_file(self, path: str, data: bytes, mode: int = 0o644) -> wire.FileInfo:
        return await self.client.write_file(self.id, path, data, mode)

    async def read_file(self, path: str) -> bytes:
        return await self.client.read_file(self.id, path)

    async def renew(self, ttl_s: float) -> wire.Sandbox:
        return await self.client.renew(self.id, ttl_s)

    async def delete(self) -> None:
        await self.client.delete(self.id)


def _checked(response: httpx.Response) -> httpx.Response:
    """The answer, or the error that it stands for."""
    if response.is_success:
        return response
    try:
        failed = wire.Failed.model_validate_json(response.content)
    except ValidationError:  # not our server's word: a proxy's, or a crash
        kind = BY_STATUS.get(response.status_code, Internal)
        raise kind(f"{response.status_code} from {response.url}: {response.text[:200]}") from None
    raise from_failure(response.status_code, failed.error)


def _parse(response: httpx.Response, kind: type[M]) -> M:
    try:
        return kind.model_validate_json(response.content)
    except ValidationError as error:
        raise Internal(f"{response.url} answered something else than {kind.__name__}: {error}") from None
