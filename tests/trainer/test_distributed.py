"""Sharded over ranks: the same losses, the same skipped steps, the same share of work as one process."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_kit import on_ranks
from training_kit import made_episodes

from orchestrator.schema import Config
from trainer import packing
from trainer.batch import Batch
from trainer.distributed import Mirror, by_length, deal, device_of, join, shard, share
from trainer.learner import Learner
from trainer.lora import AdapterOff, full, inject
from trainer.model import freeze, make_critic, recompute_blocks, score, tiny_policy
from trainer.ranks import ALONE, Ranks


def test_prompts_are_shared_in_runs_of_near_equal_length() -> None:
    parts = [share(10, Ranks(rank, 4)) for rank in range(4)]
    assert [list(p) for p in parts] == [[0, 1], [2, 3, 4], [5, 6], [7, 8, 9]]
    assert share(3, ALONE) == range(3)
    assert [len(share(2, Ranks(rank, 4))) for rank in range(4)] == [0, 1, 0, 1]


def test_rows_go_where_the_fewest_tokens_are() -> None:
    lengths = {3: 100, 5: 60, 7: 50, 8: 10, 9: 10}
    found = by_length(lengths, 2)
    assert found == [[3, 8], [5, 7]] or sum(lengths[r] for r in found[0]) in (110, 120)
    assert sorted(found[0] + found[1]) == sorted(lengths)
    assert by_length({}, 2) == [[], []]


def test_without_torchrun_a_process_is_alone() -> None:
    assert join(1.0) is ALONE and device_of(0) == "cpu"
    policy = tiny_policy(0)
    assert shard(policy, ALONE) is policy and not hasattr(policy, "gathered")


def config_of(**trainer: Any) -> Config:
    return Config.model_validate(
        {
            "model": {"dtype": "float32"},
            "algorithm": {"kl_coef": 0.02, "entropy_coef": 0.005},
            "trainer": {
                "ppo_epochs": 2,
                "minibatches": 2,
                "micro_batch_tokens": 64,
                "policy_lr": 1e-3,
                "critic_lr": 2e-3,
                **trainer,
            },
        }
    )


def learner_on(ranks: Ranks, config: Config, how: str) -> Learner:
    policy = tiny_policy(0)
    if how == "lora":
        inject(policy, rank=4, alpha=8)
    if how == "packed":
        packing.install(policy)
    critic = make_critic(policy)
    reference = AdapterOff(policy) if how == "lora" else shard(freeze(tiny_policy(0)), ranks)
    for model in (policy, critic):
        if how == "recomputed":
            recompute_blocks(model)
        shard(model, ranks, reshard=how != "kept")
    return Learner.of(config, policy, critic, reference, ranks)


def two_steps(ranks: Ranks, how: str, spoil: bool = False) -> dict[str, Any]:
    """Two steps of PPO on made-up episodes, dealt out to the ranks; runs on every rank."""
    torch.manual_seed(0)
    config = config_of(packing=how == "packed")
    learner, rows = learner_on(ranks, config, how), []
    for step in range(2):
        everybody = made_episodes(10, seed=step)
        if spoil and step == 1:
            everybody[3].logprobs = [math.nan] * len(everybody[3].ids)
        batch, division = deal(everybody, config.trainer, ranks)
        row = learner.prepare(batch, division)
        rows.append(row | learner.update(batch, division, train_policy=True))
    models = {"policy": learner.policy, "critic": learner.critic}
    whole = {
        f"{kind}.{n}": full(p).clone() for kind, m in models.items() if m for n, p in m.named_parameters()
    }
    return {"rows": rows, "weights": whole, "random": torch.rand(1).item()}


HOW = ["plain", "packed", "recomputed", "kept", "lora"]


@pytest.mark.slow
@pytest.mark.parametrize(("size", "how"), [(2, how) for how in HOW] + [(4, "plain"), (4, "packed")])
def test_sharded_steps_are_those_of_one_process(tmp_path: Path, size: int, how: str) -> None:
    if how == "lora":
        pytest.importorskip("peft")
    expected = two_steps(ALONE, how)
    for found in on_ranks(size, tmp_path, "test_distributed", "two_steps", how):
        assert found["random"] == expected["random"]
        for mine, theirs in zip(found["rows"], expected["rows"], strict=True):
            assert mine == pytest.approx(theirs, abs=1e-5, rel=1e-4)
        # Adam divides by the gradient's size: where that is next to nothing, its last bits count.
        for name, tensor in expected["weights"].items():
            apart = (found["weights"][name] - tensor).abs()
            assert apart.mean() < 1e-6 and apart.max() < 2e-4, name


@pytest.mark.slow
def test_one_rank_that_is_not_finite_makes_all_of_them_skip(tmp_path: Path) -> None:
    first, second = on_ranks(2, tmp_path, "test_distributed", "two_steps", "plain", True)
    assert first["rows"][1]["nonfinite"] == second["rows"][1]["nonfinite"] > 0
    for name, tensor in first["weights"].items():
        assert torch.isfinite(tensor).all() and torch.equal(tensor, second["weights"][name])


def mirrored(ranks: Ranks, adapted: bool) -> float:
    """How far a mirror's log-probabilities are from the sharded policy's, before and after `refresh`."""
    whole = tiny_policy(1)
    mirror, policy = Mirror(whole), tiny_policy(0)
    if adapted:
        inject(policy, rank=4, alpha=8)
        torch.manual_seed(0)
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.1)
    shard(policy, ranks)
    mirror.refresh(policy)
    batch = Batch.of(made_episodes(3))
    with torch.no_grad():
        pair = [score(p, batch.ids, batch.mask, 1.0)[0] for p in (policy, mirror.model)]
    return float((pair[0] - pair[1]).abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("adapted", [False, True])
def test_a_mirror_is_the_sharded_policy(tmp_path: Path, adapted: bool) -> None:
    if adapted:
        pytest.importorskip("peft")
    assert max(on_ranks(2, tmp_path, "test_distributed", "mirrored", adapted)) < 1e-5
