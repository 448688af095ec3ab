"""The loop: what it leaves behind, and that stopping and going on changes nothing, bit for bit."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_kit import World, job_of, new_run, same, small_config, state_of, trained

from orchestrator.contract import RunDirectory
from orchestrator.durable import read_json_lines
from orchestrator.schema import Config
from trainer.errors import CheckpointError, Lost, MismatchError, TaskError
from trainer.harvest import LOST_TRIES
from trainer.interrupt import Interrupted, Wanted
from trainer.train import train


def until(config: Config, steps: int) -> Config:
    return Config.model_validate(
        config.model_dump() | {"trainer": {**config.trainer.model_dump(), "total_steps": steps}}
    )


def rows(run: RunDirectory) -> list[dict[str, Any]]:
    """Rows without what depends on the clock."""
    found = read_json_lines(run.metrics)
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "tokens_per_s"))} for row in found]


STEPS = 4


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDirectory, Config, dict[str, Any]]:
    """A run of four steps that never stopped: two epochs of four tasks, two prompts a step."""
    folder = tmp_path_factory.mktemp("whole")
    run, config = new_run(folder), small_config(folder, total_steps=STEPS)
    job = asyncio.run(trained(run, config))
    return run, config, state_of(job)


# --- a run that never stops --------------------------------------------------------------------------


def test_a_run_leaves_rows_curves_trajectories_and_a_checkpoint(
    whole: tuple[RunDirectory, Config, dict[str, Any]],
) -> None:
    run, _, _ = whole
    found = read_json_lines(run.metrics)
    assert [row["step"] for row in found] == list(range(STEPS))
    times = {f"time/{n}" for n in ("rollout", "environment", "logprob", "update", "sync", "idle", "total")}
    wanted = {"success_rate", "reward_mean", "loss_policy", "loss_value", "kl", "mismatch", "tokens_per_s"}
    assert all(times | wanted <= row.keys() for row in found)
    assert len(list(run.rollouts.glob("step-*.jsonl"))) == STEPS
    assert list(run.tensorboard.glob("events.out.tfevents*"))
    assert (run.checkpoints / "latest").read_text() == "step-000004\n"


def test_the_first_ratio_is_one_and_engine_and_trainer_agree(
    whole: tuple[RunDirectory, Config, dict[str, Any]],
) -> None:
    for row in rows(whole[0]):
        assert row["first_ratio_error"] == 0.0
        assert row["mismatch_max"] < 1e-4 and row["probe"] < 1e-4


def test_while_the_critic_warms_up_there_is_no_policy_step(
    whole: tuple[RunDirectory, Config, dict[str, Any]],
) -> None:
    first, second, *_ = rows(whole[0])
    assert first["loss_policy"] == 0.0 and "grad_norm_policy" not in first
    assert second["kl"] == 0.0 and second["grad_norm_policy"] > 0.0  # it had not moved from the reference
    assert rows(whole[0])[2]["kl"] > 0.0


# --- stopping and going on ---------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 2, 3])  # 2 is exactly the end of an epoch, 1 of the critic's warm-up
async def test_resuming_equals_never_stopping(
    tmp_path: Path, whole: tuple[RunDirectory, Config, dict[str, Any]], stop: int
) -> None:
    reference, config, expected = whole
    run = new_run(tmp_path)
    await trained(run, until(config, stop))
    torch.manual_seed(999)  # another process would start with other generators
    job = job_of(run, config)
    assert job.step == stop
    try:
        await train(job)
    finally:
        await job.engine.close()
    assert same(expected, state_of(job)) == []
    assert rows(run) == rows(reference)


async def test_a_checkpoint_asked_for_in_the_middle_of_a_step_loses_nothing(
    tmp_path: Path, whole: tuple[RunDirectory, Config, dict[str, Any]]
) -> None:
    reference, config, expected = whole
    run, world = new_run(tmp_path), World()
    job = job_of(run, config, world)
    world.before_open = lambda number: job.interrupt.ask(Wanted.CHECKPOINT) if number == 9 else None
    with pytest.raises(Interrupted) as caught:
        await train(job)
    await job.engine.close()
    assert caught.value.wanted is Wanted.CHECKPOINT
    assert (run.checkpoints / "latest").read_text() == "step-000001\n"
    resumed = await trained(run, config)
    assert same(expected, state_of(resumed)) == []
    assert rows(run) == rows(reference)


async def test_a_stop_ends_at_once_and_saves_nothing(tmp_path: Path) -> None:
    run, world = new_run(tmp_path), World()
    job = job_of(run, small_config(tmp_path, total_steps=3), world)
    world.before_open = lambda number: job.interrupt.ask(Wanted.STOP) if number == 7 else None
    with pytest.raises(Interrupted):
        await train(job)
    await job.engine.close()
    assert not (run.checkpoints / "latest").exists()


async def test_a_stop_in_the_middle_of_an_update_does_not_wait_for_its_end(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    job = job_of(run, small_config(tmp_path, total_steps=3))
    job.learner.check = lambda: (job.interrupt.ask(Wanted.STOP), job.interrupt.check())[1]
    with pytest.raises(Interrupted):
        await train(job)
    await job.engine.close()
    assert rows(run) == []


async def test_rates_follow_the_step_also_after_a_resume(tmp_path: Path) -> None:
    plan = {"lr_schedule": "linear", "lr_warmup_steps": 1, "lr_min_ratio": 0.2}
    run, config = new_run(tmp_path), small_config(tmp_path, total_steps=4, **plan)
    world = World()
    job = job_of(run, config, world)
    world.before_open = lambda number: job.interrupt.ask(Wanted.CHECKPOINT) if number == 15 else None
    with pytest.raises(Interrupted):
        await train(job)
    await job.engine.close()
    await trained(run, config)
    found = [(row["lr/policy"], row["lr/critic"]) for row in rows(run)]
    np.testing.assert_allclose(found, np.outer([0.5, 1, 0.6, 0.2], [1e-3, 2e-3]))


async def test_a_run_that_is_done_does_nothing_more(
    whole: tuple[RunDirectory, Config, dict[str, Any]],
) -> None:
    run, config, _ = whole
    before = run.metrics.read_bytes()
    job = await trained(run, config)
    assert job.step == STEPS and run.metrics.read_bytes() == before


# --- what infrastructure loses -----------------------------------------------------------------------


@pytest.mark.parametrize("taken", [(8,), (6, 7, 8, 9, 10, 11), (7, 9, 18, 21)])
async def test_a_runtime_that_went_down_and_came_back_changes_nothing(
    tmp_path: Path, whole: tuple[RunDirectory, Config, dict[str, Any]], taken: tuple[int, ...]
) -> None:
    """What it took along, few or all episodes of a step, is played again: the same steps to the last bit."""
    reference, config, expected = whole
    run, world = new_run(tmp_path), World(lost=lambda number: number in taken)

    def goes_down(number: int) -> None:
        world.lives += number in taken

    world.before_open = goes_down
    job = await trained(run, config, world)
    assert same(expected, state_of(job)) == []
    without = [{k: v for k, v in row.items() if k != "lost_tries"} for row in rows(run)]
    assert without == [{k: v for k, v in row.items() if k != "lost_tries"} for row in rows(reference)]
    assert sum(row["lost_tries"] for row in rows(run)) >= 1
    assert all(row["status/infra"] == 0 for row in rows(run))


async def test_lost_episodes_are_left_out_of_everything(tmp_path: Path) -> None:
    """Two of six are lost each step: the rest is trained on; they do not even count as failures."""
    run = new_run(tmp_path)
    await trained(run, small_config(tmp_path, total_steps=2), World(lost=lambda n: n % 6 in (1, 4)))
    for number, row in enumerate(rows(run)):
        lines = read_json_lines(run.rollouts / f"step-{number:06d}.jsonl")
        rewards = [line["reward"] for line in lines if line["status"] != "infra"]
        assert len(lines) == 6 and len(rewards) == 4
        assert row["success_rate"] == row["reward_mean"] == sum(rewards) / 4
        assert row["status/infra"] == pytest.approx(1 / 3)
        assert row["action_tokens"] == sum(x["action_tokens"] for x in lines if x["status"] != "infra")


async def test_a_step_that_lost_most_is_played_again_and_counted_once(
    tmp_path: Path, whole: tuple[RunDirectory, Config, dict[str, Any]]
) -> None:
    reference, config, expected = whole
    run = new_run(tmp_path)
    job = await trained(run, config, World(lost=lambda n: 6 <= n < 10))  # four of the second step's six
    assert same(expected, state_of(job)) == []  # not one bit of the failed try is left
    told = [event for event in run.timeline() if event.what == "training.step_lost"]
    assert [event.data["step"] for event in told] == [1]
    assert [row.pop("lost_tries") for row in rows(run)] == [0, 1, 0, 0]
    assert [row["step"] for row in rows(run)] == [row["step"] for row in rows(reference)]


async def test_no_runtime_for_too_long_ends_the_run_with_a_checkpoint(tmp_path: Path) -> None:
    run, world = new_run(tmp_path), World()

    def gone(number: int) -> bool:
        world.answers = number < 6
        return not world.answers

    world.lost = gone
    with pytest.raises(Lost, match="no runtime server answered"):
        await trained(run, small_config(tmp_path, total_steps=3), world)
    assert (run.checkpoints / "latest").read_text() == "step-000001\n"
    assert [row["step"] for row in rows(run)] == [0]


async def test_a_runtime_that_answers_and_loses_everything_is_given_up(tmp_path: Path) -> None:
    run, world = new_run(tmp_path), World(lost=lambda number: True)
    with pytest.raises(Lost, match=rf"{LOST_TRIES} times although the runtime answers"):
        await trained(run, small_config(tmp_path, total_steps=3), world)
    assert rows(run) == []


# --- refusals ----------------------------------------------------------------------------------------


async def test_an_engine_that_does_not_sample_from_the_policy_stops_the_run(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    job = job_of(run, small_config(tmp_path, total_steps=2, mismatch_limit=1e-12))
    with pytest.raises(MismatchError, match="mismatch_limit"):
        await train(job)
    await job.engine.close()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda config: setattr(config.model, "path", "/elsewhere"), CheckpointError),
        (lambda config: setattr(config.run, "seed", 5), TaskError),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(
    tmp_path: Path,
    whole: tuple[RunDirectory, Config, dict[str, Any]],
    change: Callable[[Config], None],
    error: type[Exception],
) -> None:
    from trainer.assemble import resume

    run, config, _ = whole
    job = job_of(run, config)
    other = config.model_copy(deep=True)
    change(other)
    if other.run.seed:
        job.sampler.seed = other.run.seed
    with pytest.raises(error, match=r"trainer\.resume=never"):
        resume(other, job.store, job.learner, job.sampler, job.events)


async def test_never_resuming_starts_from_nothing(tmp_path: Path) -> None:
    run, config = new_run(tmp_path), small_config(tmp_path, total_steps=1, resume="never")
    first = state_of(await trained(run, config))
    assert same(first, state_of(await trained(run, config))) == []
    assert len(rows(run)) == 1


async def test_validation_is_measured_where_a_checkpoint_is_due(tmp_path: Path) -> None:
    run, config = new_run(tmp_path), small_config(tmp_path, total_steps=2, save_every=2)
    config.data.validation = config.data.train
    await trained(run, config)
    first, second = read_json_lines(run.metrics)
    assert "validation/success_rate" not in first and 0 <= second["validation/success_rate"] <= 1


def test_trajectories_are_readable(whole: tuple[RunDirectory, Config, dict[str, Any]]) -> None:
    line = json.loads((whole[0].rollouts / "step-000000.jsonl").read_text().splitlines()[0])
    assert line["status"] in ("ok", "truncated") and line["turns"]
