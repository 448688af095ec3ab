"""Several ranks in one process: threads that meet wherever processes would exchange something."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from trainer.ranks import ALONE, Ranks

T = TypeVar("T")
PATIENCE_S = 60.0


class Meeting:
    """Where `size` ranks lay something down, and all of them take up everything."""

    def __init__(self, size: int) -> None:
        self._slots: list[Any] = [None] * size
        self._barrier = threading.Barrier(size)

    def exchange(self, rank: int, x: Any) -> list[Any]:
        self._slots[rank] = x
        self._barrier.wait(PATIENCE_S)
        found = list(self._slots)
        self._barrier.wait(PATIENCE_S)
        return found

    def leave(self) -> None:
        """One that fails must not let the others wait."""
        self._barrier.abort()


@dataclass(frozen=True)
class Thread(Ranks):
    """A rank that is a thread."""

    meeting: Meeting | None = None

    def gather_objects(self, o: T) -> list[T]:
        assert self.meeting is not None
        return self.meeting.exchange(self.rank, o)

    def _reduce(self, x: Tensor, operation: str) -> Tensor:
        parts = torch.stack(self.gather_objects(x.detach().clone()))
        return parts.sum(0) if operation == "SUM" else parts.amax(0)


def together(size: int, work: Callable[[Ranks], T]) -> list[T]:
    """What `work` returns on each of `size` ranks, in their order; one rank is ALONE."""
    if size == 1:
        return [work(ALONE)]
    meeting = Meeting(size)

    def guarded(rank: int) -> T:
        try:
            return work(Thread(rank, size, meeting=meeting))
        except BaseException:  # whatever it was: raised again, once the others are told
            meeting.leave()
            raise

    with ThreadPoolExecutor(size) as pool:
        running = [pool.submit(guarded, rank) for rank in range(size)]
    failed = [error for future in running if (error := future.exception()) is not None]
    for error in sorted(failed, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return [future.result() for future in running]
