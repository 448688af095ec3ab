"""What one step of the trainer does to the models, whatever the division into passes and ranks."""

from __future__ import annotations

import numpy as np
import torch
from training_kit import made_episodes, small_learner

from orchestrator.schema import Config
from trainer.batch import Batch, divide


def test_the_first_ratio_is_exactly_one() -> None:
    learner, whole = small_learner(), Batch.of(made_episodes(10))
    learner.trainer.ppo_epochs, learner.trainer.minibatches = 2, 3
    division = divide(whole.lengths, 3, 60)
    learner.prepare(whole, division)
    found = learner.update(whole, division, train_policy=True)
    assert found["first_ratio_error"] == 0.0 and found["ratio_error"] > 0.0
    assert found["optimizer_steps"] == 6 and found["nonfinite"] == 0


def test_while_only_the_critic_learns_the_policy_does_not_move() -> None:
    learner, whole = small_learner(), Batch.of(made_episodes())
    before = {name: x.clone() for name, x in learner.policy.state_dict().items()}
    division = divide(whole.lengths, 2, 1000)
    learner.prepare(whole, division)
    found = learner.update(whole, division, train_policy=False)
    assert found["loss_policy"] == 0.0 and found["loss_value"] > 0.0
    assert all(torch.equal(x, before[name]) for name, x in learner.policy.state_dict().items())
    assert not learner.policy_optimizer.state_dict()["state"]
    assert learner.critic.head.weight.abs().sum() > 0


def test_a_policy_that_has_moved_far_enough_waits_for_the_next_batch() -> None:
    config = Config.model_validate(
        {
            "model": {"dtype": "float32"},
            "algorithm": {"target_kl": 1e-12},
            "trainer": {"ppo_epochs": 2, "policy_lr": 1e-3},
        }
    )
    learner, whole = small_learner(config), Batch.of(made_episodes())
    division = divide(whole.lengths, 2, 1000)
    learner.prepare(whole, division)
    found = learner.update(whole, division, train_policy=True)
    # the first minibatch moves it, the second finds it too far; the critic makes all four steps
    assert {int(s["step"]) for s in learner.policy_optimizer.state_dict()["state"].values()} == {1}
    assert {int(s["step"]) for s in learner.critic_optimizer.state_dict()["state"].values()} == {4}
    assert found["stopped"] == 1 / 4 and found["step_kl"] > 0
    assert all(p.grad is None for p in learner.policy.parameters())


def test_at_first_the_returns_are_the_rewards_to_go() -> None:
    learner, whole = small_learner(), Batch.of(made_episodes())
    learner.prepare(whole, divide(whole.lengths, 1, 1000))
    assert torch.equal(whole.returns, whole.outcomes[:, None] * whole.mask)
    centred = (whole.advantages * whole.mask).sum()
    assert abs(float(centred)) < 1e-3


def test_a_gradient_that_is_not_finite_moves_nothing() -> None:
    learner, whole = small_learner(), Batch.of(made_episodes())
    division = divide(whole.lengths, 1, 1000)
    learner.prepare(whole, division)
    whole.returns[0, int(whole.mask[0].argmax())] = torch.inf
    before = {name: x.clone() for name, x in learner.critic.state_dict().items()}
    found = learner.update(whole, division, train_policy=False)
    assert found["nonfinite"] == 1
    assert all(torch.equal(x, before[name]) for name, x in learner.critic.state_dict().items())
