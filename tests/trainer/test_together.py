"""Ranks that share a step's prompts: all know all episodes, and what one cannot do, none has done."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from ranks_kit import together

from trainer.episode import Episode
from trainer.errors import EngineDied, Lost
from trainer.interrupt import Interrupt, Interrupted, Wanted
from trainer.ranks import ALONE, Ranks
from trainer.tasks import Task, Verify
from trainer.together import Played, aside, shared

TASKS = [Task(f"t{n}", "$ ", Verify("true")) for n in range(5)]


def played(tasks: Sequence[Task], groups: Sequence[int]) -> list[Episode]:
    return [Episode.start(task.id, group, [1]) for task, group in zip(tasks, groups, strict=True)]


def on_each(size: int, trouble: Callable[[int, Interrupt], BaseException | None]) -> list[Any]:
    """What `shared` gives or raises on each rank, when `trouble(rank, interrupt)` befalls it."""

    def work(ranks: Ranks) -> Any:
        interrupt = Interrupt()

        async def play(tasks: Sequence[Task], groups: Sequence[int]) -> tuple[list[Episode], int]:
            if (error := trouble(ranks.rank, interrupt)) is not None:
                raise error
            await asyncio.sleep(0)
            return played(tasks, groups), ranks.rank

        try:
            return asyncio.run(interrupt.during(shared(ranks, interrupt, TASKS, (), play)))
        except (Exception, Interrupted) as error:
            return error

    return together(size, work)


@pytest.mark.parametrize("size", [1, 2, 4, 7])
def test_every_rank_knows_all_episodes_in_the_order_of_one_process(size: int) -> None:
    for found in on_each(size, lambda rank, interrupt: None):
        assert [e.task_id for e in found.episodes] == [f"t{n}" for n in range(5)]
        assert [e.group for e in found.episodes] == list(range(5))


def test_the_most_tries_count() -> None:
    assert {found.lost for found in on_each(3, lambda rank, interrupt: None)} == {2}


def test_an_error_of_one_rank_is_raised_on_all() -> None:
    found = on_each(3, lambda rank, interrupt: Lost("node gone") if rank == 1 else None)
    assert [(type(error), str(error)) for error in found] == [(Lost, "node gone")] * 3


def test_a_request_that_reaches_one_rank_ends_all_of_them() -> None:
    def ask(rank: int, interrupt: Interrupt) -> None:
        if rank == 2:
            interrupt.ask(Wanted.CHECKPOINT)

    found = on_each(3, ask)
    assert [type(error) for error in found] == [Interrupted] * 3
    assert {error.wanted for error in found} == {Wanted.CHECKPOINT}


def test_a_stop_outranks_a_checkpoint_and_that_an_error() -> None:
    def mixed(rank: int, interrupt: Interrupt) -> BaseException | None:
        if rank == 0:
            return EngineDied("no more")
        interrupt.ask(Wanted.CHECKPOINT if rank == 1 else Wanted.STOP)
        return None

    assert {getattr(e, "wanted", None) for e in on_each(2, mixed)} == {Wanted.CHECKPOINT}
    assert {getattr(e, "wanted", None) for e in on_each(3, mixed)} == {Wanted.STOP}


def test_a_bug_is_not_passed_around() -> None:
    """What is no error of the training's ends its rank, and torchrun the others."""

    async def play(tasks: Sequence[Task], groups: Sequence[int]) -> tuple[list[Episode], int]:
        raise KeyError("bug")

    with pytest.raises(KeyError):
        asyncio.run(shared(ALONE, Interrupt(), TASKS, (), play))


async def test_groups_are_handed_on() -> None:
    seen: list[int] = []

    async def play(tasks: Sequence[Task], groups: Sequence[int]) -> tuple[list[Episode], int]:
        seen.extend(groups)
        return played(tasks, groups), 0

    found = await shared(ALONE, Interrupt(), TASKS[:2], [7, 9], play)
    assert isinstance(found, Played) and seen == [7, 9]


async def test_waiting_for_others_leaves_the_loop_free_and_passes_errors_on() -> None:
    async def tick() -> int:
        return 5

    waiting = asyncio.create_task(aside(lambda: "back"))
    assert await tick() == 5 and await waiting == "back"
    with pytest.raises(ZeroDivisionError):
        await aside(lambda: 1 / 0)
