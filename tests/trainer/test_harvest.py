"""Whole trainings of a few steps: chat with tools, resampling, validation, and one step ahead."""

from __future__ import annotations

import asyncio
import itertools
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_kit import FORGETS, chat_model
from rollout_kit import disturb, tiny
from training_kit import Desk, World, job_of, new_run, same, small_config, state_of, trained

from orchestrator.durable import read_json_lines
from orchestrator.schema import Config
from trainer.engines import Sampling
from trainer.engines.pausing import Pausing
from trainer.engines.reference import logprobs
from trainer.engines.torch_engine import TorchEngine
from trainer.environments import Verdict
from trainer.environments.local import LocalEnvironment
from trainer.episode import Episode, Failure, Status
from trainer.errors import TaskError
from trainer.harvest import mask_stale
from trainer.interrupt import Interrupted, Wanted
from trainer.train import train


def rollout(config: Config, **changes: Any) -> Config:
    changed = {**config.rollout.model_dump(), **changes}
    return Config.model_validate(config.model_dump() | {"rollout": changed})


# --- chat --------------------------------------------------------------------------------------------


def chat_config(folder: Path, **changes: Any) -> Config:
    config = small_config(folder, total_steps=2)
    config.model.path = str(chat_model(folder / "model"))
    lengths = {"max_prompt_length": 2048, "max_response_length": 1024, "max_observation_bytes": 256}
    return rollout(config, **{"format": "chat", "tools": ["bash", "submit"], **lengths, **changes})


@pytest.mark.slow
async def test_a_chat_model_trains_with_tools_in_a_real_shell(tmp_path: Path) -> None:
    """An untrained policy babbles: its turns end by chance or by length, and every answer gets a reply."""
    run = new_run(tmp_path)
    await trained(run, chat_config(tmp_path, max_turns=3), LocalEnvironment())
    rows = read_json_lines(run.metrics)
    assert len(rows) == 2 and all(row["mismatch_max"] < 1e-4 for row in rows)
    lines = [line for n in range(2) for line in read_json_lines(run.rollouts / f"step-{n:06d}.jsonl")]
    assert {line["status"] for line in lines} <= {"ok", "truncated"}
    used = [use for line in lines for turn in line["turns"] for use in turn["used"]]
    assert all("no tool call found" in use["problem"] for use in used)


async def test_a_template_that_forgets_stops_the_run_before_it_begins(tmp_path: Path) -> None:
    config = chat_config(tmp_path)
    chat_model(tmp_path / "model", FORGETS)
    with pytest.raises(TaskError, match="rewrites history"):
        job_of(new_run(tmp_path), config)


# --- resampling --------------------------------------------------------------------------------------


class Graded(World):
    """Tasks t0 and t1 earn the same in every episode; the others differ."""

    def open(self, task: Any) -> Any:
        desk = super().open(task)
        number = self.opened

        class Seat(Desk):
            async def verify(self, answer: str = "") -> Verdict:
                return Verdict(1.0 if task.id in ("t0", "t1") else float(number % 2))

        class Opening:
            async def __aenter__(self) -> Any:
                await desk.__aenter__()
                return Seat()

            async def __aexit__(self, *error: Any) -> Any:
                return await desk.__aexit__(*error)

        return Opening()


async def test_groups_that_teach_nothing_are_replaced_by_new_tasks(tmp_path: Path) -> None:
    config = small_config(tmp_path, total_steps=1)
    config.data.shuffle = False
    run = new_run(tmp_path)
    job = await trained(run, rollout(config, resample=2), Graded())
    (row,) = read_json_lines(run.metrics)
    assert row["groups/zero_variance"] == 1.0  # of the first round: t0 and t1
    assert (row["groups/resampled"], row["groups/rounds"]) == (2, 1)
    lines = read_json_lines(run.rollouts / "step-000000.jsonl")
    assert [(line["task"], line["group"]) for line in lines] == [("t2", 0)] * 3 + [("t3", 1)] * 3
    assert job.sampler.state_dict()["epoch"] == 1  # all four tasks are drawn


async def test_rounds_are_bounded(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    config = rollout(small_config(tmp_path, total_steps=1), resample=2)
    await trained(run, config, Always())
    (row,) = read_json_lines(run.metrics)
    assert (row["groups/resampled"], row["groups/rounds"], row["groups/zero_variance"]) == (4, 2, 1)


class Always(Graded):
    def open(self, task: Any) -> Any:
        return super().open(type(task)("t0", task.prompt, task.reward))


# --- validation --------------------------------------------------------------------------------------


async def test_the_best_checkpoint_is_kept_though_newer_ones_come(tmp_path: Path) -> None:
    """Validation earns 0, 1, 0, 0 …: the second step's checkpoint stays beside the newest."""
    scores = iter([0.0, 1.0, 0.0, 0.0])

    class Scored(World):
        def open(self, task: Any) -> Any:
            opening = super().open(task)
            validating = task.id.startswith("v")

            class Seat(Desk):
                async def verify(self, answer: str = "") -> Verdict:
                    return Verdict(next(scores) if validating else 0.0)

            class Opening:
                async def __aenter__(self) -> Any:
                    await opening.__aenter__()
                    return Seat()

                async def __aexit__(self, *error: Any) -> Any:
                    return await opening.__aexit__(*error)

            return Opening()

    run = new_run(tmp_path)
    config = rollout(small_config(tmp_path, total_steps=4, keep_checkpoints=1), validate_every=1)
    config.rollout.validation_greedy = True
    job = job_of(run, config, Scored())
    job.validation = [type(job.tasks[0])("v0", "v $ ", job.tasks[0].reward)]
    try:
        await train(job)
    finally:
        await job.engine.close()
        job.metrics.close()
    best = job.store.best()
    assert best is not None and best.name == "step-000002" and (best / "policy").is_dir()
    assert {path.name for path in run.checkpoints.glob("step-*")} == {"step-000002", "step-000004"}
    rows = read_json_lines(run.metrics)
    assert [row["validation/reward_mean"] for row in rows] == [0, 1, 0, 0]
    assert len(list(run.rollouts.glob("validation-*.jsonl"))) == 4


# --- one step ahead ----------------------------------------------------------------------------------


def ahead(folder: Path, **trainer: Any) -> Config:
    return rollout(small_config(folder, total_steps=4, **trainer), asynchronous=True)


@pytest.mark.parametrize("update", ["keep", "pause"])
async def test_one_step_ahead_every_token_is_at_most_one_update_old(tmp_path: Path, update: str) -> None:
    run = new_run(tmp_path)
    job = await trained(run, rollout(ahead(tmp_path), update_in_flight=update))
    rows = read_json_lines(run.metrics)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert rows[0]["staleness/max"] == 0 and all(row["staleness/max"] <= 1 for row in rows)
    assert all(row["probe"] < 1e-4 and row["status/infra"] == 0 for row in rows)
    assert isinstance(job.engine, Pausing) == (update == "pause")
    lines = [line for n in range(4) for line in read_json_lines(run.rollouts / f"step-{n:06d}.jsonl")]
    assert all(span[1] in (line["step"], line["step"] - 1) for line in lines for span in line["spans"])


async def test_going_on_after_an_interrupt_plays_the_step_again_that_was_ahead(tmp_path: Path) -> None:
    run, world, config = new_run(tmp_path), World(), ahead(tmp_path)
    job = job_of(run, config, world)
    world.before_open = lambda number: job.interrupt.ask(Wanted.CHECKPOINT) if number == 9 else None
    with pytest.raises(Interrupted):
        await train(job)
    await job.engine.close()
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("step")]
    done = len(read_json_lines(run.metrics))
    job = await trained(run, config)
    rows = read_json_lines(run.metrics)
    assert [row["step"] for row in rows] == [0, 1, 2, 3] and 0 < done < 4
    assert job.sampler.state_dict()["epoch"] == 2 and job.sampler.state_dict()["position"] == 0


async def test_in_step_is_the_default_and_repeats_exactly(tmp_path: Path) -> None:
    """Also with episodes to spare: where nothing is late, over-sampling changes no bit."""
    plain = await trained(new_run(tmp_path / "a"), small_config(tmp_path, total_steps=2))
    config = rollout(small_config(tmp_path, total_steps=2), oversample=1.5, straggler_grace=60)
    spare = await trained(new_run(tmp_path / "b"), config)
    assert same(state_of(plain), state_of(spare)) == []


# --- in flight ---------------------------------------------------------------------------------------


async def test_tokens_after_an_update_in_flight_are_of_the_new_weights() -> None:
    """Loaded in the middle of a request: each span's log-probabilities are those of its own weights."""
    live, old, begun, steps = tiny(), tiny(), threading.Event(), itertools.count(1)
    engine = TorchEngine(live, copied=True, max_length=4096)
    engine._model.register_forward_hook(lambda *_: begun.set() if next(steps) == 5 else None)
    await engine.load(1)
    asked = asyncio.create_task(engine.generate([1, 2, 3], Sampling(300, seed=1, ignore_eos=True)))
    await asyncio.to_thread(begun.wait, 60)
    disturb(live, 0.05)
    await engine.load(2)
    sample = await asked
    await engine.close()
    (_, first), (cut, second) = sample.spans
    assert (first, second) == (1, 2) and cut >= 5
    mine = torch.tensor(sample.logprobs)
    before, after = (logprobs(model, [1, 2, 3], sample.ids, 1.0) - mine for model in (old, live))
    assert before[:cut].abs().max() < 1e-4 and after[cut:].abs().max() < 1e-4
    assert before[cut:].abs().max() > 1e-2


async def test_a_pausing_engine_lets_turns_end_first() -> None:
    live = tiny()
    engine = Pausing(TorchEngine(live, copied=True, max_length=4096))
    await engine.load(1)
    first = asyncio.create_task(engine.generate([1, 2], Sampling(50, seed=1, ignore_eos=True)))
    await asyncio.sleep(0)
    disturb(live)
    loading = asyncio.create_task(engine.load(2))
    await asyncio.sleep(0)
    second = await engine.generate([1, 2], Sampling(5, seed=1, ignore_eos=True))
    assert loading.done() and (await first).spans == ((0, 1),) and second.spans == ((0, 2),)
    assert await engine.probe([1, 2]) < 1e-4 and engine.version == 2
    await engine.close()


def test_too_old_an_episode_is_masked() -> None:
    fresh, old = Episode.start("a", 0, [1]), Episode.start("b", 0, [1])
    for episode, version in ((fresh, 4), (old, 3)):
        episode.sampled([1, 2], [0.0, 0.0], spans=[(0, version), (1, 5)])
    mask_stale([fresh, old], 5, 1)
    assert fresh.valid and (old.status, old.failure) == (Status.INFRA, Failure.STALE)
    assert not any(old.mask) and "2 updates old, allowed are 1" in old.error
