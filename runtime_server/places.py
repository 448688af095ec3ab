"""Places for sandboxes: so many may exist at once, the others wait their turn.

What it is
    A first-come, first-served counter with a time limit for waiting, which can be closed.

What it does not do
    It knows nothing of sandboxes.
"""

from __future__ import annotations

import asyncio
from collections import deque

from runtime_server.errors import SandboxError, Unavailable
from runtime_server.wire import Code


class Places:
    """`take` one, `give` it back."""

    def __init__(self, number: int) -> None:
        self.number = self.free = number
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._closed: SandboxError | None = None

    @property
    def waiting(self) -> int:
        return sum(not future.done() for future in self._waiting)

    async def take(self, timeout_s: float) -> None:
        """Unavailable (queue_timeout) when none becomes free in time, or what `close` was given."""
        if self._closed is not None:
            raise self._closed
        if self.free and not self.waiting:
            self.free -= 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            async with asyncio.timeout(timeout_s):
                await turn
        except BaseException as error:  # a turn that came in the same instant goes to the next one
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self.give()
            if isinstance(error, TimeoutError):
                raise self._too_late(timeout_s) from None
            raise

    def give(self) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self.free += 1

    def close(self, error: SandboxError) -> None:
        """Nobody gets a place any more; those who wait get the error now."""
        self._closed = error
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_exception(error)

    def _too_late(self, timeout_s: float) -> Unavailable:
        return Unavailable(
            f"all {self.number} sandboxes of this server are in use, and none became free within "
            f"{timeout_s:g} s. Delete some, wait longer (queue_timeout_s), or raise "
            "runtime.max_parallel_sandboxes.",
            Code.QUEUE_TIMEOUT,
            queued=self.waiting,
        )
