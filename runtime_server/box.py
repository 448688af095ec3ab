"""One sandbox as the server keeps it: its container, its agent, its clock, and what became of it.

What it is
    `Box.exec`, `write_file`, `read_file` speak to the agent and turn whatever goes wrong into the errors
    of `runtime_server.errors`. A box ends once, with one reason; from then on every call answers with it.

What it does not do
    It makes and removes no container (`sandboxes.py`), and knows no HTTP.
"""

from __future__ import annotations

import base64
import binascii
import errno
import posixpath
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.schema import Sandbox as Defaults
from runtime_server import wire
from runtime_server.agent import AgentConnection, AgentError, AgentLost, Finished, Kept
from runtime_server.engines import Container
from runtime_server.engines.watch import kills
from runtime_server.errors import BadRequest, Gone, NotFound, SandboxError, TooLarge, Unavailable
from runtime_server.wire import Code

DELETED = "deleted"
MAX_FILE = 256 << 20
SHELL = "/bin/sh"

_SAID = {
    Code.OOM: "the sandbox used up its memory and was ended; make a new one, with more memory",
    Code.SANDBOX_DIED: "the sandbox's first process ended, and everything in it; make a new one",
    Code.EXPIRED: "nobody used the sandbox for its whole ttl_s, so it was removed; make a new one",
    Code.SERVER_DRAINING: "the server is stopping and has removed its sandboxes",
}


@dataclass(eq=False)
class Box:
    """See the module's docstring. `reason` is empty while it lives."""

    id: str
    image: str
    workdir: str
    labels: dict[str, str]
    ttl_s: float
    container: Container
    agent: AgentConnection
    io: Path
    defaults: Defaults
    created_at: float = field(default_factory=time.time)
    used: float = field(default_factory=time.monotonic)
    busy: int = 0
    reason: str = ""
    finished: bool = False  # its processes are killed, or being killed

    @property
    def expires_in(self) -> float:
        return self.ttl_s - (time.monotonic() - self.used) if not self.busy else self.ttl_s

    def record(self) -> wire.Sandbox:
        return wire.Sandbox(
            id=self.id,
            image=self.image,
            state="dead" if self.reason else "running",
            workdir=self.workdir,
            labels=self.labels,
            created_at=self.created_at,
            expires_at=time.time() + max(0.0, self.expires_in),
            reason=self.reason,
        )

    def end(self, reason: str) -> bool:
        """True for the one who ends it first."""
        if self.reason:
            return False
        self.reason = reason
        return True

    def death(self) -> Code:
        """Why it died, as far as the kernel tells."""
        return Code.OOM if kills(self.container) else Code.SANDBOX_DIED

    def gone(self) -> SandboxError:
        if self.reason == DELETED:
            return NotFound(f"sandbox {self.id} was deleted", Code.SANDBOX_NOT_FOUND)
        code = Code(self.reason or Code.SANDBOX_DIED)
        kind = Unavailable if code == Code.SERVER_DRAINING else Gone
        return kind(f"{self.id}: {_SAID[code]}", code)

    # --- what one can do with it ---

    async def exec(self, request: wire.Exec) -> wire.ExecResult:
        """Run a command to its end. A timeout is a result; BadRequest, Gone, TooLarge are errors."""
        command = request.command
        argv = [SHELL, "-c", command] if isinstance(command, str) else command
        stdin = _stdin(request)
        before = kills(self.container)
        async with self.in_use():
            done = await self.agent.exec(
                argv,
                cwd=self.resolve(request.cwd) if request.cwd else self.workdir,
                env=request.env,
                stdin=stdin,
                timeout_s=request.timeout_s or float(self.defaults.command_timeout),
                max_output=self.defaults.max_output if request.max_output is None else request.max_output,
            )
        return _result(done, kills(self.container) > before)

    async def kill(self) -> None:
        """End every process in it but the agent; files stay, running commands end with signal 9."""
        async with self.in_use():
            await self.agent.kill_all()

    async def write_file(self, path: str, data: bytes, mode: int) -> wire.FileInfo:
        where = self.resolve(path)
        async with self.in_use():
            size = await self.agent.write_file(where, data, mode)
        return wire.FileInfo(path=where, size=size, mode=mode)

    async def read_file(self, path: str) -> bytes:
        async with self.in_use():
            return await self.agent.read_file(self.resolve(path), MAX_FILE)

    def resolve(self, path: str) -> str:
        """Relative to the working directory. `..` is left alone: the sandbox is the bound."""
        if not path:
            raise BadRequest("the path is empty: name a file")
        return posixpath.join(self.workdir, path)

    @asynccontextmanager
    async def in_use(self) -> AsyncIterator[None]:
        """While something works with it: it does not expire, and what goes wrong is a SandboxError."""
        if self.reason:
            raise self.gone()
        self.busy += 1
        try:
            yield
        except AgentLost:
            if not self.reason:
                self.end(self.death())
            raise self.gone() from None
        except AgentError as error:
            raise _mistake(error) from None
        finally:
            self.busy -= 1
            self.used = time.monotonic()


def _stdin(request: wire.Exec) -> bytes | None:
    if request.stdin is None or request.stdin_encoding == "utf-8":
        return None if request.stdin is None else request.stdin.encode()
    try:
        return base64.b64decode(request.stdin, validate=True)
    except binascii.Error as error:
        raise BadRequest(f"stdin is no base64: {error}") from None


def _stream(kept: Kept) -> wire.Stream:
    return wire.Stream.of(kept.data, kept.total, kept.head)


def _result(done: Finished, oom: bool) -> wire.ExecResult:
    return wire.ExecResult(
        exit_code=done.exit_code,
        signal=done.signal,
        stdout=_stream(done.stdout),
        stderr=_stream(done.stderr),
        timed_out=done.timed_out,
        oom=oom,
        duration_ms=done.duration_ms,
    )


def _mistake(error: AgentError) -> SandboxError:
    """What the agent could not do, as an error of the service."""
    if error.errno == errno.ENOENT:
        return NotFound(str(error), Code.FILE_NOT_FOUND)
    if error.errno in (errno.E2BIG, errno.EFBIG):
        return TooLarge(f"{error}. Allowed are {MAX_FILE} bytes for a file.", errno=error.errno)
    return BadRequest(str(error), Code.FILE_ERROR, errno=error.errno)
