"""Signals: noticed at once, acted on where it is safe."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator

import pytest

from trainer.interrupt import SIGNALS, Interrupt, Interrupted, Wanted


@pytest.fixture
def interrupt() -> Iterator[Interrupt]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    found = Interrupt()
    found.listen()
    yield found
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", list(SIGNALS))
async def test_a_signal_cancels_what_is_awaited(interrupt: Interrupt, number: signal.Signals) -> None:
    cancelled = asyncio.Event()

    async def work() -> None:
        os.kill(os.getpid(), number)
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    with interrupt.deferred(), pytest.raises(Interrupted) as caught:
        await interrupt.during(work())
    assert caught.value.wanted is SIGNALS[number] and cancelled.is_set()


def test_outside_of_the_loop_a_signal_ends_what_is_going_on(interrupt: Interrupt) -> None:
    with pytest.raises(Interrupted):
        os.kill(os.getpid(), signal.SIGTERM)


async def test_during_an_update_only_a_stop_is_noticed(interrupt: Interrupt) -> None:
    with interrupt.deferred():
        os.kill(os.getpid(), signal.SIGUSR2)
        interrupt.check()
        assert interrupt.wanted is Wanted.CHECKPOINT
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted):
            interrupt.check()
        os.kill(os.getpid(), signal.SIGUSR2)
        assert interrupt.wanted is Wanted.STOP, "a stop outranks a checkpoint"


async def test_nothing_starts_once_the_end_was_asked_for() -> None:
    interrupt = Interrupt()
    interrupt.ask(Wanted.CHECKPOINT)
    ran = []

    async def work() -> None:
        ran.append(1)

    with pytest.raises(Interrupted):
        await interrupt.during(work())
    assert not ran


async def test_results_and_errors_pass_through() -> None:
    async def seven() -> int:
        return 7

    async def fails() -> int:
        raise ValueError("mine")

    assert await Interrupt().during(seven()) == 7
    with pytest.raises(ValueError, match="mine"):
        await Interrupt().during(fails())


async def test_a_watched_request_asks_for_a_checkpoint(interrupt: Interrupt) -> None:
    asked = iter([False, False, True])
    interrupt.watch(lambda: next(asked), every_s=0.001)
    with interrupt.deferred(), pytest.raises(Interrupted) as caught:
        await interrupt.during(asyncio.sleep(60))
    assert caught.value.wanted is Wanted.CHECKPOINT
