"""How routes answer: a body, a body that somebody must still be waiting for, a stream of events.

What it does not do
    It decides no status but 499, which nobody reads.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import aclosing
from typing import Any

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from runtime_server import wire
from runtime_server.output import NAMES, Event

NDJSON = "application/x-ndjson"
SSE = "text/event-stream"


def answer(body: BaseModel, status: int = 200) -> Response:
    return Response(body.model_dump_json(), status, media_type="application/json")


def nothing() -> Response:
    return Response(status_code=204)


async def while_connected(
    request: Request,
    work: Coroutine[Any, Any, BaseModel],
    status: int = 200,
    made: Callable[[float], None] | None = None,
) -> Response:
    """Do the work for as long as somebody waits for it: a client that hangs up cancels it. `made` is told
    how long it took to make the answer of what came of it."""
    task = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            start = time.perf_counter()
            response = answer(task.result(), status)
            if made is not None:
                made(time.perf_counter() - start)
            return response
        task.cancel()
        await asyncio.wait({task})
        return Response(status_code=499)  # nobody reads it
    finally:
        leaving.cancel()
        task.cancel()


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def streamed(request: Request, events: AsyncGenerator[Event, None], offset: str = "0") -> StreamingResponse:
    """In lines, or, for who accepts them, as server-sent events whose ids say where to go on."""
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    if SSE in request.headers.get("accept", ""):
        return StreamingResponse(_sent(events, offset), media_type=SSE, headers=headers)
    return StreamingResponse(_lines(events), media_type=NDJSON, headers=headers)


async def _lines(events: AsyncGenerator[Event, None]) -> AsyncIterator[bytes]:
    async with aclosing(events):
        async for event in events:
            yield event.model_dump_json(exclude_none=True).encode() + b"\n"


async def _sent(events: AsyncGenerator[Event, None], offset: str) -> AsyncIterator[bytes]:
    """`offset`: where these events begin."""
    at = [*(int(part) for part in offset.split(",")), 0][:2]
    async with aclosing(events):
        async for event in events:
            if isinstance(event, wire.OutputAlive):
                yield b": alive\n\n"
                continue
            if isinstance(event, wire.OutputChunk):
                at[NAMES.index(event.stream)] = event.offset + event.size
            body = event.model_dump_json(exclude_none=True)
            yield f"id: {at[0]},{at[1]}\nevent: {event.type}\ndata: {body}\n\n".encode()
