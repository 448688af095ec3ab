"""Archives in and out of a sandbox: a tar that is made, or unpacked, inside it.

What it is
    `pack` and `unpack`, called by the methods of `AgentConnection` with the same names.

What it does not do
    No compression, and nothing is ever unpacked on this side. A tar that comes out was made by something in
    the sandbox: whoever unpacks it elsewhere must check it as any other.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator

from runtime_server.agent import frames
from runtime_server.agent.calls import Call, Wire, feed
from runtime_server.agent.frames import AgentError, Kind

STALL_S = 120.0


async def pack(wire: Wire, call: Call) -> AsyncGenerator[bytes, None]:
    """The call's content as it comes, taken no faster than it is asked for."""
    assert call.content is not None
    total = taken = 0
    try:
        while True:
            changed = call.changed
            while call.content:
                data = call.content.popleft()
                total, taken = total + len(data), taken + len(data)
                if total > call.limit:
                    raise wire.lose(f"{call.subject}: the agent sent more than {call.limit} bytes")
                if taken >= frames.PUSH_WINDOW // 4 and not call.future.done():
                    call.window += taken
                    wire.say(Kind.ACK, call.number, taken.to_bytes(4, "little"))
                    taken = 0
                yield data
            if call.future.done():
                size, _ = call.future.result()
                if size != total:
                    raise wire.lose(f"{call.subject}: the agent sent {total} of {size} bytes")
                return
            await _in_time(wire, call, changed)
    finally:
        if call.number in wire.calls:
            wire.say(Kind.CANCEL, call.number)


async def _in_time(wire: Wire, call: Call, changed: asyncio.Event) -> None:
    try:
        async with asyncio.timeout(STALL_S):
            await changed.wait()
    except TimeoutError as error:
        raise wire.lose(f"{call.subject}: nothing has come for {STALL_S:.0f} s") from error


async def unpack(wire: Wire, call: Call, stream: AsyncIterator[bytes]) -> int:
    """Feeds `stream` to the call; the number of entries. What fails is the agent's to say."""
    try:
        try:
            async for data in stream:
                async with asyncio.timeout(STALL_S):
                    await feed(wire, call, data)
            wire.say(Kind.DATA, call.number)
        except AgentError:
            pass  # it takes no more: it refused something, and says what
        except TimeoutError as error:
            raise wire.lose(f"{call.subject}: nothing was taken for {STALL_S:.0f} s") from error
        async with asyncio.timeout(STALL_S):
            count, _ = await asyncio.shield(call.future)
        return int(count)
    finally:
        if call.number in wire.calls:
            wire.say(Kind.CANCEL, call.number)
