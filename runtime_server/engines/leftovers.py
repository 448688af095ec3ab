"""What runtimes go on to make that a killed Podman service had begun: removed while the server runs.

What it is
    A container that was just being started when the service was killed is unknown to the next one, or was
    deleted there before its runtime had come to an end. Then the runtime makes it all the same: a process
    that waits for ever to be let go, its monitor, its cgroups. `remove` looks for those a few times.

What it does not do
    Files: `graph.tidy` removes what is left in the storage, before the next service is started.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

from runtime_server.engines import monitors, processes
from runtime_server.engines.state import State
from runtime_server.errors import SandboxError

AFTER_S = (6.0, 10.0, 30.0)
YOUNG_CGROUP_S = 5.0


async def remove(state: State, cgroup: str, known: Callable[[], Awaitable[set[str]]]) -> None:
    """Look `AFTER_S` each; `known` are the identities of all containers that the new service has."""
    for pause_s in AFTER_S:
        await asyncio.sleep(pause_s)
        await end_unknown(state, known)
        if cgroup:
            await asyncio.to_thread(processes.remove_old_cgroups, cgroup, "libpod-*", YOUNG_CGROUP_S)


async def end_unknown(state: State, known: Callable[[], Awaitable[set[str]]]) -> None:
    """Monitors whose container the service does not know, and their containers."""
    seen = await asyncio.to_thread(monitors.running, state)  # first: one that begins now is known by then
    with contextlib.suppress(SandboxError):  # the service was killed again: somebody will look again
        there = await known()
        unknown = {pid: identity for pid, identity in seen.items() if identity not in there}
        if unknown:
            await asyncio.to_thread(monitors.end, state, unknown)
