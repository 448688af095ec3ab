"""Evaluations: pass@k of judged episodes, what is lost, what a next life need not do again, whose weights."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training_kit import World, new_run, small_config, trained

from orchestrator.checkpoints import judged as judged_count
from orchestrator.checkpoints import keep_policy, newest
from orchestrator.contract import Env, Evaluation, Role, RunDirectory, read_json_lines
from orchestrator.schema import Config
from trainer import judged
from trainer.engines.torch_engine import TorchEngine
from trainer.errors import CheckpointError, Lost
from trainer.evaluate import Evaluating, evaluate, evaluation
from trainer.export import byte_tokenizer
from trainer.interrupt import Interrupt, Interrupted, Wanted
from trainer.model import ByteTokenizer, tiny_policy
from trainer.passk import pass_at_k
from trainer.view import read_rollouts
from trainer.warmstart import warm_start
from trainer.weights import save_model

TASKS, SAMPLES = 3, 4


Asked = Callable[..., Config]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model as a Hugging Face directory, which has seen enough to end a line now and then."""
    policy = tiny_policy(0)
    warm_start(policy, 10, 0, ByteTokenizer())
    folder = tmp_path_factory.mktemp("models") / "model"
    save_model(policy, folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def asked(model: Path, tmp_path: Path) -> Asked:
    """Makes configurations: four samples of each of three tasks of that model."""

    def make(**evaluation: Any) -> Config:
        config = small_config(tmp_path, TASKS)
        config.model.path = str(model)
        config.rollout.max_tokens_per_turn = 16
        config.data.validation, config.data.train = config.data.train, "/gone.parquet"
        config.rollout.validation_rollouts = SAMPLES
        for name, value in ({"k": "1,2,4"} | evaluation).items():
            setattr(config.evaluation, name, value)
        return config

    return make


def job_of(run: RunDirectory, config: Config, world: World | None = None) -> Evaluating:
    job = evaluation(run, config, Interrupt(), run.events_of(Role.TRAINING, "trainer"), world or World())
    job.pause_s = 0.01
    return job


async def evaluated(run: RunDirectory, config: Config, world: World | None = None) -> str:
    job = job_of(run, config, world)
    try:
        return await evaluate(job)
    finally:
        await job.engine.close()
        job.close()


def result_of(run: RunDirectory) -> Evaluation:
    found = run.read(run.evaluation, Evaluation)
    assert found is not None
    return found


def rewards(run: RunDirectory) -> dict[int, float]:
    """By number of the episode, as the trajectories have them."""
    _, lines = read_rollouts(run.rollouts, "validation", None, "")
    return {one["number"]: one["reward"] for one in lines if one["status"] != "infra"}


async def test_every_sample_is_judged_and_counted(tmp_path: Path, asked: Asked, model: Path) -> None:
    run, world = new_run(tmp_path), World()
    said = await evaluated(run, asked(), world)
    found, won = result_of(run), rewards(run)
    assert world.opened == TASKS * SAMPLES and sorted(won) == list(range(TASKS * SAMPLES))
    solved = [sum(won[task * SAMPLES + n] > 0.5 for n in range(SAMPLES)) for task in range(TASKS)]
    assert 0 < sum(solved) < TASKS * SAMPLES, "a test that always or never succeeds shows nothing"
    assert [one["successes"] for one in found.by_task] == solved
    for k in (1, 2, 4):
        mean = sum(pass_at_k(SAMPLES, one, k) for one in solved) / TASKS
        assert found.pass_at[str(k)]["value"] == pytest.approx(mean)
    assert found.complete and (found.judged, found.lost) == (12, 0) and "pass@4" in said
    assert found.model == str(model) and found.step is None and found.checkpoint == ""
    assert found.weights == judged.digest_of_weights(model) and found.versions["torch"]


async def test_the_same_seeds_give_the_same_numbers(tmp_path: Path, asked: Asked) -> None:
    runs = [RunDirectory.create(tmp_path / name) for name in ("a", "b")]
    for run in runs:
        await evaluated(run, asked())
    assert rewards(runs[0]) == rewards(runs[1])
    assert result_of(runs[0]).data_digest == result_of(runs[1]).data_digest


async def test_no_critic_no_optimiser_and_nothing_that_could_learn(tmp_path: Path, asked: Asked) -> None:
    run = new_run(tmp_path)
    job = job_of(run, asked())
    try:
        assert not hasattr(job, "learner")
        await evaluate(job)
    finally:
        await job.engine.close()
    assert not list(run.checkpoints.glob("step-*")) and not run.metrics.exists()


# --- what infrastructure loses -----------------------------------------------------------------------


async def test_lost_episodes_are_sampled_again_and_count_like_the_others(
    tmp_path: Path, asked: Asked
) -> None:
    plain, shaken = (RunDirectory.create(tmp_path / name) for name in ("plain", "shaken"))
    await evaluated(plain, asked())
    await evaluated(shaken, asked(), World(lost=lambda number: number in (1, 5, 13)))
    assert rewards(shaken) == rewards(plain) and result_of(shaken).lost == 0
    assert any(event.what == "training.episodes_lost" for event in shaken.timeline())


async def test_what_stays_lost_is_said_and_never_a_failure(tmp_path: Path, asked: Asked) -> None:
    run = new_run(tmp_path)

    class Bad(World):
        def open(self, task: Any) -> Any:
            self.lost = lambda number: task.id == "t1"
            return super().open(task)

    said = await evaluated(run, asked(), Bad())
    found = result_of(run)
    assert (found.judged, found.lost) == (8, 4) and "4 episodes stayed lost" in said
    assert found.by_task[1] == {"task": "t1", "samples": 0, "successes": 0}
    assert {k: one["tasks"] for k, one in found.pass_at.items()} == {"1": 2, "2": 2, "4": 2}
    assert judged_count(run) == 8, "what is lost is not kept: a next life plays it again"


async def test_nothing_judged_is_no_success(tmp_path: Path, asked: Asked) -> None:
    with pytest.raises(Lost, match="all 12 episodes were lost"):
        await evaluated(new_run(tmp_path), asked(), World(lost=lambda number: True))


# --- lives -------------------------------------------------------------------------------------------


async def ended_at(run: RunDirectory, config: Config, opening: int) -> int:
    """One life, told to end when so many workspaces were opened; how many it opened."""
    interrupt = Interrupt()

    def tell(number: int) -> None:
        if number == opening:
            interrupt.ask(Wanted.CHECKPOINT)

    world = World(before_open=tell)
    config.rollout.max_parallel_episodes = 1
    job = evaluation(run, config, interrupt, run.events_of(Role.TRAINING, "trainer"), world)
    try:
        with pytest.raises(Interrupted):
            await evaluate(job)
    finally:
        await job.engine.close()
    return world.opened


async def test_a_next_life_plays_only_what_is_not_judged(
    tmp_path: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parted = (RunDirectory.create(tmp_path / name) for name in ("whole", "parted"))
    await evaluated(whole, asked())
    for attempt, opening in enumerate((5, 2), 1):
        monkeypatch.setenv(Env.ATTEMPT, str(attempt))
        await ended_at(parted, asked(), opening)
        assert not result_of(parted).complete
    done = judged_count(parted)
    assert done == 5 + 2 and newest(parted) == f"judged-{done}"
    world = World()
    monkeypatch.setenv(Env.ATTEMPT, "3")
    await evaluated(parted, asked(), world)
    assert world.opened == TASKS * SAMPLES - done
    assert rewards(parted) == rewards(whole)
    assert result_of(parted).pass_at == result_of(whole).pass_at
    assert len(list(parted.judged.iterdir())) == 3, "one writer per file"
    again = World()
    await evaluated(parted, asked(), again)  # killed after the last word but before it was heard
    assert again.opened == 0 and rewards(parted) == rewards(whole)


async def test_a_line_cut_short_by_a_kill_never_was(tmp_path: Path, asked: Asked) -> None:
    run = new_run(tmp_path)
    await evaluated(run, asked())
    (path,) = run.judged.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    for opened in (1, 0):  # by hand, in the same file, behind the half line
        world = World()
        await evaluated(run, asked(), world)
        assert world.opened == opened


async def test_what_was_judged_of_other_tasks_does_not_count(tmp_path: Path, asked: Asked) -> None:
    run = new_run(tmp_path)
    await evaluated(run, asked())
    other = asked()
    other.rollout.temperature = 0.5
    world = World()
    await evaluated(run, other, world)
    assert world.opened == TASKS * SAMPLES


def test_digests_are_those_of_files(tmp_path: Path) -> None:
    import hashlib

    (tmp_path / "b.safetensors").write_bytes(b"second")
    (tmp_path / "a.safetensors").write_bytes(b"first, ")
    (tmp_path / "config.json").write_bytes(b"not counted")
    assert judged.digest_of_weights(tmp_path) == hashlib.sha256(b"first, second").hexdigest()
    data = tmp_path / "data"
    data.write_bytes(b"rows")
    assert judged.digest_of_tasks(str(data), []) == hashlib.sha256(b"rows").hexdigest()


# --- whose weights -----------------------------------------------------------------------------------


def test_a_checkpoint_is_evaluated_with_its_own_weights_even_when_it_is_gone(
    tmp_path: Path, asked: Asked
) -> None:
    trained_run = RunDirectory.create(tmp_path / "trained")
    config = small_config(tmp_path, total_steps=2, save_every=1, async_save=False, critic_warmup_steps=0)
    job = asyncio.run(trained(trained_run, config))
    learned = {name: tensor.clone() for name, tensor in job.learner.policy.state_dict().items()}
    checkpoint = job.store.path(2)
    run = RunDirectory.create(tmp_path / "evaluated")
    evaluating = asked(checkpoint=str(checkpoint))
    evaluating.model.path = "builtin:tiny"
    keep_policy(checkpoint, run.evaluated)
    job.store.path(2).rename(tmp_path / "pruned")

    async def work() -> None:
        job = job_of(run, evaluating)
        try:
            assert isinstance(job.engine, TorchEngine)
            policy = job.engine._live  # what it samples from
            assert not any(p.requires_grad for p in policy.parameters())
            for name, tensor in policy.state_dict().items():
                assert torch.equal(tensor, learned[name]), name
            await evaluate(job)
        finally:
            await job.engine.close()

    asyncio.run(work())
    found = result_of(run)
    assert found.step == 2 and found.checkpoint == str(checkpoint)
    assert read_json_lines(run.rollouts / "validation-000002.jsonl")
    assert found.weights == judged.digest_of_weights(tmp_path / "pruned" / "policy")


async def test_weights_that_the_launcher_did_not_keep_are_missed(tmp_path: Path, asked: Asked) -> None:
    with pytest.raises(CheckpointError, match="Launch the evaluation again"):
        await evaluated(new_run(tmp_path), asked(checkpoint="/gone/step-000002"))


def test_the_record_is_small_plain_json(tmp_path: Path, asked: Asked) -> None:
    run = new_run(tmp_path)
    asyncio.run(evaluated(run, asked()))
    data = json.loads(run.evaluation.read_text())
    assert data["by_task"][0].keys() == {"task", "samples", "successes"}
    assert run.evaluation.stat().st_size < 4000
