"""OpenHands V1's commands: each a process of its own, its output as events that a client polls for.

What it is
    `Bash.start` runs a command and returns; `events` are published while it runs, numbered from 0 for each
    command, both streams in one count; only the last one has the exit code. A time-out kills the whole tree.

What it does not do
    Nothing persists from one command to the next. Output that nobody fetched is forgotten after a while.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import BaseModel, Field

from runtime_server.agent import Chunk, Process
from runtime_server.box import SHELL, Box
from runtime_server.dialects.records import infra
from runtime_server.dialects.terminal import missing
from runtime_server.errors import SandboxError

COMMANDS_KEPT = 200
CHUNK = 64 << 10
PUBLISH_S = 0.1
DRAIN_S = 0.2
TERM_S = 1.0
WINDOW = 8 << 20  # how far the reading of output may lag behind before some is lost
OUTPUT_KEPT = 16 << 20  # of all commands of a sandbox that are over
OUTPUT_MAX = 64 << 20  # of one command; what comes after is read and dropped


class Ask(BaseModel):
    """Body of `start_bash_command`. A timeout below a second arrives as 0."""

    command: Annotated[str, Field(max_length=4 << 20)]
    cwd: str | None = None
    timeout: float = 300.0

    @property
    def timeout_s(self) -> float:
        return max(1.0, min(self.timeout, 86400.0 * 7))


@dataclass(eq=False)
class Running:
    """One command and what it wrote so far."""

    ask: Ask
    id: str = field(default_factory=lambda: secrets.token_hex(16))
    timestamp: str = field(default_factory=lambda: _now())
    events: list[dict[str, Any]] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None
    process: Process | None = None
    stopped: bool = False
    size: int = 0
    _expected: dict[int, int] = field(default_factory=lambda: {1: 0, 2: 0})  # offsets of what comes next
    _pending: dict[int, str] = field(default_factory=lambda: {1: "", 2: ""})
    _decoders: dict[int, Any] = field(
        default_factory=lambda: {n: codecs.getincrementaldecoder("utf-8")("replace") for n in (1, 2)}
    )

    @property
    def over(self) -> bool:
        return bool(self.events) and self.events[-1]["exit_code"] is not None

    def command(self) -> dict[str, Any]:
        return {
            "kind": "BashCommand",
            "id": self.id,
            "timestamp": self.timestamp,
            "command": self.ask.command,
            "cwd": self.ask.cwd,
            "timeout": int(self.ask.timeout),
        }

    def write(self, chunk: Chunk) -> None:
        """Decoded as it comes: a character is never cut in two."""
        stream, lost = chunk.stream, chunk.offset - self._expected[chunk.stream]
        self._expected[stream] = chunk.offset + len(chunk.data)
        self.size += len(chunk.data)
        if self.size <= OUTPUT_MAX:
            self._pending[stream] += self._decoders[stream].decode(missing(lost) + chunk.data)
        if len(self._pending[1]) + len(self._pending[2]) >= CHUNK:
            self.flush()

    def flush(self) -> None:
        if any(self._pending.values()):
            self._event(None)

    def end(self, exit_code: int, note: str = "") -> None:
        for stream, decoder in self._decoders.items():
            self._pending[stream] += decoder.decode(b"", final=True)
        if note:
            separator = "\n" if self._pending[2] and not self._pending[2].endswith("\n") else ""
            self._pending[2] += separator + note
        self._event(exit_code)

    def _event(self, exit_code: int | None) -> None:
        out, err = self._pending[1], self._pending[2]
        self._pending = {1: "", 2: ""}
        event = {
            "kind": "BashOutput",
            "id": secrets.token_hex(16),
            "timestamp": _now(),
            "command_id": self.id,
            "order": len(self.events),
            "exit_code": exit_code,
            "stdout": out or None,
            "stderr": err or None,
        }
        self.events.append(event)
        self.changed.set()


def _now() -> str:
    return datetime.now(UTC).isoformat()


class Bash:
    """The commands of one sandbox, by id."""

    def __init__(self, box: Box, shell: str = SHELL) -> None:
        self.box, self.shell = box, shell
        self.commands: OrderedDict[str, Running] = OrderedDict()

    def start(self, ask: Ask) -> Running:
        made = Running(ask)
        self.commands[made.id] = made
        self._forget()
        made.task = asyncio.create_task(self._run(made))
        return made

    def _forget(self) -> None:
        """Commands that are over, the oldest first, when there are too many or they said too much."""
        left = OUTPUT_KEPT
        for number, (identity, made) in enumerate([*reversed(self.commands.items())]):
            left -= made.size
            if made.over and (number >= COMMANDS_KEPT or left < 0):
                del self.commands[identity]

    async def _run(self, made: Running) -> None:
        try:
            async with self.box.in_use():
                await self._work(made)
        except SandboxError as error:
            dead = self.box.reason
            made.end(-1, f"[infra] reason={infra(error.code)}\n" if dead else f"{error}\n")
        except asyncio.CancelledError:
            made.end(-1, "[infra] reason=server\n")
            raise

    async def _work(self, made: Running) -> None:
        made.process = process = await self.box.agent.spawn(
            [self.shell, "-c", made.ask.command],
            cwd=made.ask.cwd or self.box.workdir,
            env={},
            timeout_s=None,
            max_output=WINDOW,
        )
        reading = asyncio.create_task(self._read(made, process))
        reading.add_done_callback(lambda task: task.cancelled() or task.exception())
        late = False
        try:
            ended = asyncio.create_task(process.wait())
            done, _ = await asyncio.wait({ended}, timeout=made.ask.timeout_s)
            if not done:
                late = True
                await self._end(process, ended)
            finished = await ended
            await asyncio.wait({reading}, timeout=DRAIN_S)
        finally:
            reading.cancel()
        if late:
            made.end(-1, f"Command timed out after {made.ask.timeout:g} seconds")
        else:
            made.end(-finished.signal if finished.signal else finished.exit_code)

    async def _read(self, made: Running, process: Process) -> None:
        flushed = time.monotonic()
        async for chunk in process.chunks():
            made.write(chunk)
            if time.monotonic() - flushed >= PUBLISH_S:
                made.flush()
                flushed = time.monotonic()

    async def _end(self, process: Process, ended: asyncio.Task[Any]) -> None:
        """TERM to the tree, a second, then KILL."""
        with contextlib.suppress(ProcessLookupError):
            await process.signal(15)
        if not (await asyncio.wait({ended}, timeout=TERM_S))[0]:
            await process.kill()

    async def stop(self, identity: str) -> bool:
        """False for a command that is not known."""
        made = self.commands.get(identity)
        if made is None:
            return False
        if not made.over and made.process is not None:
            async with self.box.in_use():
                await made.process.kill()
        return True

    def event(self, identity: str) -> dict[str, Any] | None:
        if (made := self.commands.get(identity)) is not None:
            return made.command()
        return next((e for made in self.commands.values() for e in made.events if e["id"] == identity), None)

    def clear(self) -> int:
        """Forget the events of commands that are over."""
        over = [identity for identity, made in self.commands.items() if made.over]
        return sum(1 + len(self.commands.pop(identity).events) for identity in over)
