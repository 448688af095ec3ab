"""The connections of a client's quick calls, against servers that say exactly what a test wants said."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from runtime_server import wire
from runtime_server.client import Client
from runtime_server.client_lines import Broken, Lines
from runtime_server.errors import Unavailable
from runtime_server.wire import Code

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 15\r\n\r\n" + b'{"status":"ok"}'
DONE = b"HTTP/1.1 200 OK\r\ncontent-length: 15\r\n\r\n" + b'{"exit_code":7}'
HANG_UP = b""
REQUEST = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


@dataclass
class Script:
    """A server: to each request, whatever connection it comes on, the next of the answers."""

    answers: list[Sequence[bytes] | None]  # pieces; HANG_UP closes; None: never an answer
    connections: int = 0
    heads: list[bytes] = field(default_factory=list)
    hung_up: asyncio.Event = field(default_factory=asyncio.Event)  # the client did, unanswered
    port: int = 0
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    serving: set[asyncio.Task[None]] = field(default_factory=set)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.serving.add(task)
        self.connections += 1
        while await self._one(reader, writer):
            pass
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            return False
        length = [int(x.split(b":")[1]) for x in head.split(b"\r\n") if x.lower().startswith(b"content-l")]
        await reader.readexactly(sum(length))
        self.heads.append(head)
        self.asked.set()
        pieces = self.answers.pop(0)
        for piece in pieces or ():
            if piece == HANG_UP:
                return False
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)  # each in a packet of its own, mostly
        if pieces is None:
            await reader.read()
            self.hung_up.set()
        return pieces is not None


@asynccontextmanager
async def server(*answers: Sequence[bytes] | None) -> AsyncIterator[Script]:
    script = Script([*answers])
    listening = await asyncio.start_server(script.serve, "127.0.0.1", 0)
    script.port = listening.sockets[0].getsockname()[1]
    async with listening, asyncio.timeout(20):
        yield script
        await asyncio.gather(*script.serving)


@asynccontextmanager
async def lines(script: Script) -> AsyncIterator[Lines]:
    made = Lines.of(f"http://127.0.0.1:{script.port}")
    assert made is not None
    try:
        yield made
    finally:
        await made.close()


def chunked(*parts: bytes) -> bytes:
    body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (*parts, b""))
    return b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + body


@pytest.mark.parametrize(
    ("pieces", "stays"),
    [
        ([OK], True),
        ([OK[:10], OK[10:40], OK[40:]], True),
        ([chunked(b'{"status"', b':"ok"}')], True),
        ([b"HTTP/1.1 103 Early Hints\r\n\r\n" + OK], True),
        ([OK.replace(b"content", b"connection: close\r\ncontent")], False),
        ([b'HTTP/1.1 200 OK\r\n\r\n{"status"', b':"ok"}', HANG_UP], False),
        ([OK.replace(b"1.1", b"1.0")], False),
    ],
)
async def test_every_way_of_saying_an_answer_is_heard(pieces: list[bytes], stays: bool) -> None:
    async with server(pieces, [OK]) as script, lines(script) as line:
        for _ in range(2):
            got = await line.ask(REQUEST, 5)
            assert (got.status, got.content) == (200, b'{"status":"ok"}')
        assert script.connections == (1 if stays else 2)


@pytest.mark.parametrize(
    "pieces", [[HANG_UP], [OK[:20], HANG_UP], [OK[:-3], HANG_UP], [b"SSH-2.0-OpenSSH\r\n"]]
)
async def test_half_of_an_answer_is_none(pieces: list[bytes]) -> None:
    async with server(pieces, [OK]) as script, lines(script) as line:
        with pytest.raises(Broken) as broken:
            await line.ask(REQUEST, 5)
        assert not broken.value.unsent and not broken.value.late
        assert (await line.ask(REQUEST, 5)).good


async def test_silence_ends_and_who_stops_waiting_hangs_up() -> None:
    async with server(None, None) as script, lines(script) as line:
        with pytest.raises(Broken) as broken:
            await line.ask(REQUEST, 0.05)
        assert broken.value.late
        await script.hung_up.wait()
        script.hung_up.clear()
        script.asked.clear()
        waiting = asyncio.ensure_future(line.ask(REQUEST, 60))
        await script.asked.wait()
        waiting.cancel()
        await script.hung_up.wait()


async def test_a_connection_that_was_closed_meanwhile_is_not_used() -> None:
    """Also when the event loop has had no time to notice."""
    async with server([OK, HANG_UP], [OK]) as script, lines(script) as line:
        assert (await line.ask(REQUEST, 5)).good
        await asyncio.sleep(0.05)
        assert (await line.ask(REQUEST, 5)).good and script.connections == 2


async def test_what_nobody_asked_for_ends_a_connection() -> None:
    async with server([OK + OK], [OK]) as script, lines(script) as line:
        assert (await line.ask(REQUEST, 5)).good
        assert (await line.ask(REQUEST, 5)).good and script.connections == 2


async def test_many_at_once_take_a_connection_each_and_leave_them_to_the_next() -> None:
    async with server(*[[OK]] * 20) as script, lines(script) as line:
        for _ in range(2):
            got = await asyncio.gather(*(line.ask(REQUEST, 5) for _ in range(10)))
            assert all(one.good for one in got)
        assert script.connections == 10


async def test_only_what_may_be_repeated_is() -> None:
    exec_ = wire.Exec(command=["true"])
    async with (
        server([HANG_UP], [OK], [HANG_UP], [DONE]) as script,
        Client(f"http://127.0.0.1:{script.port}", "k" * 16) as client,
    ):
        assert (await client.health()).status == "ok" and len(script.heads) == 2
        with pytest.raises(Unavailable) as lost:
            await client.exec("some-box", exec_)
        assert lost.value.code == Code.UNREACHABLE and len(script.heads) == 3
        assert (await client.exec("some-box", exec_)).exit_code == 7


def _health(client: Client) -> object:
    return client.health()


def _odd_id(client: Client) -> object:
    return client.get("../a b?c#d")


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (_health, b"GET /base/health HTTP/1.1"),
        (_odd_id, b"GET /base/v1/a%20b?c HTTP/1.1"),
    ],
)
async def test_a_head_has_nothing_in_it_that_the_caller_did_not_mean(
    call: Callable[[Client], object], line: bytes
) -> None:
    async with server([b"HTTP/1.1 404 No\r\ncontent-length: 0\r\n\r\n"]) as script:
        async with Client(f"http://127.0.0.1:{script.port}/base/", "k" * 16, tries=1) as client:
            with pytest.raises(Exception, match="404"):
                await call(client)  # type: ignore[misc]
        head = script.heads[0].split(b"\r\n")
        assert head[0] == line and f"Host: 127.0.0.1:{script.port}".encode() in head
        assert b"X-API-Key: kkkkkkkkkkkkkkkk" in head


async def test_a_line_end_in_a_key_reaches_no_server() -> None:
    async with server([OK]) as script:
        async with Client(f"http://127.0.0.1:{script.port}", "k" * 16, tries=1) as client:
            with pytest.raises(Unavailable):
                await client.create(key="a\r\nX-Other: b")
        assert not script.heads
