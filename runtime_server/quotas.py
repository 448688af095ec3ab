"""How many sandboxes one run may have on a server that serves several: by the label `run` of its creates.

What it is
    A create that would be one too many waits its turn among those of its own run, and holds up nobody else:
    it does not stand in the server's line before one of its run's sandboxes has ended. Sandboxes that carry
    no such label are one run.

How to use it
    async with quotas.admitted(labels, timeout_s): …begin the create…   # counted by others from then on
    quotas.changed()                                                    # one has ended

What it does not do
    It trusts the label: whoever has the server's key may write what he likes. Without `runtime.max_per_run`
    it does nothing.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

from runtime_server.errors import BadRequest, Unavailable
from runtime_server.wire import RUN_LABEL, Code


class Quotas:
    """`most` sandboxes for each run, 0 for any number; `held` counts what there is, by run."""

    def __init__(self, most: int, held: Callable[[], Counter[str]]) -> None:
        self.most, self._held = most, held
        self._begun: Counter[str] = Counter()  # admitted, and not yet counted by `held`
        self._line: dict[str, deque[tuple[int, asyncio.Future[None]]]] = defaultdict(deque)

    @asynccontextmanager
    async def admitted(
        self, labels: Mapping[str, str], timeout_s: float, count: int = 1
    ) -> AsyncIterator[None]:
        """Wait until the run may have so many more. Unavailable (quota) when that takes too long."""
        if not self.most:
            yield
            return
        run = labels.get(RUN_LABEL, "")
        await self._wait(run, timeout_s, count)
        try:
            yield
        finally:
            self._begun[run] -= count

    def changed(self) -> None:
        """Something has ended: admit who can be, in order, each run by itself."""
        if not self.most or not self._line:
            return
        held = self._held()
        for run, line in [*self._line.items()]:
            while line and (line[0][1].done() or held[run] + self._begun[run] + line[0][0] <= self.most):
                count, turn = line.popleft()
                if not turn.done():
                    self._begun[run] += count
                    turn.set_result(None)
            if not line:
                del self._line[run]

    async def _wait(self, run: str, timeout_s: float, count: int) -> None:
        if count > self.most:
            raise BadRequest(
                f"{count} sandboxes at once can never be: a run may have {self.most} on this server "
                "(runtime.max_per_run)"
            )
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._line[run].append((count, turn))
        self.changed()
        try:
            async with asyncio.timeout(timeout_s):
                await turn
        except BaseException as error:  # whatever ends the waiting, what was admitted must not be lost
            if turn.done() and not turn.cancelled():
                self._begun[run] -= count
            turn.cancel()
            self.changed()
            if isinstance(error, TimeoutError):
                raise self._too_late(run, timeout_s) from None
            raise

    def _too_late(self, run: str, timeout_s: float) -> Unavailable:
        return Unavailable(
            f"run {run[:80]!r} has the {self.most} sandboxes that one run may have on this server, and none "
            f"ended within {timeout_s:g} s. Delete some, wait longer (queue_timeout_s), or raise "
            "runtime.max_per_run of the server.",
            Code.QUOTA,
        )
