"""Over-sampling, deadlines and resampling: no straggler holds a step, and without one nothing changes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from rollout_kit import Bytes, Scripted

from orchestrator.schema import Config
from trainer.agent import Limits, Shell
from trainer.environments import CommandResult, Verdict, Workspace
from trainer.episode import Episode, Failure, Status
from trainer.errors import Lost, Refused, TaskError
from trainer.race import Rules
from trainer.rollout import Plan, Rollouts
from trainer.summary import dull, dull_share, staleness, summary
from trainer.tasks import Task, Verify
from trainer.watch import Watch

LIMITS = Limits(1, 28, 16, 128, 40, 1.0, 60.0, 600.0)
TASKS = [Task(f"t{n}", f"{n} $ ", Verify("true")) for n in range(4)]


@dataclass
class Field:
    """Openings are counted; `held` never end, `lost` are lost. Who is open now is counted, too."""

    held: Callable[[int], bool] = lambda number: False
    lost: Callable[[int], bool] = lambda number: False
    opened: int = 0
    open_now: int = 0
    gate: asyncio.Event = field(default_factory=asyncio.Event)

    @asynccontextmanager
    async def open(self, task: Task) -> AsyncIterator[Workspace]:
        number, self.opened = self.opened, self.opened + 1
        if self.lost(number):
            raise Lost("node lost")
        self.open_now += 1
        try:
            yield Seat(self, number)
        finally:
            self.open_now -= 1

    async def wait_ready(self, timeout_s: float) -> None: ...

    async def life(self) -> object:
        return "one"

    async def close(self) -> None: ...


@dataclass
class Seat:
    field: Field
    number: int
    timings: dict[str, float] = field(default_factory=dict)

    async def run(self, command: str, timeout_s: float, max_output: int) -> CommandResult:
        if self.field.held(self.number):
            await self.field.gate.wait()
        return CommandResult(b"", 0)

    async def verify(self, answer: str = "") -> Verdict:
        return Verdict(float(self.number % 2))


def rollouts(world: Field, **plan: float) -> Rollouts:
    chosen = Plan(**({"rollouts_per_prompt": 2, "retries": 0} | plan), retry_pause_s=0)  # type: ignore[arg-type]
    return Rollouts(Scripted(lambda *_: "ls\n"), world, Shell(Bytes()), LIMITS, chosen)


def seen(episodes: list[Episode]) -> list[tuple[int, int, float]]:
    return [(episode.number, episode.group, episode.reward) for episode in episodes]


async def test_where_nothing_is_late_over_sampling_changes_nothing() -> None:
    alone = await rollouts(Field()).collect(TASKS, 0)
    world = Field()
    play = rollouts(world, oversample=1.5, grace_s=60)
    assert seen(await play.collect(TASKS, 0)) == seen(alone)
    assert play.counts["rollout/started"] == 12 and play.counts["rollout/refilled"] == 0
    assert world.open_now == 0


async def test_a_straggler_does_not_hold_the_step_and_is_replaced() -> None:
    """The first episode's command never ends: its place goes to one from besides, of its own group."""
    world = Field(held=lambda number: number == 0)
    play = rollouts(world, oversample=1.5, grace_s=0.05)
    episodes = await play.collect(TASKS, 0)
    assert [e.group for e in episodes] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert episodes[0].number == 8 and all(e.valid for e in episodes)
    assert play.counts == {"rollout/started": 12, "rollout/cancelled": 1, "rollout/refilled": 1}
    assert world.open_now == 0  # the straggler's sandbox is on its way out


async def test_a_group_may_stay_incomplete() -> None:
    world = Field(held=lambda number: number in (0, 1))
    episodes = await rollouts(world, oversample=1.25, grace_s=0.05).collect(TASKS, 0)
    assert [e.group for e in episodes] == [0, 1, 1, 1, 2, 2, 3, 3]
    assert sorted(e.number for e in episodes) == [2, 3, 4, 5, 6, 7, 8, 9]


async def test_what_infrastructure_lost_is_refilled() -> None:
    play = rollouts(Field(lost=lambda number: number in (2, 5)), oversample=1.25, grace_s=0)
    episodes = await play.collect(TASKS, 0)
    assert all(e.valid for e in episodes) and len(episodes) == 8
    assert play.counts["rollout/refilled"] == 2


async def test_what_cannot_be_refilled_is_masked() -> None:
    play = rollouts(Field(lost=lambda number: number < 4), oversample=1.25, grace_s=0)
    episodes = await play.collect(TASKS, 0)
    assert sum(e.valid for e in episodes) == 6
    assert {e.failure for e in episodes if not e.valid} == {Failure.LOST}


async def test_a_step_ends_at_its_deadline_with_what_it_has() -> None:
    world = Field(held=lambda number: number >= 5)
    start = time.monotonic()
    episodes = await rollouts(world, step_timeout_s=0.3).collect(TASKS, 0)
    assert time.monotonic() - start < 30
    assert [e.valid for e in episodes] == [True] * 5 + [False] * 3 and world.open_now == 0
    late = episodes[-1]
    assert (late.failure, late.status, late.number) == (Failure.LATE, Status.INFRA, 7)
    assert not any(late.mask) and "late" in late.error


async def test_a_refusal_ends_the_race_at_once() -> None:
    class Refuses(Field):
        @asynccontextmanager
        async def open(self, task: Task) -> AsyncIterator[Workspace]:
            if self.opened == 3:
                raise Refused("wrong key")
            async with Field.open(self, task) as workspace:
                yield workspace

    world = Refuses(held=lambda number: True)
    with pytest.raises(Refused, match="wrong key"):
        await rollouts(world, oversample=1.5).collect(TASKS, 0)
    assert world.open_now == 0


async def test_a_later_try_keeps_what_was_valid_also_from_besides() -> None:
    world = Field(lost=lambda number: number in (0, 1, 2, 3, 8))
    play = rollouts(world, oversample=1.25, grace_s=0)
    first = await play.collect(TASKS, 0)
    again = await play.collect(TASKS, 0, first)
    assert all(e.valid for e in again) and len({e.number for e in again}) == 8
    assert {e.number for e in first if e.valid} & {e.number for e in again}


def test_rules_in_numbers() -> None:
    def done(number: int, valid: bool = True) -> Episode:
        episode = Episode.start("t", number % 2, [1])
        episode.number = number
        return episode if valid else episode.finish(status=Status.INFRA)

    rules = Rules([0, 1], [2, 3])
    assert not rules.enough({0: done(0), 2: done(2)}) and rules.may_end({0: done(0), 2: done(2)})
    assert rules.enough({0: done(0), 1: done(1)}) and not rules.enough({0: done(0), 1: done(1, False)})
    ended = {0: done(0), 1: done(1, False), 2: done(2), 3: done(3)}
    assert [e.number for e in rules.filled(ended, ended)] == [0, 3]  # of its own group, not the first


def test_a_group_of_one_cannot_be_resampled() -> None:
    config = Config()
    config.rollout.resample, config.rollout.rollouts_per_prompt = 1, 1
    with pytest.raises(TaskError, match="rollouts_per_prompt to 2"):
        Plan.of(config)


# --- numbers -----------------------------------------------------------------------------------------


def earned(group: int, *rewards: float | None) -> list[Episode]:
    """None: lost."""
    return [
        Episode.start("t", group, [1]).finish(reward or 0.0, Status.INFRA if reward is None else None)
        for reward in rewards
    ]


def test_groups_that_teach_nothing() -> None:
    episodes = [
        *earned(0, 1, 1),
        *earned(1, 0, 1),
        *earned(2, 0, None),
        *earned(3, None, None),
        *earned(4, 0, 0),
    ]
    assert dull(episodes) == [0, 4] and dull_share(episodes) == 2 / 3
    assert dull([]) == [] and dull_share([]) == 0


def test_ages_are_counted_by_sampled_token() -> None:
    episode = Episode.start("t", 0, [1, 2], 3)
    episode.sampled([5, 6, 7], [0.0] * 3, spans=[(0, 3), (2, 4)])
    episode.observed([8, 9])
    episode.sampled([5], [0.0], spans=[(0, 5)])
    assert episode.spans == [(2, 3), (4, 4), (7, 5)] and episode.oldest_version == 3
    assert staleness([episode], 5) == {"staleness/mean": (2 + 2 + 1 + 0) / 4, "staleness/max": 2.0}
    assert staleness([], 5) == {"staleness/mean": 0.0, "staleness/max": 0.0}


def test_a_summary_names_failures_and_lengths() -> None:
    first = Episode.start("t", 0, [1, 2])
    first.sampled([3, 4, 5], [0.0] * 3)
    first.finish(1.0, Status.TRUNCATED, failure=Failure.TURNS)
    lost = Episode.start("t", 0, [1]).finish(status=Status.INFRA, failure=Failure.LOST)
    found = summary([first, lost])
    assert (found["failure/turns"], found["failure/lost"], found["failure/late"]) == (0.5, 0.5, 0)
    assert (found["length/prompt"], found["length/response_max"], found["length/turns"]) == (2, 3, 1)
    assert "tools/calls" not in found


def test_a_watch_counts_what_overlaps_once() -> None:
    watch, start = Watch(), time.perf_counter()
    with watch("generate"), watch("generate"):
        sum(range(100_000))
        taken = watch.take()["generate"]
    assert 0 < taken <= time.perf_counter() - start  # not twice that
    assert watch.take()["generate"] < time.perf_counter() - start - taken + 1e-3
    assert watch.take() == {}
