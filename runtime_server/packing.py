"""Archives in and out of a sandbox: a tar of a directory, streamed, unpacked and made inside.

What it is
    `unpack` and `pack` of a sandbox. What leads out of the directory, devices, FIFOs and bombs are refused
    by the agent, which never writes through a link; here that gets its code.

What it does not do
    No compression. Nothing is unpacked on this machine. What came before a refusal stays, inside.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, contextmanager

from runtime_server import wire
from runtime_server.agent import AgentError
from runtime_server.box import Box
from runtime_server.errors import BadRequest, TooLarge
from runtime_server.wire import Code

ARCHIVE_MAX = 4 << 30
ENTRIES_MAX = 100_000
_REFUSED = (errno.EPERM, errno.EINVAL, errno.ELOOP)


async def unpack(box: Box, path: str, data: AsyncIterator[bytes]) -> wire.Unpacked:
    """Below the directory, which is made. BadRequest (archive_refused), TooLarge, NotFound."""
    where = box.resolve(path)
    async with box.in_use():
        with _said():
            count = await box.agent.unpack(where, data, ARCHIVE_MAX, ENTRIES_MAX)
    return wire.Unpacked(path=where, entries=count)


async def pack(box: Box, path: str, max_bytes: int) -> AsyncGenerator[bytes, None]:
    """A tar of a directory, with names relative to it, or of one file."""
    async with box.in_use():
        with _said():
            async for data in box.agent.pack(box.resolve(path), max_bytes):
                yield data


async def begun(chunks: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """The same, once there is something of it: what is refused is refused before an answer begins."""
    first = await anext(chunks, b"")

    async def all_of_it() -> AsyncGenerator[bytes, None]:
        async with aclosing(chunks):
            yield first
            async for data in chunks:
                yield data

    return all_of_it()


@contextmanager
def _said() -> Iterator[None]:
    """What the agent says about archives, in the words of the service."""
    try:
        yield
    except AgentError as error:
        if error.errno == errno.E2BIG:
            raise TooLarge(f"{error}. Allowed are {ARCHIVE_MAX} bytes and {ENTRIES_MAX} entries.") from None
        if error.errno in _REFUSED:
            raise BadRequest(str(error), Code.ARCHIVE_REFUSED, errno=error.errno) from None
        raise
