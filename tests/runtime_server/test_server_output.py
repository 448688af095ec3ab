"""Output as events, without a sandbox: characters, gaps, offsets; and calls that are repeated."""

from __future__ import annotations

import asyncio
import random

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from runtime_server.agent import Chunk, Kept
from runtime_server.idempotency import Idempotency
from runtime_server.output import NEVER, Cutter, chunks_of, offsets_of, pieces
from runtime_server.wire import OutputChunk

TEXT = "aä€😀\n" * 50


def cut(data: bytes, sizes: list[int], at: int = 0) -> list[OutputChunk]:
    cutter, events, start = Cutter((at, 0)), list[OutputChunk](), at
    for size in sizes:
        events += cutter.cut(Chunk(1, start, data[start : start + size]))
        start += size
    return [*events, *cutter.rest()]


@pytest.mark.parametrize("seed", range(20))
def test_text_stays_text_however_it_comes(seed: int) -> None:
    data, dice = TEXT.encode(), random.Random(seed)
    sizes = [dice.randint(1, 7) for _ in range(len(data))]
    events = cut(data, sizes)
    assert {event.encoding for event in events} == {"utf-8"}
    assert "".join(event.data for event in events) == TEXT
    ends = [event.offset + event.size for event in events]
    assert [event.offset for event in events] == [0, *ends[:-1]]


@pytest.mark.parametrize("seed", range(20))
def test_any_bytes_arrive_as_they_were(seed: int) -> None:
    dice = random.Random(seed)
    data = dice.randbytes(500) + TEXT.encode() + dice.randbytes(100)
    events = cut(data, [dice.randint(1, 90) for _ in range(len(data))])
    assert b"".join(event.raw for event in events) == data
    assert not any(event.dropped for event in events)


def test_an_unfinished_character_at_the_end_is_not_lost() -> None:
    events = cut(b"a\xe2\x82", [3])
    assert [(e.raw, e.encoding) for e in events] == [(b"a", "utf-8"), (b"\xe2\x82", "base64")]


def test_a_gap_is_told_and_cuts_no_more_than_it_must() -> None:
    cutter = Cutter((0, 0))
    events = [*cutter.cut(Chunk(1, 0, b"one\xe2")), *cutter.cut(Chunk(1, 100, b"\x82\xactwo"))]
    assert [(e.offset, e.raw, e.dropped, e.encoding) for e in events] == [
        (0, b"one", 0, "utf-8"),
        (3, b"\xe2", 0, "base64"),
        (100, b"\x82\xac", 96, "base64"),
        (102, b"two", 0, "utf-8"),
    ]


def test_pieces_of_what_is_no_text() -> None:
    assert pieces(b"\x80\x80\x80\x80") == [b"", b"\x80\x80\x80\x80", b""]
    assert pieces(b"") == [b"", b""]


def test_offsets() -> None:
    assert offsets_of("3", "both") == (3, 0) and offsets_of("3,4", "both") == (3, 4)
    assert offsets_of("3,4", "stderr") == (NEVER, 4) and offsets_of("3", "stdout") == (3, NEVER)


def test_what_is_kept_begins_at_an_offset() -> None:
    kept = (Kept(b"headtail", 100, 4), Kept(b"", 0, 0))
    assert [*chunks_of(kept, (0, 0))] == [Chunk(1, 0, b"head"), Chunk(1, 96, b"tail")]
    assert [*chunks_of(kept, (50, 0))] == [Chunk(1, 96, b"tail")]
    assert [*chunks_of(kept, (98, 0))] == [Chunk(1, 98, b"il")]
    assert [*chunks_of(kept, (NEVER, NEVER))] == []


class Counting:
    """An application that counts what it did."""

    def __init__(self) -> None:
        self.done = 0
        self.go, self.begun = asyncio.Event(), asyncio.Event()
        parts = (self.add, self.fail, self.stream)
        routes = [Route(f"/{part.__name__}", part, methods=["POST"]) for part in parts]
        self.app = Idempotency(Starlette(routes=routes))

    async def add(self, request: Request) -> JSONResponse:
        self.done += 1
        self.begun.set()
        await self.go.wait()
        return JSONResponse({"done": self.done, "told": (await request.body()).decode()}, 201)

    async def fail(self, _: Request) -> JSONResponse:
        self.done += 1
        return JSONResponse({}, 503)

    async def stream(self, _: Request) -> StreamingResponse:
        self.done += 1
        return StreamingResponse(iter([b"{}\n"]), media_type="application/x-ndjson")

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://test")


async def test_a_key_means_one_effect_and_one_answer() -> None:
    counting, key = Counting(), {"Idempotency-Key": "k"}
    async with counting.client() as client:
        tasks = [asyncio.create_task(client.post("/add", content="x", headers=key)) for _ in range(3)]
        await counting.begun.wait()
        counting.go.set()
        answers = [*await asyncio.gather(*tasks), await client.post("/add", content="x", headers=key)]
        assert {(a.status_code, a.text) for a in answers} == {(201, '{"done":1,"told":"x"}')}
        assert (await client.post("/add", content="y", headers=key)).status_code == 400
        assert (await client.post("/add", content="x")).json()["done"] == 2


async def test_what_failed_may_be_tried_again_and_a_stream_is_not_kept() -> None:
    counting, key = Counting(), {"Idempotency-Key": "k"}
    async with counting.client() as client:
        assert [(await client.post("/fail", headers=key)).status_code for _ in range(2)] == [503, 503]
        assert counting.done == 2
        assert (await client.post("/stream", headers=key)).text == "{}\n"
        again = await client.post("/stream", headers=key)
        assert (again.status_code, again.json()["error"]["code"]) == (409, "streamed")
        assert counting.done == 3
