"""One sandbox of the runtime server as a workspace, and whose fault it is when a call fails.

What it is
    `SandboxWorkspace` runs commands, shells and the hidden test in one sandbox. `blame` turns the service's
    errors into ours: what the policy cannot have caused (server gone, queue full, create failed, sandbox
    expired or forgotten, its first process killed, which nothing inside can do) is `Lost`; a sandbox that its
    own processes filled with memory is `Broken`; a wrong key or a request that makes no sense is `Refused`.
    A command that timed out or ran out of memory is a plain result.

How to use it
    workspace = SandboxWorkspace(task=task, client=client, sandbox=sandbox); await workspace.prepare()

What it does not do
    It makes and removes no sandbox (`trainer.environments.sandbox`).
"""

from __future__ import annotations

import asyncio
import posixpath
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from runtime_server.errors import SandboxError
from runtime_server.wire import (
    Code,
    CreateSandbox,
    Exec,
    ExecResult,
    OpenSession,
    Run,
    Sandbox,
    Session,
    SessionResult,
)
from trainer.environments import CommandResult, Timings, Verdict, Workspace
from trainer.environments.places import SandboxPlace
from trainer.errors import Broken, EnvironmentFailure, Lost, NoFile, Refused
from trainer.rewards import judge
from trainer.tasks import Task

GRACE_S = 30.0
"""How long an answer may be later than the command's own time limit."""
SETUP_TIMEOUT_S = 300.0
KEPT_FOR_LOG = 4096

_MISTAKES = {Code.UNAUTHORIZED, Code.BAD_REQUEST, Code.NOT_FOUND}
# What a policy can bring about in a living sandbox: a command line too long, a directory that it
# removed, a directory where a file of the hidden test must go. Never a reason to stop the run.
_IMPOSSIBLE = {Code.BAD_REQUEST, Code.TOO_LARGE, Code.FILE_ERROR, Code.FILE_NOT_FOUND}


class Service(Protocol):
    """The part of `runtime_server.client.Client` that an episode needs; each may raise SandboxError."""

    async def create(self, request: CreateSandbox) -> Sandbox: ...

    async def exec(self, sandbox: str, request: Exec) -> ExecResult: ...

    async def kill(self, sandbox: str) -> None: ...

    async def write_file(self, sandbox: str, path: str, data: bytes, mode: int = 0o644) -> object: ...

    async def delete(self, sandbox: str) -> None: ...

    async def capabilities(self) -> object: ...

    async def close(self) -> None: ...


@runtime_checkable
class Several(Service, Protocol):
    """A service behind which servers come and go (`runtime_server.fleet.Fleet`)."""

    async def life(self) -> object: ...

    async def client_of(self, sandbox: str) -> Service: ...


@runtime_checkable
class Running(Service, Protocol):
    """A service with shells that stay, and files that can be read: one server."""

    async def open_session(self, sandbox: str, request: OpenSession) -> Session: ...

    async def run(self, sandbox: str, name: str, request: Run) -> SessionResult: ...

    async def read_file(self, sandbox: str, path: str) -> bytes: ...


@contextmanager
def blame(what: str, *, policy: bool) -> Iterator[None]:
    """Turn the service's errors into ours. `policy` says whether the policy has acted already."""
    try:
        yield
    except TimeoutError as error:
        raise Lost(f"{what}: no answer in time") from error
    except SandboxError as error:
        raise _blamed(what, error, policy) from error


def _blamed(what: str, error: SandboxError, policy: bool) -> EnvironmentFailure:
    text = f"{what}: {error.code}: {error}"
    if error.code in _MISTAKES:
        return Refused(text)
    if policy and error.code == Code.OOM:
        return Broken(text)
    # We made it and did not remove it, so a sandbox that the server does not know was lost by the server.
    return Lost(text)


@contextmanager
def _told(path: str) -> Iterator[None]:
    """What is wrong with a file, to the policy."""
    try:
        yield
    except SandboxError as error:
        if error.code in _IMPOSSIBLE:
            raise NoFile(f"{path}: {error}") from error
        raise


def _result(result: ExecResult) -> CommandResult:
    said = (result.stdout, result.stderr)
    output, left_out = b"".join(stream.raw for stream in said), sum(stream.dropped for stream in said)
    return CommandResult(output, result.exit_code, result.timed_out, left_out)


@dataclass
class SandboxWorkspace(Timings):
    """One sandbox of the runtime server."""

    task: Task = field(kw_only=True)
    client: Service = field(kw_only=True)
    sandbox: Sandbox = field(kw_only=True)
    again: Callable[[Task], AbstractAsyncContextManager[Workspace]] = field(kw_only=True)
    """Opens another one, for a judge."""
    session: str | None = None

    async def run(self, command: str, timeout_s: float, max_output: int) -> CommandResult:
        with blame("command", policy=True):
            try:
                result = await self._exec(command, timeout_s, max_output)
            except SandboxError as error:
                if error.code in _IMPOSSIBLE:
                    return CommandResult(str(error).encode(), 126)
                raise
        return _result(result)

    async def say(self, command: str, timeout_s: float, max_output: int) -> CommandResult:
        with blame("command", policy=True):
            try:
                return await self._said(command, timeout_s, max_output)
            except SandboxError as error:
                if error.code in _IMPOSSIBLE:
                    return CommandResult(str(error).encode(), 126)
                raise

    async def _said(self, command: str, timeout_s: float, max_output: int) -> CommandResult:
        """In the shell that stays, or in a new one where that has ended."""
        calls = await self._running()
        for first in (True, False):
            if self.session is None:
                opened = await calls.open_session(
                    self.sandbox.id, OpenSession(cwd=self.sandbox.workdir or None)
                )
                self.session, first = opened.name, False
            told = Run(command=command, timeout_s=timeout_s, max_output=max_output)
            try:
                async with asyncio.timeout(timeout_s + GRACE_S):
                    result = await calls.run(self.sandbox.id, self.session, told)
            except SandboxError as error:
                if first and error.code in (Code.SESSION_ENDED, Code.SESSION_NOT_FOUND):
                    self.session = None
                    continue
                raise
            self.session = None if result.ended else self.session
            return _result(result)
        raise AssertionError("unreachable: a new session answers or raises")

    async def read(self, path: str, max_bytes: int) -> bytes:
        with blame("read", policy=True), _told(path):
            async with asyncio.timeout(GRACE_S):
                data = await (await self._running()).read_file(self.sandbox.id, self._at(path))
        if len(data) > max_bytes:
            raise NoFile(f"{path} is longer than {max_bytes} bytes")
        return data

    async def write(self, path: str, data: bytes) -> None:
        at = self._at(path)
        with blame("write", policy=True), _told(path):
            found = await self._exec(f"stat -c %a -- {shlex.quote(at)}", GRACE_S, 64)
            mode = found.stdout.text.strip()
            async with asyncio.timeout(GRACE_S):
                await self.client.write_file(self.sandbox.id, at, data, int(mode, 8) if found.ok else 0o644)

    def _at(self, path: str) -> str:
        return posixpath.join(self.sandbox.workdir, path)

    async def _running(self) -> Running:
        """The one server that has this sandbox, for calls that a fleet does not pass on."""
        client = self.client
        if isinstance(client, Several):
            client = await client.client_of(self.sandbox.id)
        if not isinstance(client, Running):
            raise Refused(f"{type(client).__name__} has no sessions and files, which an agent's tools need")
        return client

    async def verify(self, answer: str = "") -> Verdict:
        start = time.perf_counter()
        try:
            return await judge(self.task, SandboxPlace(self), answer)
        finally:
            self.add("verify_s", time.perf_counter() - start)

    async def prepare(self) -> None:
        """The task's set-up. Whatever fails here, the policy has not acted yet."""
        start = time.perf_counter()
        with blame("set-up", policy=False):
            await self._write(self.task.setup.files)
            for command in self.task.setup.commands:
                result = await self._exec(command, SETUP_TIMEOUT_S, KEPT_FOR_LOG)
                if not result.ok:
                    said = result.stderr.text.strip()[-500:]
                    raise Lost(f"set-up: {command!r} ended with {result.exit_code}: {said}")
            if hidden := self.task.setup.hidden:
                await self._exec("rm -rf -- " + shlex.join(hidden), SETUP_TIMEOUT_S, KEPT_FOR_LOG)
        self.add("setup_s", time.perf_counter() - start)

    async def _exec(self, command: str, timeout_s: float, max_output: int) -> ExecResult:
        request = Exec(
            command=command, cwd=self.sandbox.workdir or None, timeout_s=timeout_s, max_output=max_output
        )
        async with asyncio.timeout(timeout_s + GRACE_S):
            return await self.client.exec(self.sandbox.id, request)

    async def _write(self, files: Mapping[str, str]) -> None:
        for name, content in files.items():
            path = posixpath.join(self.sandbox.workdir, name)
            async with asyncio.timeout(GRACE_S):
                await self.client.write_file(self.sandbox.id, path, content.encode(), 0o644)
