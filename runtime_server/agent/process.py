"""A process in a sandbox whose output can be followed while it runs, written to, signalled, and come back to.

What it is
    `Process`, made by `AgentConnection.spawn` and `.attach`.

What it does not do
    Nobody has to read the output: it is kept as `exec` keeps it, head and tail, and the process never waits
    for a reader. A reader that is too slow sees a gap between the offsets of two chunks.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from runtime_server.agent import frames
from runtime_server.agent.calls import Call, Wire, feed
from runtime_server.agent.frames import Finished, Kept, Kind
from runtime_server.agent.mirror import Chunk, Mirror


class Process:
    """Every method raises `AgentLost` once the connection is gone; what runs in the sandbox goes on."""

    def __init__(self, wire: Wire, call: Call, offsets: tuple[int, int] = (0, 0)) -> None:
        assert call.mirrors is not None
        self.number = call.number
        self._wire = wire
        self.call = call
        self._mirrors: tuple[Mirror, Mirror] = call.mirrors
        self._offsets = offsets

    @property
    def ended(self) -> bool:
        return self.call.future.done()

    def kept(self) -> tuple[Kept, Kept]:
        """Of stdout and stderr, what there is up to now."""
        return self._mirrors[0].kept(), self._mirrors[1].kept()

    async def chunks(self, offsets: tuple[int, int] | None = None) -> AsyncGenerator[Chunk, None]:
        """Output from these offsets of stdout and stderr on, as it comes; ends with the process.

        Any number of readers may follow. AgentLost when the connection goes first.
        """
        at = list(offsets or self._offsets)
        while True:
            changed, over = self.call.changed, self.ended
            silent = True
            for which, mirror in enumerate(self._mirrors):
                while (chunk := mirror.read(at[which])) is not None:
                    silent = False
                    at[which] = chunk.offset + len(chunk.data)
                    yield chunk
            if silent and over:
                self.call.future.result()
                return
            if silent:
                await changed.wait()

    async def write(self, data: bytes) -> None:
        """To its stdin, as fast as it reads. AgentError EPIPE when it has none, or closed it."""
        await feed(self._wire, self.call, data)

    async def close_stdin(self) -> None:
        """The end of its input; on a terminal, what Ctrl-D says."""
        if not self.call.refuses:
            self.call.refuses = True
            self._wire.say(Kind.DATA, self.number)

    async def signal(self, signum: int) -> None:
        """To every process that descends from it, whatever session or group it made itself."""
        if not self.ended:
            self._wire.say(Kind.SIGNAL, self.number, frames.signal_payload(signum))

    async def kill(self) -> None:
        """Ends the whole tree, and waits until it is gone."""
        if not self.ended:
            self._wire.say(Kind.CANCEL, self.number)
        await self.wait()

    async def resize(self, columns: int, rows: int) -> None:
        """Of its terminal, where it has one."""
        if not self.ended:
            self._wire.say(Kind.RESIZE, self.number, frames.resize_payload(columns, rows))

    async def wait(self) -> Finished:
        """Its end. Giving up waiting changes nothing: it runs on."""
        result = await asyncio.shield(self.call.future)
        if not isinstance(result, Finished):
            raise self._wire.lose("the agent answered another question than was asked")
        return result
