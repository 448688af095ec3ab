"""A persistent shell on a terminal, and the one command that may run in it: what two dialects need of it.

What it is
    `Shell.begin` starts a command and returns; `Shell.until` waits for its end, for a time, or for words of
    its output. A command that is not over when the time is stays: it can be waited for again, typed to,
    interrupted. Nothing of what it writes is lost (`Shell.seen`, bounded).

What it does not do
    It speaks no dialect. SandboxError when the sandbox is over.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Callable, Coroutine
from typing import Any, Self

from runtime_server.agent import Chunk, Finished, Session, SessionEnded
from runtime_server.box import Box
from runtime_server.dialects.terminal import Transcript, missing
from runtime_server.errors import BadRequest

COLUMNS, ROWS = 1000, 1000  # wide, so that nothing is wrapped
ENV = {"TERM": "dumb", "PAGER": "cat", "GIT_PAGER": "cat", "PS1": "", "PS2": "", "HISTFILE": "/dev/null"}
WINDOW = 8 << 20  # how far the reading of output may lag behind before some is lost
INTERRUPT = b"\x03"
GONE_S = 5.0
Deadline = Callable[[], float]  # on the monotonic clock
Words = Callable[[], re.Match[bytes] | None]


class Shell:
    """See the module's docstring."""

    def __init__(self, box: Box, session: Session) -> None:
        self.box, self.session = box, session
        self.seen = Transcript()
        self.changed = time.monotonic()
        self.task: asyncio.Task[Finished] | None = None
        self.ended: int | None = None  # the exit code of the shell itself
        self._news = asyncio.Event()
        self._asking = False
        self._expected = 0  # offset of the output that comes next

    @classmethod
    async def open(cls, box: Box, cwd: str, tag: str = "") -> Self:
        async with box.in_use():
            session = await box.agent.open_session(cwd=cwd, env=ENV, pty=(COLUMNS, ROWS), tag=tag)
        return cls(box, session)

    @classmethod
    async def found(cls, box: Box, tag: str) -> Self | None:
        """One that a killed server had opened, with what runs in it; None when there is none."""
        known = [one for one in box.agent.running.values() if one.kind == "session" and one.tag == tag]
        if not known or known[-1].ended:
            return None
        try:
            async with box.in_use():
                made = cls(box, await box.agent.attach_session(known[-1].number))
        except BadRequest:  # another part of this server has it already, or it has ended meanwhile
            return None
        if made.session.running is not None:
            made._follow(made.session.rest(None, made._on_output))
        return made

    @property
    def running(self) -> bool:
        return self.task is not None and not self.task.done()

    def begin(self, text: str) -> None:
        """Start a command; `seen` begins anew."""
        assert not self.running, "one command at a time"
        self.seen, self.changed, self._expected = Transcript(), time.monotonic(), 0
        self._follow(self._run(text))

    def _follow(self, work: Coroutine[Any, Any, Finished]) -> None:
        self.task = asyncio.create_task(work)
        self.task.add_done_callback(self._over)

    async def _run(self, text: str) -> Finished:
        """Nobody may be waiting for it: such a command does not keep a sandbox from expiring."""
        return await self.session.run(
            text, timeout_s=None, max_output=WINDOW, on_timeout="leave", on_output=self._on_output, stdin=True
        )

    def _on_output(self, chunk: Chunk) -> None:
        self.seen.add(missing(chunk.offset - self._expected) + chunk.data)
        self._expected = chunk.offset + len(chunk.data)
        self.changed = time.monotonic()
        self._news.set()

    def _over(self, task: asyncio.Task[Finished]) -> None:
        if not task.cancelled() and isinstance(error := task.exception(), SessionEnded):
            self.ended = error.exit_code
        self._news.set()

    async def until(self, deadline: Deadline, words: Words | None = None) -> bool:
        """True when the command is over or its output matches; False at the deadline, which may move."""
        async with self.box.in_use():
            return await self._until(deadline, words)

    async def _until(self, deadline: Deadline, words: Words | None) -> bool:
        while self.running:
            if words is not None and words():
                return True
            left = deadline() - time.monotonic()
            if left <= 0:
                return False
            self._news.clear()
            try:
                async with asyncio.timeout(left):
                    await self._news.wait()
            except TimeoutError:
                continue  # the deadline may have moved
        return True

    async def finished(self) -> Finished:
        """Of a command that is over. SessionEnded when it ended the shell."""
        assert self.task is not None
        async with self.box.in_use():
            return await self.task

    async def run(self, text: str, timeout_s: float) -> Finished:
        """A short command of our own; its output in `seen`."""
        self.begin(text)
        if not await self.until(within(timeout_s)):
            await self.kill()
        return await self.finished()

    async def ask(self, text: str, end: bytes, timeout_s: float) -> bytes:
        """What a short command of our own writes before `end`.

        A terminal takes its time to say that nothing more comes; `quiet` waits for that when it matters.
        """
        self.begin(text)
        self._asking = True
        await self.until(within(timeout_s), lambda: re.search(re.escape(end), self.seen.data))
        return self.seen.data.partition(end)[0]

    async def quiet(self) -> None:
        """Until our own last question is over."""
        if self._asking:
            self._asking = False
            await self.until(within(GONE_S))

    async def type(self, data: bytes) -> None:
        """To the running command, as from a keyboard."""
        self.changed = time.monotonic()
        async with self.box.in_use():
            await self.session.send(data)

    async def kill(self, grace_s: float = 0.05) -> None:
        """End what runs, for certain. The shell stays."""
        async with self.box.in_use():
            with contextlib.suppress(SessionEnded):
                await self.session.interrupt(grace_s)
            await self._until(within(GONE_S), None)

    async def close(self) -> None:
        if self.ended is None and not self.box.reason:
            async with self.box.in_use():
                await self.session.close()
        if self.task is not None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)


def within(seconds: float) -> Deadline:
    end = time.monotonic() + seconds
    return lambda: end
