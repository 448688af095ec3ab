"""Many episodes at once: order, seeds, retries, blame, cancellation, and the file of trajectories."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from rollout_kit import Bytes, Scripted

from orchestrator.schema import Config
from trainer.agent import Limits, Shell
from trainer.engines import Sample, Sampling
from trainer.environments import CommandResult, Verdict, Workspace
from trainer.environments.local import LocalEnvironment
from trainer.episode import Episode, Status
from trainer.errors import Broken, EngineDied, Lost, Refused
from trainer.rollout import Plan, Rollouts, summary
from trainer.tasks import Task, lucky_seven
from trainer.view import write_rollouts

LIMITS = Limits(2, 28, 16, 128, 40, 1.0, 5.0, 30.0)


def right(text: str, sampling: Sampling) -> str:
    return "cat hint.txt\n" if text == "$ " else "echo 7 > answer.txt\n"


class Fails:
    """An environment whose n-th opening, command or verification fails as told."""

    def __init__(self, at: str, error: Exception, times: int = 10**9) -> None:
        self.at, self.error, self.left = at, error, times
        self.opened = self.open_now = self.most = 0
        self.lives = ["one"]

    @asynccontextmanager
    async def open(self, task: Task) -> AsyncIterator[Workspace]:
        self.opened += 1
        self.trip("open")
        self.open_now += 1
        self.most = max(self.most, self.open_now)
        try:
            yield _Workspace(self)
        finally:
            self.open_now -= 1

    async def wait_ready(self, timeout_s: float) -> None:
        pass

    async def life(self) -> object:
        return self.lives.pop(0) if len(self.lives) > 1 else self.lives[0]

    async def close(self) -> None:
        pass

    def trip(self, at: str) -> None:
        if at == self.at and self.left > 0:
            self.left -= 1
            raise self.error


class _Workspace:
    def __init__(self, owner: Fails) -> None:
        self.owner = owner
        self.timings = {"create_s": 0.25}

    async def run(self, command: str, timeout_s: float, max_output: int) -> CommandResult:
        await asyncio.sleep(0)
        self.owner.trip("run")
        return CommandResult(b"", 0)

    async def verify(self, answer: str = "") -> Verdict:
        self.owner.trip("verify")
        return Verdict(1.0)


def rollouts(environment: object, engine: object = None, **plan: int) -> Rollouts:
    chosen = Plan(**({"retries": 2} | plan), retry_pause_s=0)  # type: ignore[arg-type]
    return Rollouts(engine or Scripted(right), environment, Shell(Bytes()), LIMITS, chosen)  # type: ignore[arg-type]


async def test_success_in_a_real_shell_in_the_order_of_the_tasks() -> None:
    episodes = await rollouts(LocalEnvironment(), rollouts_per_prompt=2).collect(lucky_seven()[:3], 0)
    assert [(e.task_id, e.group) for e in episodes] == [(f"lucky-seven-0{n}", n) for n in (0, 0, 1, 1, 2, 2)]
    assert all(e.reward == 1 and e.status is Status.OK for e in episodes)
    assert {"create_s", "verify_s", "generate_s", "command_s", "total_s"} <= set(episodes[0].timings)
    assert summary(episodes)["success_rate"] == 1


async def test_seeds_differ_by_step_episode_and_turn_and_repeat() -> None:
    async def seeds(step: int, run_seed: int = 0) -> list[int | None]:
        engine = Scripted(right)
        await rollouts(Fails("", Lost()), engine, max_parallel=1, seed=run_seed).collect(
            lucky_seven()[:3], step
        )
        return engine.seeds

    first = await seeds(0)
    assert len(set(first)) == 6 and first == await seeds(0)
    assert not set(first) & set(await seeds(1)) and not set(first) & set(await seeds(0, run_seed=1))


@pytest.mark.parametrize("at", ["open", "run", "verify"])
async def test_infrastructure_is_tried_again_in_a_fresh_sandbox(at: str) -> None:
    environment = Fails(at, Lost("node lost"), times=2)
    (episode,) = await rollouts(environment).collect(lucky_seven()[:1], 0)
    assert episode.status is Status.OK and episode.reward == 1
    assert environment.opened == 3 and episode.timings["attempts"] == 3


@pytest.mark.parametrize("at", ["open", "run", "verify"])
async def test_infrastructure_that_stays_lost_is_masked_never_scored(at: str) -> None:
    (episode,) = await rollouts(Fails(at, Lost("node lost"))).collect(lucky_seven()[:1], 0)
    assert episode.status is Status.INFRA and not episode.valid and not any(episode.mask)
    assert "node lost" in episode.error


@pytest.mark.parametrize("at", ["run", "verify"])
async def test_a_sandbox_that_the_policy_broke_is_scored(at: str) -> None:
    environment = Fails(at, Broken("killed by its own processes"))
    (episode,) = await rollouts(environment).collect(lucky_seven()[:1], 0)
    assert episode.valid and episode.reward == 0 and any(episode.mask)
    assert environment.opened == 1 and "killed by its own" in episode.error


async def test_a_sandbox_that_died_with_its_server_is_played_again_and_not_scored() -> None:
    environment = Fails("verify", Broken("its first process ended"), times=1)
    environment.lives = ["one", "two"]
    (episode,) = await rollouts(environment).collect(lucky_seven()[:1], 0)
    assert episode.valid and episode.reward == 1 and environment.opened == 2


async def test_a_refusal_or_a_dead_engine_stops_everything_and_leaves_nothing_open() -> None:
    with pytest.raises(Refused, match="wrong key"):
        await rollouts(Fails("open", Refused("wrong key"))).collect(lucky_seven()[:8], 0)

    class Dies(Scripted):
        async def generate(self, ids: list[int], sampling: Sampling) -> Sample:
            if len(self.prompts) == 5:
                raise EngineDied("gone")
            return await super().generate(ids, sampling)

    environment = Fails("", Lost())
    with pytest.raises(EngineDied):
        await rollouts(environment, Dies(right)).collect(lucky_seven()[:8], 0)
    assert environment.open_now == 0


async def test_no_more_at_once_than_allowed() -> None:
    environment = Fails("", Lost())
    await rollouts(environment, max_parallel=3).collect(lucky_seven()[:12], 0)
    assert environment.most == 3


async def test_cancelling_closes_every_workspace() -> None:
    class Waits(Scripted):
        async def generate(self, ids: list[int], sampling: Sampling) -> Sample:
            self.prompts.append(ids)
            if len(self.prompts) == 4:
                begun.set()
            return await asyncio.Future()

    begun, environment = asyncio.Event(), Fails("", Lost())
    running = asyncio.create_task(rollouts(environment, Waits(right)).collect(lucky_seven()[:4], 0))
    await begun.wait()
    assert environment.open_now == 4
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert environment.open_now == 0


async def test_one_slow_command_does_not_hold_up_the_others() -> None:
    """Every other episode ends while the first one's command still runs."""
    ended: list[str] = []

    class OneSlow(_Workspace):
        def __init__(self, owner: Fails, task: Task) -> None:
            super().__init__(owner)
            self.task = task

        async def run(self, command: str, timeout_s: float, max_output: int) -> CommandResult:
            if self.task.id == "lucky-seven-00":
                await others.wait()
            return CommandResult(b"", 0)

        async def verify(self, answer: str = "") -> Verdict:
            ended.append(self.task.id)
            if len(ended) == 5:
                others.set()
            return Verdict(1.0)

    class Mixed(Fails):
        @asynccontextmanager
        async def open(self, task: Task) -> AsyncIterator[Workspace]:
            yield OneSlow(self, task)

    others = asyncio.Event()
    await rollouts(Mixed("", Lost())).collect(lucky_seven()[:6], 0)
    assert ended[-1] == "lucky-seven-00"


def test_configuration_reaches_the_plan() -> None:
    config = Config()
    config.rollout.max_turns = 5
    made = Rollouts.of(config, Scripted(right), LocalEnvironment(), Shell(Bytes()))
    assert made._agent.limits.max_turns == 5


def test_trajectories_are_one_readable_line_each(tmp_path: Path) -> None:
    episode = Episode.start("täsk", 1, [1, 2])
    episode.sampled([3, 4], [-0.1, -0.1], "ls\n", "stop")
    episode.observed([5], "$ ")
    episode.sampled([6], [-0.1], "\ud800", "length")
    path = write_rollouts(tmp_path / "rollouts", 7, [episode.finish(1.0), episode])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert path.name == "step-000007.jsonl" and len(lines) == 2
    assert lines[0]["mask"] == "p2 a2 o1 a1" and lines[0]["step"] == 7
    assert lines[0]["turns"][0]["text"] == "ls\n" and lines[0]["reward"] == 1


def test_a_summary_counts_rewards_of_valid_episodes_only() -> None:
    lost = Episode.start("a", 0, [1]).finish(status=Status.INFRA)
    won = Episode.start("a", 0, [1]).finish(1.0)
    said = summary([lost, won])
    assert said["reward_mean"] == said["success_rate"] == 1 and said["status/infra"] == 0.5
    assert summary([])["success_rate"] == 0
