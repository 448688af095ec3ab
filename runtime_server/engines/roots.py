"""The helpers that give containers their root (`layers.py`), through the lives of Podman's service.

What it is
    `Roots` has those in the namespaces of the service that runs now. When that was started again there are
    others at once, and the ones before end what they are at: nobody is refused for it. Where new ones could
    not be started, whoever needs them next tries again.

What it does not do
    It watches no service: `podman.py` says when there is another.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from runtime_server.engines import namespace
from runtime_server.engines.layers import Layers, Links
from runtime_server.engines.state import State
from runtime_server.errors import Internal, SandboxError
from runtime_server.wire import Code

PAUSES_S = (0.0, 0.5, 2.0, 5.0)
log = logging.getLogger(__name__)


class Roots:
    """See the module's docstring. `needed`: they worked before, so that they are to work again."""

    def __init__(self) -> None:
        self.needed = False
        self._where: tuple[State, int] | None = None
        self._links: Links | None = None
        self._now: Layers | None = None
        self._starting = asyncio.Lock()
        self._retiring: dict[asyncio.Task[None], Layers] = {}

    async def start(self, state: State, service: int) -> None:
        """In the namespaces of this service. Where they cannot even start there are none."""
        async with self._starting:
            old, self._where = self._now, (state, service)
            self._now = await self._new()
        if old is not None:
            task = asyncio.create_task(old.retire())
            self._retiring[task] = old
            task.add_done_callback(lambda done: self._retiring.pop(done, None))

    async def stop(self) -> None:
        left = [*self._retiring.values(), *([self._now] if self._now else [])]
        for task in [*self._retiring]:
            task.cancel()
        self._now, self._where, self._links, self.needed = None, None, None, False
        for layers in left:
            await layers.stop()

    async def helpers(self) -> Layers:
        """Internal where there are none."""
        if self._now is None and self.needed:
            async with self._starting:
                self._now = self._now or await self._new()
        if self._where is None:
            raise Internal("the engine has stopped", Code.SERVER_DRAINING)
        if self._now is None:
            raise Internal("this node cannot change the root of a container", Code.CREATE_FAILED)
        return self._now

    async def discard(self, folder: Path) -> None:
        """A layer that nobody uses. Whatever is left in the end goes with the server's state."""
        problem: SandboxError | None = None
        for pause_s in PAUSES_S:
            await asyncio.sleep(pause_s)
            if self._where is None:
                return
            try:
                return await (await self.helpers()).remove(folder)
            except SandboxError as error:
                problem = error
        log.warning("the layer %s is not removed: %s", folder, problem)

    async def _new(self) -> Layers | None:
        if self._where is None:
            return None
        state, service = self._where
        self._links = self._links or Links(state.links)
        layers = Layers(state, service, self._links)
        volatile = namespace.overlay_works(state.layers, ",volatile")
        try:
            await layers.start(volatile)
        except (SandboxError, OSError):
            await layers.stop()
            return None
        return layers
