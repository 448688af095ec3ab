"""Whole runs with each estimator: the loop, resuming, and what lies in a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from training_kit import new_run, same, small_config, state_of, trained

from orchestrator.durable import read_json_lines
from orchestrator.schema import Config

STEPS = 3
VARIANTS: dict[str, dict[str, Any]] = {
    "grpo": {"aggregation": "seq-mean-token-mean"},
    "dr-grpo": {"aggregation": "constant"},
    "rloo": {"kl_coef": 0.0, "kl_reward_coef": 0.02},
    "reinforce++": {"old_logprobs": "rollout"},
    "reinforce++-baseline": {"importance_mask": "token", "truncated": "penalty", "overlong_cache": 10},
}


def configured(folder: Path, estimator: str, steps: int = STEPS) -> Config:
    config = small_config(folder, total_steps=steps, critic_warmup_steps=0)
    config.algorithm.estimator = estimator
    for name, value in VARIANTS[estimator].items():
        setattr(config.algorithm, name, value)
    return config


@pytest.mark.parametrize("estimator", VARIANTS)
async def test_a_run_without_a_critic_learns_and_resumes_bit_for_bit(tmp_path: Path, estimator: str) -> None:
    (tmp_path / "whole").mkdir()
    config = configured(tmp_path / "whole", estimator)
    run = new_run(tmp_path / "whole")
    expected = state_of(await trained(run, config))
    rows = read_json_lines(run.metrics)
    assert [row["step"] for row in rows] == list(range(STEPS))
    assert all(
        "value_mean" not in row and row.get("first_ratio_error", 0.0) == 0
        for row in rows
        if "groups/count" in row
    )
    assert any(row.get("grad_norm_policy", 0.0) > 0 for row in rows)
    assert not [path for path in run.checkpoints.rglob("*") if "critic" in path.name]

    again = new_run(tmp_path)
    first = Config.model_validate(config.model_dump())
    first.trainer.total_steps = 1
    await trained(again, first)
    assert same(expected, state_of(await trained(again, config))) == []
