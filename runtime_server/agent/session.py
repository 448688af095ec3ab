"""A shell that stays: commands in it share directory, variables, functions and background jobs.

What it is
    `Session`, made by `AgentConnection.open_session`. The text of a command reaches the shell as a file, its
    status comes back beside the output, so nothing is parsed, quoted or echoed. One command at a time.

What it does not do
    Code in a session *is* its shell: it can say about its own session what it likes.
    A text is at most one frame, a megabyte: `write_file` a longer script and source it. Without a terminal
    (`pty`) there is no job control: background jobs, `wait` and `jobs` work, `fg` and `bg` do not, and a
    program that wants to ask something on the terminal fails at once.
"""

from __future__ import annotations

import asyncio
import errno
import signal
from collections.abc import Callable
from typing import Literal, Protocol

from runtime_server.agent import frames
from runtime_server.agent.calls import Call, Wire
from runtime_server.agent.frames import AgentError, Finished, Flag, Kind
from runtime_server.agent.mirror import Chunk
from runtime_server.agent.process import Process

GRACE_S = 2.0  # what SIGINT has not ended by then is killed


class SessionEnded(Exception):
    """The session's shell is gone: `exit_code` is its own, `finished` what the last command had written."""

    def __init__(self, exit_code: int, finished: Finished | None = None) -> None:
        super().__init__(f"the session has ended with exit code {exit_code}: open another")
        self.exit_code = exit_code
        self.finished = finished


class Start(Protocol):
    """`AgentConnection.start_run`: a command of a session."""

    async def __call__(
        self, payload: Callable[[bool], bytes], subject: str, push: bool, timeout_s: float | None, limit: int
    ) -> tuple[Call, Process | None]: ...


class Session:
    """One shell. Every method raises `AgentLost` once the connection is gone."""

    def __init__(self, wire: Wire, call: Call, start: Start, current: Process | None = None) -> None:
        self.number = call.number
        self._wire = wire
        self._call = call
        self._start = start
        self._terminal = bool(call.begun and call.begun.done() and call.begun.result())
        self._running: Call | None = None
        self._left: Process | None = current  # runs on, or ended, and nobody has had its result
        if current is not None:
            self._running = current.call

    @property
    def ended(self) -> bool:
        return self._call.future.done()

    @property
    def running(self) -> Process | None:
        """The command that was left running, or picked up again, unless its result has been had."""
        return self._left

    async def run(
        self,
        text: str,
        *,
        timeout_s: float | None,
        max_output: int = 1 << 20,
        on_timeout: Literal["kill", "leave"] = "kill",
        on_output: Callable[[Chunk], None] | None = None,
        stdin: bool = False,
        tag: str = "",
    ) -> Finished:
        """Runs `text` in the shell; its status is the shell's `$?`, 130 when it was interrupted.

        After `timeout_s` the result says `timed_out`: with "kill" everything the command started is gone and
        the session usable; with "leave" it runs on, and `rest` goes on waiting for it. Giving up waiting
        does the same. SessionEnded when the shell ends (`exit 3`); AgentError EBUSY while another runs.
        Without `stdin` the command reads /dev/null; with it, or on a terminal, what `send` sends.
        """
        self._check()
        leave = on_timeout == "leave"
        limit_s = None if leave else timeout_s

        def payload(push: bool) -> bytes:
            flags = (Flag.PUSH if push else 0) | (Flag.STDIN if stdin else 0)
            return frames.run_payload(self.number, text, flags, limit_s, max_output, tag)

        push = leave or stdin or self._terminal or on_output is not None
        call, process = await self._start(payload, f"session {self.number}", push, limit_s, max_output)
        self._running, self._left = call, process
        try:
            if process is None:
                return self._ended_or(await call.future)
            return await self._follow(process, timeout_s if leave else None, on_output)
        except asyncio.CancelledError:
            if not leave and call.number in self._wire.calls:
                self._wire.say(Kind.CANCEL, call.number)
            raise

    async def _follow(
        self, process: Process, timeout_s: float | None, on_output: Callable[[Chunk], None] | None
    ) -> Finished:
        """Until it ends or `timeout_s` passes; then the result so far, marked as timed out."""
        started = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(timeout_s):
                if on_output is not None:
                    async for chunk in process.chunks():
                        on_output(chunk)
                return self._take(await process.wait())
        except TimeoutError:
            stdout, stderr = process.kept()
            took_ms = (asyncio.get_running_loop().time() - started) * 1000
            return Finished(frames.EXIT_TIMEOUT, 0, True, stdout, stderr, took_ms)

    async def rest(
        self, timeout_s: float | None, on_output: Callable[[Chunk], None] | None = None
    ) -> Finished:
        """Goes on waiting for the command that was left running; its whole result, from the beginning."""
        if self._left is None:
            raise AgentError(errno.EINVAL, "nothing is running in this session, and nothing is left to tell")
        return await self._follow(self._left, timeout_s, on_output)

    async def interrupt(self, grace_s: float = GRACE_S) -> Finished | None:
        """SIGINT, as a terminal sends it; what is still there after `grace_s` is killed. None: nothing ran.

        Returns when the command has ended; the session is usable then (or SessionEnded).
        """
        call = self._left.call if self._left is not None else self._running
        if call is None or call.future.done():
            return None
        self._wire.say(Kind.SIGNAL, call.number, frames.signal_payload(signal.SIGINT, max(grace_s, 0.001)))
        return self._take(await asyncio.shield(call.future))

    async def send(self, data: bytes) -> None:
        """To the running command's stdin: one that was started with `stdin`, or any on a terminal."""
        await self._input().write(data)

    async def end_input(self) -> None:
        """The end of the running command's stdin."""
        await self._input().close_stdin()

    async def signal(self, signum: int) -> None:
        """To everything the running command started."""
        if (call := self._running) is not None and not call.future.done():
            self._wire.say(Kind.SIGNAL, call.number, frames.signal_payload(signum))

    async def resize(self, columns: int, rows: int) -> None:
        if not self.ended:
            self._wire.say(Kind.RESIZE, self.number, frames.resize_payload(columns, rows))

    async def close(self) -> None:
        """Ends the shell and everything that was started in it, background jobs included."""
        if not self.ended:
            self._wire.say(Kind.CANCEL, self.number)
        await asyncio.shield(self._call.future)

    def _input(self) -> Process:
        if self._left is None or self._left.ended:
            raise AgentError(
                errno.EPIPE, "no command that takes input runs in this session: start it with stdin"
            )
        return self._left

    def _take(self, finished: Finished) -> Finished:
        self._left = None
        return self._ended_or(finished)

    def _ended_or(self, finished: Finished) -> Finished:
        if finished.ended:
            raise SessionEnded(finished.exit_code, finished)
        return finished

    def _check(self) -> None:
        if self._running is not None and not self._running.future.done():
            raise AgentError(
                errno.EBUSY,
                "the session is still running a command: wait for it, interrupt it, or open another",
            )
        if not self.ended:
            return
        finished = self._call.future.result()
        raise SessionEnded(finished.exit_code)
