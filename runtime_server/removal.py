"""Removing what a sandbox was, until it is gone.

What it is
    `remove` asks the engine again when it could not: Podman's service may just have been killed, or be
    waiting for a container's monitor. A sandbox is given up only after minutes, and the log says so; the end
    of the server removes whatever is left.

What it does not do
    It ends no processes and makes no room for others: that is done before (`sandboxes.py`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from runtime_server.box import Box
from runtime_server.engines import Engine
from runtime_server.errors import SandboxError

PAUSES_S = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0)
_log = logging.getLogger("runtime_server")


async def remove(
    engine: Engine, box: Box, starts: asyncio.Semaphore, pauses_s: Sequence[float] = PAUSES_S
) -> bool:
    """False when it is still there after the last try. `starts` bounds how many are removed at once."""
    for pause_s in (0.0, *pauses_s):
        await asyncio.sleep(pause_s)
        async with starts:
            try:
                if pause_s:  # what it ran may be what is in the way
                    await engine.kill(box.container)
                await engine.remove(box.container, box.io)
                return True
            except SandboxError as error:
                _log.warning("%s is not removed yet: %s", box.id, error)
    _log.error("%s could not be removed; the end of this server removes it", box.id)
    return False
