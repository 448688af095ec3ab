"""A shell that stays, without a sandbox: what `trainer.environments.local` gives to an agent's tools.

What it is
    One `bash` (else `sh`) that is told one command after the other, each under `eval` with an empty stdin;
    its output goes to an unnamed file, and the exit code comes over a pipe of its own, so that no output can
    be mistaken for it.

What it does not do
    It confines nothing. A command that is out of time takes the shell with it, and everything it started.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import shutil
import signal
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Self

from trainer.environments import CommandResult

STATUS = 9
"""The descriptor that exit codes come by; scripts have no business with it."""


class LocalShell:
    """One shell; `alive` until it exits or is killed. One command at a time."""

    def __init__(self, process: asyncio.subprocess.Process, output: IO[bytes]) -> None:
        self._process, self._output = process, output
        self._at = 0

    @classmethod
    async def start(cls, prefix: Sequence[str], folder: Path, environment: Mapping[str, str]) -> Self:
        """`prefix` is what starts the shell (as another user, say). Raises OSError."""
        output = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - lives as long as the shell
        shell = shutil.which("bash") or "/bin/sh"
        try:
            process = await asyncio.create_subprocess_exec(
                *prefix, "/bin/sh", "-c", f'exec {STATUS}>&1 1>&2 && exec "$1"', "sh", shell,
                cwd=folder, env=dict(environment), start_new_session=True,
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=output,
            )  # fmt: skip
        except BaseException:
            output.close()
            raise
        return cls(process, output)

    @property
    def alive(self) -> bool:
        return self._process.returncode is None and not self._output.closed

    async def run(self, command: str, timeout_s: float, max_output: int) -> CommandResult:
        """Run one command. Exit code 124 and no shell any more when it is out of time."""
        stdin, status = self._process.stdin, self._process.stdout
        assert stdin is not None and status is not None, "started with pipes"
        line = f"eval {shlex.quote(command)} </dev/null {STATUS}>&-\necho $? >&{STATUS}\n"
        code, timed_out = -1, False
        try:
            async with asyncio.timeout(timeout_s):
                with contextlib.suppress(ConnectionError):
                    stdin.write(line.encode())
                    await stdin.drain()
                said = await status.readline()
                code = _code(said) if said else await self._ended()
        except TimeoutError:
            code, timed_out = 124, True
        if timed_out or code < 0 or self._process.returncode is not None:
            await self._kill()
        kept, left_out = self._since(max_output)
        if not self.alive:
            await self.close()
        return CommandResult(kept, code, timed_out, left_out)

    async def close(self) -> None:
        """End the shell and what it started. May be called twice."""
        await self._kill()
        self._output.close()

    async def _ended(self) -> int:
        """The shell exited with the command; its code, as a shell says it."""
        code = await self._process.wait()
        return 128 - code if code < 0 else code

    async def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()

    def _since(self, most: int) -> tuple[bytes, int]:
        """What was written since the last command, head and tail, and how much is left out between them."""
        start, self._at = self._at, os.fstat(self._output.fileno()).st_size
        return kept(self._output.fileno(), start, self._at, most)


def _code(said: bytes) -> int:
    """What the shell said; -1 when somebody else wrote there, and nothing it says can be trusted any more."""
    return int(said) if said.strip().isdigit() else -1


def kept(descriptor: int, start: int, end: int, most: int) -> tuple[bytes, int]:
    """At most `most` bytes of a file from `start` to `end`: head and tail, and what is left out between."""
    size = end - start
    if size <= most:
        return os.pread(descriptor, size, start), 0
    half = most // 2
    return os.pread(descriptor, most - half, start) + os.pread(descriptor, half, end - half), size - most
