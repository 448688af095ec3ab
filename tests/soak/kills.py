"""What is killed during a soak: agents, containers, monitors, Podman's service, the server.

What it is
    `Killer.one` chooses among what lives now, and tells the cycle whose sandbox it was before it strikes.

What it does not do
    It touches no process of another server: every pid is found by this server's own name.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
from pathlib import Path

import httpx
from soak.cycle import Cycle, Tally
from soak.place import Place

from runtime_server.engines import processes

KINDS = {"agent": 4, "container": 2, "conmon": 2, "service": 1}
WAIT_S = 5.0
SERVER = 3  # its weight among the others, where it is not spared


class Killer:
    """See the module's docstring."""

    def __init__(self, place: Place, tally: Tally) -> None:
        self.place, self.tally = place, tally
        self._server = asyncio.Lock()

    async def one(self, chance: random.Random, *, calm: bool) -> None:
        weights = KINDS if calm else {**KINDS, "server": SERVER}
        (kind,) = chance.choices([*weights], [*weights.values()])
        number = chance.randrange(1 << 16)
        if kind == "server":
            await self._kill_server()
        elif kind == "service":
            await self._kill_service()
        else:
            await self._kill_of_one(kind, number)

    def forget(self, cycle: Cycle) -> None:
        """It is not to be struck (any more)."""
        self.tally.forget(cycle)

    async def _kill_server(self) -> None:
        async with self._server:
            self.tally.killed["server"] += 1
            await self.place.kill()

    async def _kill_service(self) -> None:
        async with self._server:
            for pid in processes.services(self.place.state.token):
                processes.send(pid)
                self.tally.killed["service"] += 1

    async def _kill_of_one(self, kind: str, number: int) -> None:
        """Of the sandbox of a cycle that uses it now."""
        async with self._server:
            alive = await self._victims()
            if not alive:
                return
            agent, cycle = alive[number % len(alive)]
            monitor = int((processes.stat_fields(agent) or ["", "0"])[1])
            cycle.killed = kind
            self.tally.killed[kind] += 1
            if kind == "container":
                await self._end(agent, monitor)
            else:
                processes.send(agent if kind == "agent" else monitor, signal.SIGKILL)
            if kind != "conmon":  # the kernel soon gives the number of its namespace to another sandbox
                self.forget(cycle)

    async def _victims(self) -> list[tuple[int, Cycle]]:
        """Agents whose cycle is in the middle of it; waits a moment for one."""
        for _ in range(int(WAIT_S / 0.02)):
            found = [(pid, cycle) for pid in self.place.agents() if (cycle := self._cycle_of(pid))]
            if found:
                return found
            await asyncio.sleep(0.02)
        return []

    def _cycle_of(self, agent: int) -> Cycle | None:
        with contextlib.suppress(OSError):
            return self.tally.live.get(str(Path(f"/proc/{agent}/ns/pid").readlink()))
        return None

    async def _end(self, agent: int, monitor: int) -> None:
        """As `podman kill` would, also where its service is dead just now; `podman rm` beside the server's
        own loses one of Podman's lock files."""
        words = processes.command_line(monitor).split(b"\0")
        identity = words[words.index(b"-c") + 1].decode() if b"-c" in words else ""
        transport = httpx.AsyncHTTPTransport(uds=str(self.place.state.socket))
        async with httpx.AsyncClient(transport=transport, timeout=60) as podman:
            url = f"http://podman/v4.0.0/libpod/containers/{identity}/kill"
            try:
                await podman.post(url, params={"signal": "KILL"})
            except httpx.TransportError:
                processes.send(agent, signal.SIGKILL)
