"""Settings of the algorithm that contradict each other are refused, with the assignment that mends them."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator import plan_algorithm, plan_checks
from orchestrator.schema import Config

GRPO = {"estimator": "grpo"}


def made(algorithm: dict[str, Any], **others: dict[str, Any]) -> Config:
    return Config.model_validate({"algorithm": algorithm, **others})


@pytest.mark.parametrize("estimator", ["grpo", "dr-grpo", "rloo", "reinforce++-baseline"])
def test_an_estimator_of_groups_needs_several_rollouts(estimator: str) -> None:
    one = made({"estimator": estimator}, rollout={"rollouts_per_prompt": 1})
    (line,) = plan_algorithm.contradictions(one)
    assert "set rollout.rollouts_per_prompt=4" in line
    assert plan_algorithm.contradictions(made({"estimator": estimator})) == []


@pytest.mark.parametrize("estimator", ["gae", "reinforce++"])
def test_the_others_do_not(estimator: str) -> None:
    assert (
        plan_algorithm.contradictions(made({"estimator": estimator}, rollout={"rollouts_per_prompt": 1}))
        == []
    )


@pytest.mark.parametrize(
    ("config", "fix"),
    [
        (made({"kl_coef": 0.1, "kl_reward_coef": 0.1}), "set one of the two to 0"),
        (made(GRPO, trainer={"critic_warmup_steps": 3}), "set trainer.critic_warmup_steps=0"),
        (made(GRPO | {"lam": 0.95}), "set algorithm.lam=1"),
        (made(GRPO | {"gamma": 0.99}), "set algorithm.gamma=1"),
        (made({"estimator": "reinforce++", "lam": 0.9}), "set algorithm.lam=1"),
        (made({"aggregation_constant": 100.0}), "set algorithm.aggregation=constant"),
        (made({"old_logprobs": "rollout", "importance_mask": "token"}), "algorithm.old_logprobs=trainer"),
        (made({"importance_cap": None, "importance_weight": "product"}), "set algorithm.importance_cap=2"),
        (made({"importance_mask": "token", "importance_low": 1.5}), "like 0.5 and 2"),
        (
            made({"truncated": "penalty", "overlong_cache": 100}, rollout={"max_response_length": 80}),
            "set it to 20",
        ),
        (made({}, trainer={"lr_min_ratio": 0.1}), "set trainer.lr_schedule=linear or cosine"),
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_refused_with_its_fix(config: Config, fix: str) -> None:
    (line,) = plan_algorithm.contradictions(config)
    assert fix in line
    assert line in plan_checks.contradictions(config, "run")
    assert line not in plan_checks.contradictions(config, "runtime-only")


def test_what_goes_together_is_accepted() -> None:
    good = [
        {},
        GRPO | {"kl_coef": 0.001, "aggregation": "seq-mean-token-mean"},
        {"estimator": "dr-grpo", "aggregation": "constant", "aggregation_constant": 1000.0},
        {"estimator": "reinforce++", "kl_reward_coef": 0.01, "gamma": 0.99},
        {"old_logprobs": "rollout"},
        {"importance_mask": "geometric", "importance_low": 0.999, "importance_high": 1.001},
        {"truncated": "penalty"},
    ]
    assert [plan_algorithm.contradictions(made(wanted)) for wanted in good] == [[]] * len(good)
    assert [list(plan_algorithm.worries(made(wanted))) for wanted in good] == [[]] * len(good)


def test_an_estimator_of_the_kl_in_the_wrong_place_is_a_worry() -> None:
    for wanted in (
        {"kl_coef": 0.1, "kl_estimator": "k1"},
        {"kl_reward_coef": 0.1, "kl_reward_estimator": "k3"},
    ):
        (line,) = plan_algorithm.worries(made(wanted))
        assert line in plan_checks.worries(made(wanted), "run")
