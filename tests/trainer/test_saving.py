"""Saving while training goes on, keeping the best, and reading what another number of ranks has written."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_kit import on_ranks
from training_kit import made_episodes, small_learner

from orchestrator.schema import Config
from trainer import lora
from trainer.checkpoint import Checkpoints, Progress, capture, is_whole, restore, score_of
from trainer.data import Cursor
from trainer.distributed import deal, shard
from trainer.errors import CheckpointError
from trainer.learner import Learner
from trainer.model import make_critic, score, tiny_policy
from trainer.ranks import ALONE, Ranks
from trainer.state_files import learner_state
from trainer.weights import named_weights

CURSOR: Cursor = {"epoch": 1, "position": 2, "size": 4, "seed": 0}


def progress(step: int) -> Progress:
    return capture(step, CURSOR, Config())


def learner_on(ranks: Ranks, seed: int = 0, adapted: bool = False) -> Learner:
    config = Config.model_validate({"model": {"dtype": "float32"}, "trainer": {"policy_lr": 1e-3}})
    policy = tiny_policy(0 if adapted else seed)
    if adapted:
        lora.inject(policy, rank=4, alpha=8, seed=seed)
    critic = make_critic(policy)
    for model in (policy, critic):
        shard(model, ranks)
    return Learner.of(config, policy, critic, None, ranks)


def moved(learner: Learner) -> Learner:
    """After one real step, so that Adam has something to remember."""
    torch.manual_seed(5)
    batch, division = deal(made_episodes(), learner.trainer, learner.ranks)
    learner.prepare(batch, division)
    learner.update(batch, division, train_policy=True)
    return learner


def everything(learner: Learner) -> dict[str, torch.Tensor]:
    state = {name: lora.full(tensor).clone() for name, tensor in learner_state(learner).items()}
    return state | {f"policy.{name}": tensor.clone() for name, tensor in named_weights(learner.policy)}


def differing(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> list[str]:
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


def test_what_is_saved_in_the_background_is_the_state_of_its_moment(tmp_path: Path) -> None:
    store, learner = Checkpoints(tmp_path), moved(learner_on(ALONE))
    said: list[Path] = []
    expected = everything(learner)
    path = store.save(learner, progress(1), wait=False, say=lambda path, seconds: said.append(path))
    moved(learner)
    assert differing(expected, everything(learner)), "training did not go on"
    store.wait()
    other = learner_on(ALONE, seed=1)
    restore(path, other)
    assert differing(expected, everything(other)) == [] and said == [path]
    assert store.timings["time/save_stall"] > 0 and store.timings["time/save"] > 0
    store.close()


def test_trouble_in_the_background_is_told_at_the_next_save(tmp_path: Path) -> None:
    store, learner = Checkpoints(tmp_path), moved(learner_on(ALONE))
    store.save(learner, progress(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))  # no file may be larger: as good as full
    try:
        store.save(learner, progress(2), wait=False)
        with pytest.raises(CheckpointError, match=r"step-000002.*checkpoints before it are intact"):
            store.save(learner, progress(3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert store.newest() == store.path(1) and not list(tmp_path.glob(".saving-*"))
    store.save(learner, progress(3))  # it goes on
    assert store.newest() == store.path(3)


@pytest.mark.parametrize(("keep_best", "kept"), [(True, [2, 4, 5]), (False, [4, 5])])
def test_the_best_is_kept_beside_the_newest(tmp_path: Path, keep_best: bool, kept: list[int]) -> None:
    learner = small_learner()
    scores = [0.1, 0.9, 0.9, 0.3, None]
    for step, score_then in enumerate(scores, start=1):
        store = Checkpoints(tmp_path, keep=2, keep_best=keep_best)  # each in a life of its own
        store.save(learner, progress(step), score_then)
        store.close()
    assert store.all() == [store.path(step) for step in kept]
    assert (tmp_path / "best").read_text() == "step-000002\n", "an equal one does not replace it"
    if keep_best:
        assert store.best() == store.path(2) and score_of(store.path(2)) == 0.9
    assert score_of(store.path(5)) == float("-inf")


def test_adapters_are_restored_bit_for_bit_and_exported_merged(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from trainer.model import load_policy

    learner = moved(learner_on(ALONE, adapted=True))
    path = Checkpoints(tmp_path).save(learner, progress(1))
    other = learner_on(ALONE, seed=9, adapted=True)
    restore(path, other)
    assert differing(everything(learner), everything(other)) == []
    assert any("lora_B" in name for name in everything(learner))
    batch, _ = deal(made_episodes(), learner.trainer)
    with torch.no_grad():
        mine, merged = (
            score(p, batch.ids, batch.mask, 1.0)[0] for p in (learner.policy, load_policy(path / "policy"))
        )
    torch.testing.assert_close(mine, merged, atol=1e-5, rtol=1e-5)


def save_on(ranks: Ranks, folder: Path, wait: bool) -> dict[str, torch.Tensor]:
    store, learner = Checkpoints(folder, ranks=ranks), moved(learner_on(ranks))
    expected = everything(learner)
    store.save(learner, progress(1), score=0.5, wait=wait)
    moved(learner)
    store.wait()
    store.close()
    return expected


def read_on(ranks: Ranks, path: Path) -> dict[str, torch.Tensor]:
    learner = learner_on(ranks, seed=3)
    restore(path, learner, ranks)
    return everything(learner)


@pytest.mark.slow
@pytest.mark.parametrize("wait", [True, False])
def test_any_number_of_ranks_reads_what_two_have_written(tmp_path: Path, wait: bool) -> None:
    folder = tmp_path / "checkpoints"
    expected, again = on_ranks(2, tmp_path / "save", "test_saving", "save_on", folder, wait)
    assert differing(expected, again) == []
    store = Checkpoints(folder)
    path = store.newest()
    assert path is not None and is_whole(path) and store.best() == path
    assert len(list((path / "state").iterdir())) == 2, "each rank writes its own part"
    assert differing(expected, read_on(ALONE, path)) == []
    if wait:
        for found in on_ranks(4, tmp_path / "read", "test_saving", "read_on", path):
            assert differing(expected, found) == []


def full_on(ranks: Ranks, folder: Path) -> tuple[str, Any]:
    """Only rank 1 has no room: what do the ranks say?"""
    store, learner = Checkpoints(folder, ranks=ranks), moved(learner_on(ranks))
    store.save(learner, progress(1))
    if ranks.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
    try:
        store.save(learner, progress(2))
    except CheckpointError as error:
        said = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return said, store.newest()


@pytest.mark.slow
def test_one_rank_without_room_spoils_nothing_and_all_say_so(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for said, newest in on_ranks(2, tmp_path / "save", "test_saving", "full_on", folder):
        assert "step-000002 could not be written" in said and "rank 1" in said
        assert newest == folder / "step-000001"
    assert not list(folder.glob(".saving-*"))
