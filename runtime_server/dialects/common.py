"""What the dialects' routes share: answers, bodies, faults, and doing a thing once.

What it does not do
    No redirects, no HTML, no 429: their clients break on these. A body that is an error is an object.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from runtime_server.dialects.records import infra
from runtime_server.errors import SandboxError

SMALL = 4 << 10
LARGE_KEPT = 4 << 20  # bytes of large results that are kept to be said again, for each sandbox

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)


class Fault(Exception):
    """An answer that is no success: its status, and `detail` for whoever reads it."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail

    @property
    def body(self) -> dict[str, Any]:
        return {"detail": self.detail}


def answer(body: Any, status: int = 200) -> Response:
    return Response(
        json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace"),
        status,
        media_type="application/json",
    )


def base_url(request: Request) -> str:
    """This server as the client reached it, without a slash at the end."""
    return f"{request.url.scheme}://{request.url.netloc}"


def gone(error: SandboxError) -> Fault:
    """A sandbox that is over, or a server that cannot: the client takes 502 for the end of this one."""
    return Fault(502, f"infra:{infra(error.code)} {error}")


async def read(request: Request, model: type[M]) -> M:
    """The JSON body as a model. Fault 422 says which field is wrong, and not its value."""
    data = await read_json(request)
    try:
        return model.model_validate(data)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc'])) or 'body'}: {e['msg']}" for e in error.errors()[:5]]
        raise Fault(422, "the request is not valid: " + "; ".join(lines)) from None


async def read_json(request: Request) -> Any:
    try:
        body = await request.body()
        return json.loads(body) if body else {}
    except ClientDisconnect:
        raise Fault(400, "the body ended before it was complete") from None
    except (ValueError, RecursionError):
        raise Fault(422, "the body is no JSON") from None


async def disconnected(request: Request) -> None:
    """Returns when the client has hung up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


@dataclass(eq=False)
class _Entry(Generic[T]):
    task: asyncio.Task[T]
    waiting: int = 0
    delivered: bool = False
    over: float = field(default=0.0)

    @property
    def size(self) -> int:
        """Bytes of a result that is large; 0 for one that does not matter."""
        if not self.task.done() or self.task.cancelled() or self.task.exception() is not None:
            return 0
        size = _size(self.task.result())
        return size if size > SMALL else 0


class Once(Generic[T]):
    """Does what has a key once, however often it is asked: joins what runs, replays what is over.

    Nobody's leaving ends the work. Of results the last `kept` stay, for `seconds`, and of large ones fewer.
    With `lost_only` a result is replayed only if nobody got it.
    """

    def __init__(self, kept: int = 256, seconds: float = float("inf"), lost_only: bool = False) -> None:
        self.kept, self.seconds, self.lost_only = kept, seconds, lost_only
        self._entries: OrderedDict[str, _Entry[T]] = OrderedDict()

    async def do(
        self, key: str, work: Callable[[], Awaitable[T]], request: Request | None = None
    ) -> T | None:
        """The result; None when the client left first."""
        entry = self._entries.get(key)
        if entry is None or self._stale(entry):
            entry = _Entry(asyncio.ensure_future(_call(work)))
            entry.task.add_done_callback(lambda _: setattr(entry, "over", time.monotonic()))
            self._entries.pop(key, None)
            self._entries[key] = entry
            self._trim()
        return await self._wait(entry, request)

    def _stale(self, entry: _Entry[T]) -> bool:
        if not entry.task.done():
            return False
        if entry.task.cancelled() or time.monotonic() - entry.over > self.seconds:
            return True
        return self.lost_only and entry.delivered

    def _trim(self) -> None:
        """From the newest to the oldest; what runs stays whatever there is."""
        left = LARGE_KEPT
        for number, key in enumerate([*reversed(self._entries)]):
            entry = self._entries[key]
            left -= (size := entry.size)
            if entry.task.done() and (number >= self.kept or self._stale(entry) or (size and left < 0)):
                del self._entries[key]

    async def _wait(self, entry: _Entry[T], request: Request | None) -> T | None:
        if request is None:
            return await asyncio.shield(entry.task)
        leaving = asyncio.ensure_future(disconnected(request))
        try:
            await asyncio.wait({entry.task, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if leaving.done():
                return None
            entry.delivered = True
            return entry.task.result()
        finally:
            leaving.cancel()


def _size(value: Any) -> int:
    """Of the texts in it."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list | tuple) else 0


async def _call(work: Callable[[], Awaitable[T]]) -> T:
    return await work()
