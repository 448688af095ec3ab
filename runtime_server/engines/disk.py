"""The limit of what a sandbox may write, where the filesystem has none: measured, and ended when over.

What it is
    `Gauge` keeps one helper (`measurer.py`) inside the namespaces of the engine's service, where every file
    of a sandbox can be read, and ends the sandboxes that it names; `Usage.full` then says why.

What it does not do
    It is no wall: between two looks more may be written. It removes nothing: the engine removes the layer
    with the sandbox.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
from asyncio.subprocess import PIPE, Process
from dataclasses import dataclass
from pathlib import Path

from runtime_server.engines import measurer, processes

log = logging.getLogger(__name__)
START_S = 10.0
INODES_EACH_MB = 64  # small files of 16 KiB on average; a checkout of a large project has 10 KiB
INODES_LEAST = 20_000


@dataclass(eq=False)
class Usage:
    """Of one sandbox. `started` tells its first process from a later one of the same number."""

    pid: int
    started: int
    full: bool = False


class Gauge:
    """See the module's docstring."""

    def __init__(self) -> None:
        self._process: Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._usages: dict[str, Usage] = {}

    @property
    def works(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def start(self, store: Path, service: int) -> None:
        """Looks after layers in `store` from inside the namespaces of the process `service`; without it
        (0) from where we are. Does nothing where that cannot be."""
        await self.stop()
        user = ["-U", "--preserve-credentials"] if os.getuid() else []
        enter = ["nsenter", *user, "-m", "-t", str(service)] if service else []
        command = [*enter, sys.executable, "-I", "-S", measurer.__file__, str(store)]
        with contextlib.suppress(OSError, TimeoutError):
            self._process = await asyncio.create_subprocess_exec(
                *command, stdin=PIPE, stdout=PIPE, start_new_session=True
            )
            assert self._process.stdout is not None
            async with asyncio.timeout(START_S):
                if await self._process.stdout.readline():
                    self._reader = asyncio.create_task(self._read())
                    return
        await self.stop()

    async def stop(self) -> None:
        process, self._process = self._process, None
        if self._reader is not None:
            self._reader.cancel()
        self._usages.clear()
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    def add(self, layer: Path | None, pid: int, disk_mb: int) -> Usage | None:
        """From now on its layer is measured; None where there is nothing to measure, or no limit."""
        if layer is None or not disk_mb or not self.works:
            return None
        usage = Usage(pid, processes.started(pid))
        self._usages[str(layer)] = usage
        inodes = max(INODES_LEAST, disk_mb * INODES_EACH_MB)
        self._tell({"add": str(layer), "pid": pid, "bytes": disk_mb << 20, "inodes": inodes})
        return usage

    def drop(self, usage: Usage | None) -> None:
        for layer in [layer for layer, known in self._usages.items() if known is usage]:
            del self._usages[layer]
            self._tell({"drop": layer})

    def _tell(self, request: dict[str, object]) -> None:
        if self.works and self._process is not None and self._process.stdin is not None:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")

    async def _read(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        while line := await self._process.stdout.readline():
            said = json.loads(line)
            if (usage := self._usages.get(said["full"])) is not None:
                self._end(usage, said)
        log.error("nobody measures the disk any more: the helper has ended")

    def _end(self, usage: Usage, said: dict[str, int]) -> None:
        """Marked first, so that whoever sees the end of the process sees why."""
        if processes.started(usage.pid) == usage.started:
            usage.full = True
            size = f"{said['bytes'] >> 20} MiB in {said['inodes']} files"
            log.warning("a sandbox is ended, for its disk is full: %s", size)
            processes.send(usage.pid)
