"""Sandboxes that do not run yet, and what became of those that never did.

What it is
    A `Birth` is one create from the moment it is asked for: its id, its place in the line, the task that
    makes it. Those whose caller would not wait are promised: they can be asked about, and deleted.
    `Births` also knows which create a used Idempotency-Key belongs to; of a sandbox that is over it keeps no
    more than its last record.

What it does not do
    It makes nothing itself (`sandboxes.py`, `making.py`).
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections import OrderedDict
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

from runtime_server import wire
from runtime_server.box import Box
from runtime_server.errors import BadRequest, SandboxError, Unavailable
from runtime_server.places import Places, Ticket
from runtime_server.wire import Code

KEYS_KEPT = 1000  # of sandboxes that are over: who deleted one has had the answer to its create
FAILED_KEPT = 1000


def new_id() -> str:
    return f"s-{secrets.token_hex(4)}"


@dataclass(frozen=True, slots=True)
class Past:
    """What is kept of a create whose sandbox is over: a digest of what was asked, and the record, in JSON."""

    asked: bytes
    record: bytes


def _check(same: bool, key: str) -> None:
    if not same:
        raise BadRequest(f"the Idempotency-Key {key[:40]!r} was used for another request; take a new one")


def _digest(request: wire.CreateSandbox) -> bytes:
    return hashlib.sha256(request.model_dump_json().encode()).digest()


@dataclass(eq=False)
class Birth:
    """One create. `task` is set by `Births.begin`."""

    request: wire.CreateSandbox
    image: str
    ticket: Ticket
    key: str = ""
    id: str = field(default_factory=new_id)
    promised: bool = False
    created_at: float = field(default_factory=time.time)
    task: asyncio.Future[Box] = field(init=False)

    @property
    def failure(self) -> SandboxError | None:
        if not self.task.done() or self.task.cancelled():
            return None
        error = self.task.exception()
        return error if isinstance(error, SandboxError) else None

    @property
    def failed(self) -> bool:
        return self.task.done() and (self.task.cancelled() or self.task.exception() is not None)

    def unready(self) -> SandboxError:
        if (failure := self.failure) is not None:
            return failure
        what = "waits for a place" if self.ticket.waiting else "is being made"
        return Unavailable(f"{self.id} {what}: GET /v1/sandboxes/{self.id} tells", Code.NOT_READY)


class Births:
    """See the module's docstring. Lives in one event loop."""

    def __init__(self) -> None:
        self._promised: dict[str, Birth] = {}
        self._keys: dict[str, Birth] = {}
        self._past: OrderedDict[str, Past] = OrderedDict()
        self._running: dict[asyncio.Future[Box], Birth] = {}

    @property
    def promised(self) -> list[Birth]:
        """Those that were promised and do not run."""
        return [b for b in self._promised.values() if not b.task.done() or b.failed]

    @property
    def unborn(self) -> list[Birth]:
        """Those under way."""
        return [birth for birth in self._running.values() if not birth.task.done()]

    def begin(self, birth: Birth, work: Coroutine[Any, Any, Box]) -> None:
        task = asyncio.create_task(work)
        self._running[task] = birth
        task.add_done_callback(lambda done: self._running.pop(done, None))
        task.add_done_callback(lambda _: self._drop(birth))
        task.add_done_callback(lambda done: None if done.cancelled() else done.exception())
        birth.task = task
        self.remember(birth)

    def remember(self, birth: Birth) -> None:
        if birth.key:
            self._keys[birth.key] = birth
            self._past.pop(birth.key, None)

    def known(self, key: str | None, request: wire.CreateSandbox) -> Birth | wire.Sandbox | None:
        """The create that had this key, or the record of its sandbox when that is over; a failed one may be
        tried again. BadRequest for another request."""
        birth, past = self._keys.get(key or ""), self._past.get(key or "")
        if birth is not None and not birth.failed:
            _check(birth.request == request, birth.key)
            return birth
        if past is None:
            return None
        _check(past.asked == _digest(request), key or "")
        return wire.Sandbox.model_validate_json(past.record)

    def over(self, box: Box) -> None:
        """A sandbox holds on to all that it was: its agent, its buffers, its files."""
        birth = self._keys.get(box.key)
        if birth is None or birth.id != box.id:
            return
        del self._keys[box.key]
        self._past[box.key] = Past(_digest(birth.request), box.record().model_dump_json().encode())
        while len(self._past) > KEYS_KEPT:
            self._past.popitem(last=False)

    def _drop(self, birth: Birth) -> None:
        """A failed one may be tried again under its key."""
        if birth.failed and self._keys.get(birth.key) is birth:
            del self._keys[birth.key]

    def get(self, identity: str) -> Birth | None:
        return self._promised.get(identity)

    def promise(self, birth: Birth) -> None:
        """From now on somebody may ask for it by its id."""
        birth.promised = True
        self._promised[birth.id] = birth
        failed = [b.id for b in self._promised.values() if b.task.done()]
        for identity in failed[: max(0, len(failed) - FAILED_KEPT)]:
            del self._promised[identity]

    def forget(self, birth: Birth) -> None:
        self._promised.pop(birth.id, None)

    def record(self, birth: Birth, places: Places) -> wire.Sandbox:
        if birth.task.done() and not birth.failed:
            return birth.task.result().record()
        request, failure = birth.request, birth.failure
        return wire.Sandbox(
            id=birth.id,
            image=birth.image,
            state="dead" if birth.failed else "starting" if birth.ticket.seated else "queued",
            workdir=request.workdir or "/",
            labels=request.labels,
            created_at=birth.created_at,
            expires_at=birth.created_at,
            reason=failure.code if failure else Code.SERVER_DRAINING if birth.failed else "",
            message=str(failure or ""),
            queue=places.queue(birth.ticket) if not birth.task.done() else None,
            snapshot=request.snapshot or "",
        )

    async def stop(self) -> None:
        running = [*self._running]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
