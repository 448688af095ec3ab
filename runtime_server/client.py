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
    carries an Idempotency-Key; and what else carries one: starting a process, opening a session, input,
    signals.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from runtime_server import wire
from runtime_server.client_archives import DOWN_MAX, ArchiveCalls
from runtime_server.client_calls import CALL_S, once, parse
from runtime_server.client_lifecycle import LifecycleCalls
from runtime_server.client_running import (
    DEFAULT_COMMAND_S,
    GRACE_S,
    RemoteProcess,
    RemoteSession,
    RunningCalls,
)
from runtime_server.errors import SandboxError
from runtime_server.wire import Code

CREATE_S = 900.0


class Client(RunningCalls, ArchiveCalls, LifecycleCalls):
    """One server. Any number of calls at once; close it, or use it as a context manager."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

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
        headers = once(key)
        got = await self._send(
            "POST", "/v1/sandboxes", body=body, headers=headers, timeout_s=wait_s, again=True
        )
        return parse(got, wire.Sandbox)

    async def get(self, sandbox: str) -> wire.Sandbox:
        return await self._get(f"/v1/sandboxes/{sandbox}", wire.Sandbox)

    async def list(self) -> wire.SandboxList:
        return await self._get("/v1/sandboxes", wire.SandboxList)

    async def renew(self, sandbox: str, ttl_s: float) -> wire.Sandbox:
        body = wire.Renew(ttl_s=ttl_s)
        got = await self._send("POST", f"/v1/sandboxes/{sandbox}/renew", body=body, again=True)
        return parse(got, wire.Sandbox)

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
        wait_s = (request.timeout_s or DEFAULT_COMMAND_S) + GRACE_S
        path = f"/v1/sandboxes/{sandbox}/exec"
        return parse(await self._send("POST", path, body=request, timeout_s=wait_s), wire.ExecResult)

    async def kill(self, sandbox: str) -> None:
        """End every process in it, background ones too; its files stay."""
        await self._send("POST", f"/v1/sandboxes/{sandbox}/kill", again=True)

    async def write_file(self, sandbox: str, path: str, data: bytes, mode: int = 0o644) -> wire.FileInfo:
        """Replace a file as a whole; missing folders are made."""
        params = {"path": path, "mode": f"{mode:03o}"}
        where = f"/v1/sandboxes/{sandbox}/files"
        got = await self._send("PUT", where, params=params, content=data, timeout_s=2 * CALL_S, again=True)
        return parse(got, wire.FileInfo)

    async def read_file(self, sandbox: str, path: str) -> bytes:
        where = f"/v1/sandboxes/{sandbox}/files"
        got = await self._send("GET", where, params={"path": path}, timeout_s=2 * CALL_S, again=True)
        return got.content


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

    async def start(
        self,
        command: str | list[str],
        *,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        stdin: bool = False,
        pty: wire.Terminal | None = None,
        timeout_s: float | None = None,
        max_output: int | None = None,
    ) -> RemoteProcess:
        """A process that goes on by itself, whose output can be followed and come back to."""
        request = wire.StartProcess(
            command=command,
            cwd=cwd,
            env=dict(env or {}),
            stdin=stdin,
            pty=pty,
            timeout_s=timeout_s,
            max_output=max_output,
        )
        return RemoteProcess(self.client, self.id, await self.client.start(self.id, request))

    @asynccontextmanager
    async def session(self, request: wire.OpenSession | None = None) -> AsyncIterator[RemoteSession]:
        """A shell that stays, for the time of a `with`."""
        opened = await self.client.open_session(self.id, request or wire.OpenSession())
        try:
            yield RemoteSession(self.client, self.id, opened)
        finally:
            with suppress(SandboxError):  # it goes with its sandbox; what went wrong inside is more important
                await asyncio.shield(self.client.close_session(self.id, opened.name))

    async def upload_dir(self, local: Path, remote: str = ".") -> wire.Unpacked:
        return await self.client.upload_dir(self.id, local, remote)

    async def download_dir(self, remote: str, local: Path, max_bytes: int = DOWN_MAX) -> int:
        return await self.client.download_dir(self.id, remote, local, max_bytes)

    async def renew(self, ttl_s: float) -> wire.Sandbox:
        return await self.client.renew(self.id, ttl_s)

    async def delete(self) -> None:
        await self.client.delete(self.id)
