"""One sandbox as the server keeps it: its container, its agent, its clock, and what became of it.

What it is
    `Box.exec`, `write_file`, `read_file` speak to the agent and turn whatever goes wrong into the errors
    of `runtime_server.errors`. A box ends once, with one reason; from then on every call answers with it.

What it does not do
    It makes and removes no container (`sandboxes.py`), and knows no HTTP.
"""

from __future__ import annotations

import asyncio
import base64
import errno
import hashlib
import math
import posixpath
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.schema import Sandbox as Defaults
from runtime_server import wire
from runtime_server.agent import AgentConnection, AgentError, AgentLost, Finished, Kept
from runtime_server.allowlist import Allowlist
from runtime_server.egress import Egress
from runtime_server.engines import Container, Engine, Image, Recipe
from runtime_server.errors import (
    BadRequest,
    Conflict,
    Full,
    Gone,
    NotFound,
    SandboxError,
    TooLarge,
    Unavailable,
)
from runtime_server.kills import Kills
from runtime_server.wire import Code

DELETED = "deleted"
MAX_FILE = 256 << 20
SHELL = "/bin/sh"
TAGS_KEPT = 8

_SAID = {
    Code.OOM: "the sandbox used up its memory and was ended; make a new one, with more memory",
    Code.SANDBOX_DIED: "the sandbox's first process ended, and everything in it; make a new one",
    Code.EXPIRED: "the sandbox was not used for its whole ttl_s, or its max_lifetime_s is over; make another",
    Code.EVICTED: "the server was started again and could not take the sandbox over; make a new one",
    Code.DISK_FULL: "the sandbox wrote more than its disk holds and was ended; make a new one, with more",
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
    recipe: Recipe
    base: Image
    snapshot: str = ""
    max_lifetime_s: float | None = None
    key: str = ""  # the Idempotency-Key of its create
    request: wire.CreateSandbox | None = None
    created_at: float = field(default_factory=time.time)
    used: float = field(default_factory=time.monotonic)
    begun: float = field(default_factory=time.monotonic)
    busy: int = 0
    paused: bool = False
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)  # of those who pause, resume and copy
    egress: Egress | None = None
    tags: deque[str] = field(default_factory=deque)
    reason: str = ""
    finished: bool = False  # its processes are killed, or being killed
    _kills: Kills = field(default_factory=Kills)

    @property
    def expires_in(self) -> float:
        return self.ttl_s - (time.monotonic() - self.used) if not self.busy else self.ttl_s

    @property
    def ends_in(self) -> float:
        """By its max_lifetime_s."""
        if self.max_lifetime_s is None:
            return math.inf
        return self.max_lifetime_s - (time.monotonic() - self.begun)

    def record(self) -> wire.Sandbox:
        return wire.Sandbox(
            id=self.id,
            image=self.image,
            state="dead" if self.reason else "paused" if self.paused else "running",
            workdir=self.workdir,
            labels=self.labels,
            created_at=self.created_at,
            expires_at=time.time() + max(0.0, self.expires_in),
            reason=self.reason,
            snapshot=self.snapshot,
            ends_at=None if self.max_lifetime_s is None else time.time() + max(0.0, self.ends_in),
        )

    def end(self, reason: str) -> bool:
        """True for the one who ends it first."""
        if self.reason:
            return False
        self.reason = reason
        self._kills.end(self.container)
        return True

    def kills(self) -> int:
        """How many of its processes were ended for memory, by the kernel or by us."""
        return self._kills.count(self.container)

    def death(self) -> Code:
        """Why it died, as far as the kernel tells."""
        if self.container.usage is not None and self.container.usage.full:
            return Code.DISK_FULL
        return Code.OOM if self.kills() else Code.SANDBOX_DIED

    def check(self) -> None:
        """Raises what became of it, also when its agent has gone and nobody has looked yet."""
        if self.agent.closed:
            self.end(self.death())
        if self.reason:
            raise self.gone()

    def gone(self) -> SandboxError:
        if self.reason == DELETED:
            return NotFound(f"sandbox {self.id} was deleted", Code.SANDBOX_NOT_FOUND)
        code = Code(self.reason or Code.SANDBOX_DIED)
        kind = Unavailable if code == Code.SERVER_DRAINING else Gone
        return kind(f"{self.id}: {_SAID[code]}", code)

    async def open_network(self) -> None:
        """Its way to the hosts that it may reach, if there are any. SandboxError."""
        if self.recipe.allow:
            self.egress = await Egress.open(self.container.pid, Allowlist.of(self.recipe.allow))

    async def close_network(self) -> None:
        egress, self.egress = self.egress, None
        if egress is not None:
            await egress.close()

    # --- what one can do with it ---

    async def exec(self, request: wire.Exec, key: str = "") -> wire.ExecResult:
        """Run a command to its end. A timeout is a result; BadRequest, Gone, TooLarge are errors.

        With a key its result is kept in the sandbox: a call with the same key that a restarted server gets
        is told what became of it, and does not run it again.
        """
        command = request.command
        argv = [SHELL, "-c", command] if isinstance(command, str) else command
        stdin = None if request.stdin is None else decoded(request.stdin, request.stdin_encoding)
        before = self.kills()
        limit = self.defaults.max_output if request.max_output is None else request.max_output
        tag = f"x-{hashlib.sha256(key.encode()).hexdigest()[:32]}" if key else ""
        async with self.in_use():
            if tag and (kept := await self._kept(tag, limit)) is not None:
                return result_of(kept, self.kills() > before)
            done = await self.agent.exec(
                argv,
                cwd=self.resolve(request.cwd) if request.cwd else self.workdir,
                env=request.env,
                stdin=stdin,
                timeout_s=request.timeout_s or float(self.defaults.command_timeout),
                max_output=limit,
                tag=tag,
            )
            if tag:
                await self._keep(tag)
        return result_of(done, self.kills() > before)

    async def _kept(self, tag: str, limit: int) -> Finished | None:
        """What became of a command that an earlier server had started; None when there was none."""
        for one in self.agent.running.values():
            if one.tag == tag and one.kind == "exec":
                return await (await self.agent.attach(one.number, max_output=limit)).wait()
        return None

    async def _keep(self, tag: str) -> None:
        """Its result and those of a few before it: who repeats a call repeats the last ones."""
        self.tags.append(tag)
        while len(self.tags) > TAGS_KEPT:
            await self.agent.release(self.tags.popleft())

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
        """While something works with it: it does not expire, and what goes wrong is a SandboxError.

        Its own end goes before everything else that may be wrong: a session, a process, an input are over as
        well then, and to say only that would be to blame whoever used them.
        """
        self.check()
        if self.paused:
            raise Conflict(f"{self.id} is paused: POST /v1/sandboxes/{self.id}/resume first", Code.PAUSED)
        self.busy += 1
        try:
            yield
        except AgentLost:
            self.end(self.death())
            raise self.gone() from None
        except AgentError as error:
            self.check()
            raise _mistake(error) from None
        except SandboxError:
            self.check()
            raise
        finally:
            self.busy -= 1
            self.used = time.monotonic()

    # --- standing still ---

    async def pause(self, engine: Engine) -> None:
        """Its processes stop where they are, its time to live does not. Nothing happens to a paused one."""
        async with self.turn:
            self.check()
            if not self.paused:
                async with self.in_use():
                    await _pause(self, engine)
                self.paused = True

    async def resume(self, engine: Engine) -> None:
        async with self.turn:
            self.check()
            if self.paused:
                await engine.resume(self.container)
                self.paused, self.used = False, time.monotonic()

    @asynccontextmanager
    async def still(self, engine: Engine) -> AsyncIterator[None]:
        """For the time of a copy. Commands that come meanwhile are not held up."""
        async with self.turn:
            if self.paused and not self.reason:
                yield
                return
            async with self.in_use():
                await _pause(self, engine)
                try:
                    yield
                finally:
                    await asyncio.shield(engine.resume(self.container))


async def _pause(box: Box, engine: Engine) -> None:
    try:
        await engine.pause(box.container)
    except BaseException:  # whatever it was, it must not be left half asleep
        await asyncio.shield(engine.resume(box.container))
        raise


def decoded(data: str, encoding: str) -> bytes:
    """Of a body's text field. BadRequest when it is no base64 and should be."""
    if encoding == "utf-8":
        try:
            return data.encode()
        except UnicodeEncodeError:
            raise BadRequest("the data has half of a surrogate pair, which is no UTF-8: use base64") from None
    try:
        return base64.b64decode(data, validate=True)
    except ValueError as error:
        raise BadRequest(f"the data is no base64: {error}") from None


def _stream(kept: Kept) -> wire.Stream:
    return wire.Stream.of(kept.data, kept.total, kept.head)


def result_of(done: Finished, oom: bool) -> wire.ExecResult:
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
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Full(f"{error}. Remove files in the sandbox, or make one with more room.", errno=error.errno)
    if error.errno in (errno.E2BIG, errno.EFBIG):
        return TooLarge(f"{error}. Allowed are {MAX_FILE} bytes for a file.", errno=error.errno)
    return BadRequest(str(error), Code.FILE_ERROR, errno=error.errno)
