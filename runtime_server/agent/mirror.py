"""What the server knows of one output stream: its head and its tail, in bounded memory, by offset.

What it is
    `Mirror` takes the bytes the agent pushes and gives them back from any offset that is still kept, so any
    number of readers may follow a process, or come back to it, without a queue each. `Chunk` is what they
    get; where one starts later than the one before it ended, the bytes between are gone.

What it does not do
    No I/O, no decoding. It holds at most one and a half times its limit.
"""

from __future__ import annotations

from dataclasses import dataclass

from runtime_server.agent.frames import AgentLost, Kept


@dataclass(frozen=True)
class Chunk:
    """Some bytes of a stream: 1 is stdout (or the terminal), 2 is stderr."""

    stream: int
    offset: int
    data: bytes


class Mirror:
    """The first half and the last half of `limit` bytes of one stream."""

    def __init__(self, stream: int, limit: int) -> None:
        self.stream = stream
        self.total = 0  # offset after the last byte that came
        self._room = limit // 2
        self._ring = limit - self._room
        self._head = bytearray()
        self._tail = bytearray()
        self._tail_at = 0  # offset of the tail's first byte

    def take(self, offset: int, data: bytes) -> None:
        """AgentLost when the agent says the same bytes twice."""
        if offset < self.total or offset + len(data) >= 1 << 63:
            raise AgentLost("the agent sent output that it had sent before")
        if offset > self.total:
            self._tail.clear()
        if offset == len(self._head) == self.total and len(self._head) < self._room:
            part = data[: self._room - len(self._head)]
            self._head += part
            offset, data = offset + len(part), data[len(part) :]
        self.total = offset + len(data)
        if not data:
            return
        if not self._tail:
            self._tail_at = offset
        self._tail += data
        self._trim(self._ring * 3 // 2)

    def _trim(self, most: int) -> None:
        """Not at every byte: cutting the front moves what follows."""
        if len(self._tail) > most:
            cut = len(self._tail) - self._ring
            del self._tail[:cut]
            self._tail_at += cut

    def kept(self) -> Kept:
        self._trim(self._ring)
        return Kept(bytes(self._head + self._tail), self.total, len(self._head))

    def read(self, offset: int, most: int = 1 << 16) -> Chunk | None:
        """The first kept bytes from `offset` on; None when there are none yet."""
        if offset < len(self._head):
            return Chunk(self.stream, offset, bytes(self._head[offset : offset + most]))
        offset = max(offset, self._tail_at)
        data = bytes(self._tail[offset - self._tail_at :][:most]) if self._tail else b""
        return Chunk(self.stream, offset, data) if data else None
