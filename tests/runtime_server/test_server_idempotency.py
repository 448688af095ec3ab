"""What is kept of answers, so that they can be given again: all that was said, and little more than that."""

from __future__ import annotations

import gc
import tracemalloc

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from runtime_server.idempotency import Idempotency

BODY = '{"exit_code":0,"stdout":{"text":"1\\n","size":2},"stderr":{"text":"","size":0},"duration_ms":1.25}'


class Calls:
    """An application behind the layer, and one who calls it."""

    def __init__(self) -> None:
        self.made = 0
        self.layer = Idempotency(self.app)

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        self.made += 1
        await Response(BODY, 201, media_type="application/json")(scope, receive, send)

    async def call(self, key: str) -> list[Message]:
        said: list[Message] = []

        async def receive() -> Message:
            return {"type": "http.request", "body": b"{}", "more_body": False}

        async def send(message: Message) -> None:
            said.append(message)

        headers = [(b"idempotency-key", key.encode())]
        scope = {"type": "http", "method": "POST", "path": "/v1/x", "query_string": b"", "headers": headers}
        await self.layer(scope, receive, send)
        return said


async def test_an_answer_is_given_again_as_it_was() -> None:
    calls = Calls()
    first, second = await calls.call("key"), await calls.call("key")
    assert calls.made == 1 and first == second
    assert first[0]["status"] == 201 and first[1]["body"] == BODY.encode()


async def test_thousands_of_answers_take_little_memory() -> None:
    calls, count = Calls(), 500
    await calls.call("first")
    gc.collect()
    tracemalloc.start()
    try:
        for number in range(count):
            await calls.call(f"key-{number}")
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] / count < 1000
    finally:
        tracemalloc.stop()
