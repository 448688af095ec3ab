"""What signals ask of the training, noticed at once but acted on where it is safe.

What it is
    SIGINT asks to stop; SIGUSR1 and SIGUSR2 ask for a checkpoint and an exit with 85, because the walltime
    is near; SIGTERM asks for one, too, for some schedulers send it to every process of a job that they
    preempt or requeue; a second request by SIGTERM is one to stop. A checkpoint is also asked for by
    `watch`, for a file in the run directory or the trainer's own clock.
    While models are loaded a signal ends that at once; while episodes run, they are
    cancelled; in the middle of an update, a stop is noticed before the next forward pass, and a
    checkpoint waits until the update is whole.

How to use it
    interrupt = Interrupt(); interrupt.listen()
    with interrupt.deferred():
        episodes = await interrupt.during(rollouts.collect(tasks, step))     # may raise Interrupted
        interrupt.check()                                                    # may raise Interrupted: stop

What it does not do
    It saves nothing and exits nothing: `trainer.train` and `trainer.__main__` do, on Interrupted.
"""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from enum import StrEnum
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")


class Wanted(StrEnum):
    """What was asked for."""

    STOP = "stop"
    CHECKPOINT = "checkpoint"


SIGNALS = {
    signal.SIGTERM: Wanted.CHECKPOINT,
    signal.SIGINT: Wanted.STOP,
    signal.SIGUSR1: Wanted.CHECKPOINT,
    signal.SIGUSR2: Wanted.CHECKPOINT,
}


class Interrupted(BaseException):
    """Somebody asked us to end. Not an Exception: no handler of ordinary errors may swallow it."""

    def __init__(self, wanted: Wanted) -> None:
        super().__init__(wanted)
        self.wanted = wanted


class Interrupt:
    """The one place where signals arrive."""

    def __init__(self) -> None:
        self.wanted: Wanted | None = None
        self._running: asyncio.Task[Any] | None = None
        self._deferred = False

    def listen(self) -> None:
        """Take over the signals of this process."""
        for number in SIGNALS:
            signal.signal(number, self._arrived)

    def ask(self, wanted: Wanted) -> None:
        """As a signal does. A stop outranks a checkpoint."""
        if self.wanted is not Wanted.STOP:
            self.wanted = wanted
        if (task := self._running) is not None:
            task.get_loop().call_soon_threadsafe(task.cancel)

    def watch(self, look: Callable[[], bool], every_s: float = 1.0) -> None:
        """Ask for a checkpoint once `look` says so: for requests that come by no signal."""

        def run() -> None:
            while not look():
                time.sleep(every_s)
            self.ask(Wanted.CHECKPOINT)

        threading.Thread(target=run, name="checkpoint requests", daemon=True).start()

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within, a signal is only noted; `during` and `check` act on it."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    async def during(self, work: Coroutine[Any, Any, T]) -> T:
        """Await `work`, which is cancelled as soon as anything is asked for. Raises Interrupted."""
        if self.wanted is not None:
            work.close()
            raise Interrupted(self.wanted)
        task: asyncio.Task[T] = asyncio.get_running_loop().create_task(work)
        self._running = task
        try:
            return await task
        except asyncio.CancelledError:
            if self.wanted is None:
                raise
            raise Interrupted(self.wanted) from None
        finally:
            self._running = None

    def check(self) -> None:
        """For the middle of an update: raises Interrupted when we are to stop without a checkpoint."""
        if self.wanted is Wanted.STOP:
            raise Interrupted(self.wanted)

    def _arrived(self, number: int, _frame: FrameType | None) -> None:
        impatient = number == signal.SIGTERM and self.wanted is not None
        self.ask(Wanted.STOP if impatient else SIGNALS[signal.Signals(number)])
        if not self._deferred and self.wanted is not None:
            raise Interrupted(self.wanted)
