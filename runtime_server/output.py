"""Output as events: chunks of bytes to text that never ends within a character, followed as it comes.

What it is
    `Cutter` turns the chunks of two streams into `wire.OutputChunk`s; `follow` runs through any source of
    events for as long as somebody reads, and says what became of the sandbox when it ends meanwhile.

What it does not do
    No buffer: a reader that is too slow finds that bytes were dropped, and the process never waits for it.
    No HTTP (`routes/streams.py`).
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing

from runtime_server import wire
from runtime_server.agent import Chunk, Kept
from runtime_server.box import Box
from runtime_server.errors import SandboxError

TICK_S = 1.0
ALIVE_S = 10.0
NEVER = 1 << 62  # the offset in a stream that nobody wants
NAMES: tuple[wire.StreamName, wire.StreamName] = ("stdout", "stderr")
Event = wire.OutputStarted | wire.OutputChunk | wire.OutputAlive | wire.OutputEnd | wire.OutputError


def offsets_of(offset: str, stream: str) -> tuple[int, int]:
    """Of `wire.Offset`. A stream that was not asked for begins beyond its end."""
    numbers = [int(part) for part in offset.split(",")]
    if stream == "both":
        return numbers[0], numbers[1] if len(numbers) > 1 else 0
    at = numbers[-1] if stream == "stderr" else numbers[0]
    return (NEVER, at) if stream == "stderr" else (at, NEVER)


class Cutter:
    """Chunks in, events out. Bytes of an unfinished character wait for the next chunk, or `rest`."""

    def __init__(self, offsets: tuple[int, int]) -> None:
        self._next = [*offsets]  # where the next chunk of each stream is expected
        self._held = [b"", b""]

    def cut(self, chunk: Chunk) -> Iterator[wire.OutputChunk]:
        which = chunk.stream - 1
        held, self._held[which] = self._held[which], b""
        if chunk.offset != self._next[which] + len(held):
            yield from self._say(which, held, self._next[which])
            held = b""
        data, at = held + chunk.data, chunk.offset - len(held)
        *whole, unfinished = pieces(data)
        for piece in whole:
            yield from self._say(which, piece, at)
            at += len(piece)
        self._held[which] = unfinished

    def rest(self) -> Iterator[wire.OutputChunk]:
        for which in (0, 1):
            held, self._held[which] = self._held[which], b""
            yield from self._say(which, held, self._next[which])

    def _say(self, which: int, data: bytes, at: int) -> Iterator[wire.OutputChunk]:
        if not data:
            return
        text, encoding = _said(data)
        dropped, self._next[which] = max(0, at - self._next[which]), at + len(data)
        yield wire.OutputChunk(
            stream=NAMES[which], offset=at, size=len(data), dropped=dropped, data=text, encoding=encoding
        )


def _said(data: bytes) -> tuple[str, wire.Encoding]:
    try:
        return data.decode(), "utf-8"
    except UnicodeDecodeError:
        return base64.b64encode(data).decode(), "base64"


def pieces(data: bytes) -> list[bytes]:
    """Of which each is all text or not, but the last one: the beginning of a character, or nothing."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        text, rest = data[: error.start], data[error.start :]
        if error.reason == "unexpected end of data":
            return [text, rest]
        # what a gap, or an offset, has cut off a character does not make the rest unreadable
        cut = next((n for n in range(4) if n == len(rest) or rest[n] & 0xC0 != 0x80), 0) if not text else 0
        return [rest[:cut], *pieces(rest[cut:])] if cut else [text, rest, b""]
    return [data, b""]


def chunks_of(kept: tuple[Kept, Kept], offsets: tuple[int, int]) -> Iterator[Chunk]:
    """What is kept now, from these offsets on."""
    for stream, (one, at) in enumerate(zip(kept, offsets, strict=True), start=1):
        tail_at = one.total - (len(one.data) - one.head)
        for begin, data in ((0, one.data[: one.head]), (tail_at, one.data[one.head :])):
            left = data[max(0, at - begin) :]
            if left:
                yield Chunk(stream, max(at, begin), left)


async def events_of(
    chunks: AsyncIterator[Chunk], offsets: tuple[int, int]
) -> AsyncGenerator[wire.OutputChunk, None]:
    cutter = Cutter(offsets)
    async for chunk in chunks:
        for event in cutter.cut(chunk):
            yield event
    for event in cutter.rest():
        yield event


async def follow(
    box: Box, events: AsyncGenerator[Event, None], stopping: Callable[[], SandboxError | None] = lambda: None
) -> AsyncGenerator[Event, None]:
    """The events, a sign of life where none come, and at last what went wrong, if anything did.

    While somebody follows, the sandbox does not expire.
    """
    said = time.monotonic()
    try:
        async with box.in_use(), aclosing(_ticking(events)) as ticking:
            async for event in ticking:
                now = time.monotonic()
                if error := stopping():
                    raise error
                if event is None and now - said < ALIVE_S:
                    continue
                said = now
                yield wire.OutputAlive() if event is None else event
    except SandboxError as error:
        yield wire.OutputError(status=error.status, error=error.failure())


async def _ticking(events: AsyncGenerator[Event, None]) -> AsyncGenerator[Event | None, None]:
    """The events, and None every TICK_S while there are none."""
    coming = asyncio.ensure_future(_next(events))
    try:
        while True:
            if not (await asyncio.wait({coming}, timeout=TICK_S))[0]:
                yield None
                continue
            event = coming.result()
            if event is None:
                return
            yield event
            coming = asyncio.ensure_future(_next(events))
    finally:
        coming.cancel()
        await asyncio.wait({coming})
        await events.aclose()


async def _next(events: AsyncIterator[Event]) -> Event | None:
    return await anext(events, None)
