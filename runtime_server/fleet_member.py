"""One server of a fleet as its client sees it: does it answer, what has it, how full is it.

What it is
    `Member.score` says how good a place it is for the next sandbox of an image (less is better): how full
    it is, and a penalty of half its places where the image would have to be fetched first. So the
    sandboxes of one image fill half a server before another one fetches the image too.

What it does not do
    It chooses nothing (`fleet.py` does).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from orchestrator.contract import ServerRecord
from runtime_server.client import Client
from runtime_server.errors import SandboxError
from runtime_server.wire_lifecycle import Capacity

ABSENT = 0.5  # what an image costs that is not there, in shares of a server
WARM = 0.1  # what a warm container is worth


class Member:
    """See the module's docstring. `up`: it answered as itself when last asked. `listed`: it has a record."""

    def __init__(self, record: ServerRecord, client: Client) -> None:
        self.record, self.client = record, client
        self.up, self.listed = False, True
        self.held: set[str] = set()
        self.images: set[str] = set()
        self.capacity: Capacity | None = None
        self._expected = 0
        self._since = 0  # begun less ended, since it said its capacity

    @property
    def places(self) -> int:
        return (self.capacity.places if self.capacity else self.record.places) or 1

    @property
    def load(self) -> float:
        """Sandboxes that it has or was asked for, in shares of its places; above 1 they queue."""
        if self.capacity is None:
            return (len(self.held) + self._expected) / self.places
        said = self.capacity
        return max(0, said.in_use + said.queued + self._since) / self.places

    def score(self, image: str | None, more: float = 0.0, there: bool = False) -> tuple[float, float]:
        """Less is better; servers that are alike are told apart by chance. `image` None is the default one,
        which every server has."""
        warm = WARM if self.capacity and self.capacity.warm.get(image or "", 0) else 0.0
        absent = 0.0 if there or image is None or image in self.images else ABSENT
        return self.load + more + absent - warm, random.random()  # noqa: S311 - no secret

    @contextmanager
    def expecting(self) -> Iterator[None]:
        """While a create is under way."""
        self._expected += 1
        self._since += 1
        try:
            yield
        except BaseException:  # whatever came of it, it is not there
            self._since -= 1
            raise
        finally:
            self._expected -= 1

    def took(self, sandbox: str, *images: str | None) -> None:
        self.held.add(sandbox)
        self.images |= {image for image in images if image}

    def released(self, sandbox: str) -> None:
        self.held.discard(sandbox)
        self._since -= 1

    async def ask(self, run_id: str, timeout_s: float) -> None:
        """Is it the one of the record, and how full? One that hangs, drains or is another server is down."""
        try:
            async with asyncio.timeout(timeout_s):
                health = await self.client.health()
                us = (health.run_id, health.nonce) == (run_id, self.record.nonce)
                self.up = us and health.status == "ok"
                if self.up:
                    self.capacity = await self._ask_capacity()
        except (SandboxError, TimeoutError):
            self.up = False

    async def _ask_capacity(self) -> Capacity | None:
        before = self._since
        try:
            said = await self.client.capacity()
        except SandboxError:  # a server of an earlier version; we count what is ours
            return None
        self._since -= before
        self.images |= {*said.images}
        return said


def placement(members: Sequence[Member], images: Mapping[str, int]) -> dict[Member, dict[str, int]]:
    """How many sandboxes of each image each server will get, when they are asked for one after the other."""
    shares: dict[Member, dict[str, int]] = {member: {} for member in members}
    more = dict.fromkeys(members, 0.0)
    for image, count in images.items() if members else ():
        for _ in range(max(1, count)):
            scores = {m: m.score(image, more[m], image in shares[m]) for m in members}
            best = min(members, key=scores.__getitem__)
            shares[best][image] = shares[best].get(image, 0) + min(1, count)
            more[best] += min(1, count) / best.places
    return shares
