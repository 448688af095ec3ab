"""What engines have in common: directories, facts found out by trying, sandboxes that stand still.

What it is
    `Grounded`, which `podman.py` and `spawned.py` build on: part of `runtime_server.engines.Engine`.

What it does not do
    It makes and ends no container.
"""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

from orchestrator.schema import Runtime
from runtime_server.engines import Container, Facts, pausing
from runtime_server.engines.disk import Gauge
from runtime_server.engines.state import State
from runtime_server.errors import Internal
from runtime_server.wire import Code


class Grounded:
    """See the module's docstring. `_state` and `_facts` are there from `start` to `stop`."""

    def __init__(self, config: Runtime, agent: Path) -> None:
        self.config, self.agent = config, agent
        self._state: State | None = None
        self._facts: Facts | None = None
        self._gauge = Gauge()

    @property
    def facts(self) -> Facts:
        assert self._facts is not None, "start() comes first"
        return self._facts

    @property
    def state(self) -> State:
        if self._state is None:
            raise Internal("the engine is not running", Code.SERVER_DRAINING)
        return self._state

    def new_io(self, name: str) -> Path:
        """Inside a private directory, but open itself: the image may run as any user."""
        folder = self.state.io / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        folder.chmod(0o755)
        return folder

    async def pause(self, container: Container) -> None:
        try:
            await asyncio.to_thread(pausing.pause, container)
        except OSError as error:
            raise Internal(f"the sandbox cannot be paused: {error}") from error

    async def resume(self, container: Container) -> None:
        await asyncio.to_thread(pausing.resume, container)
