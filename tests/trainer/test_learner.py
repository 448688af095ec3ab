"""What one step of the trainer does to the models, whatever the division into passes and ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from training_kit import made_episodes, small_learner

from orchestrator.schema import Config
from trainer import ppo
from trainer.batch import Batch, divide
from trainer.episode import Episode
from trainer.learner import Learner
from trainer.model import make_critic, tiny_policy


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
    assert learner.critic is not None and learner.critic.head.weight.abs().sum() > 0


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
    assert learner.critic_optimizer is not None
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
    assert learner.critic is not None
    before = {name: x.clone() for name, x in learner.critic.state_dict().items()}
    found = learner.update(whole, division, train_policy=False)
    assert found["nonfinite"] == 1
    assert all(torch.equal(x, before[name]) for name, x in learner.critic.state_dict().items())


# --- what is computed, and what is not ---------------------------------------------------------------


def configured(trainer: dict[str, Any] | None = None, **algorithm: Any) -> Config:
    return Config.model_validate(
        {"model": {"dtype": "float32"}, "algorithm": algorithm, "trainer": trainer or {}}
    )


def step(config: Config, batch: Batch, minibatches: int = 1) -> tuple[Learner, dict[str, float]]:
    learner, division = small_learner(config), divide(batch.lengths, minibatches, 1000)
    row = learner.prepare(batch, division)
    return learner, row | learner.update(batch, division, train_policy=True)


def mixed() -> list[Episode]:
    """Two prompts with both kinds of reward, one with one kind only."""
    found = made_episodes(9)
    for number, episode in enumerate(found):
        episode.group, episode.reward = number % 3, float(number in (0, 1, 2, 5, 8))
    return found


@contextmanager
def counted(model: torch.nn.Module) -> Iterator[list[int]]:
    """How often a model computes."""
    calls: list[int] = []
    inner: Any = model.base_model
    handle = inner.register_forward_hook(lambda *_: calls.append(1))
    yield calls
    handle.remove()


@pytest.mark.parametrize("estimator", ["grpo", "dr-grpo", "rloo", "reinforce++", "reinforce++-baseline"])
def test_without_a_critic_nothing_of_one_is_made_or_told(estimator: str) -> None:
    learner, row = step(configured(estimator=estimator), Batch.of(mixed()))
    assert learner.critic is None and learner.critic_optimizer is None
    assert not {"loss_value", "grad_norm_critic", "value_mean", "explained_variance"} & row.keys()
    assert row["grad_norm_policy"] > 0 and row["optimizer_steps"] == 1


def test_a_critic_that_is_not_needed_is_let_go() -> None:
    policy = tiny_policy(0)
    assert Learner.of(configured(estimator="rloo"), policy, make_critic(policy), None).critic is None


def test_without_a_critic_there_is_no_step_in_which_the_policy_waits() -> None:
    learner, batch = small_learner(configured(estimator="grpo")), Batch.of(mixed())
    division = divide(batch.lengths, 1, 1000)
    learner.prepare(batch, division)
    assert learner.update(batch, division, train_policy=False)["grad_norm_policy"] > 0


def test_groups_without_variance_are_told_and_teach_nothing() -> None:
    batch = Batch.of(mixed())
    _, row = step(configured(estimator="grpo"), batch)
    assert row["groups/flat"] == pytest.approx(1 / 3) and row["groups/count"] == 3
    assert not batch.advantages[batch.groups == 2].any() and batch.advantages[batch.groups == 0].any()


@pytest.mark.parametrize(("estimator", "whitens"), [("grpo", False), ("reinforce++-baseline", True)])
def test_whitening_is_the_estimators_own_choice_unless_configured(estimator: str, whitens: bool) -> None:
    for wanted, expected in ((None, whitens), (True, True), (False, False)):
        batch = Batch.of(mixed())
        step(configured(estimator=estimator, whiten_advantages=wanted), batch)
        chosen = batch.advantages[batch.mask > 0]
        assert (abs(float(chosen.mean())) < 1e-5 and abs(float(chosen.std()) - 1) < 1e-4) is expected


def test_a_batch_in_which_nothing_can_be_compared_moves_nothing() -> None:
    learner, _ = step(configured(estimator="grpo"), Batch.of(mixed()))
    before = {name: x.clone() for name, x in learner.policy.state_dict().items()}
    episodes = made_episodes(3)
    for number, episode in enumerate(episodes):
        episode.group = number
    batch = Batch.of(episodes)
    division = divide(batch.lengths, 1, 1000)
    row = learner.prepare(batch, division) | learner.update(batch, division, True)
    assert row["optimizer_steps"] == 0 and row["groups/alone"] == 3
    # by its momentum alone Adam would have moved
    assert all(torch.equal(x, before[name]) for name, x in learner.policy.state_dict().items())


# --- rewards -----------------------------------------------------------------------------------------


def test_the_kl_as_a_reward_is_taken_from_each_action() -> None:
    config = configured(estimator="reinforce++", kl_reward_coef=0.5, whiten_advantages=False)
    learner, batch = small_learner(config, seed=1), Batch.of(made_episodes(4))
    learner.prepare(batch, divide(batch.lengths, 1, 1000))
    penalty = 0.5 * (batch.old - batch.reference).double().numpy() * batch.mask.numpy()
    for row in range(4):
        places = np.flatnonzero(batch.mask[row])
        to_go = float(batch.outcomes[row]) - np.cumsum(penalty[row, places][::-1])[::-1]
        np.testing.assert_allclose(batch.advantages[row, places], to_go, atol=1e-4)
    assert np.abs(penalty).max() > 1e-3


def test_in_groups_the_kl_lowers_the_score_of_the_row() -> None:
    config = configured(estimator="dr-grpo", kl_reward_coef=0.5)
    learner, batch = small_learner(config, seed=1), Batch.of(mixed())
    learner.prepare(batch, divide(batch.lengths, 1, 1000))
    kl = ((batch.old - batch.reference) * batch.mask).sum(1)
    expected = ppo.dr_grpo(batch.outcomes - 0.5 * kl, batch.groups)
    torch.testing.assert_close(batch.advantages, expected[:, None] * batch.mask, atol=1e-5, rtol=1e-4)


def test_long_episodes_cost_reward_where_length_is_punished() -> None:
    config = configured(
        estimator="reinforce++", truncated="penalty", overlong_cache=20, overlong_penalty=2.0,
        whiten_advantages=False,
    )  # fmt: skip
    config.rollout.max_response_length = 100
    episodes = []
    for length in (80, 90, 100):
        episode = Episode.start("t", 0, [1])
        episode.sampled([5] * length, [-5.8] * length)
        episodes.append(episode.finish(1.0))
    batch = Batch.of(episodes)
    small_learner(config).prepare(batch, [[[0, 1, 2]]])
    assert batch.advantages[:, 1].tolist() == [1.0, 0.0, -1.0]


# --- the engine's log-probabilities ------------------------------------------------------------------


def test_in_bypass_the_engines_logprobs_are_the_old_ones_and_a_forward_pass_is_saved() -> None:
    config = configured(estimator="grpo", old_logprobs="rollout")
    learner, batch = small_learner(config), Batch.of(mixed())
    division = divide(batch.lengths, 1, 1000)
    with counted(learner.policy) as calls:
        row = learner.prepare(batch, division)
        assert calls == []
        row |= learner.update(batch, division, train_policy=True)
        assert len(calls) == 1
    assert torch.equal(batch.old, batch.rollout * batch.mask) and bool((batch.weight == 1).all())
    assert (
        "first_ratio_error" not in row
    )  # it is no error here: the ratio holds what engine and trainer differ by
    decoupled = Batch.of(mixed())
    _, other = step(configured(estimator="grpo"), decoupled)
    for name in ("mismatch", "mismatch_max", "mismatch_k3", "mismatch_outside", "entropy"):
        assert row[name] == pytest.approx(other[name], rel=1e-4), name
    difference = (decoupled.old - decoupled.rollout)[decoupled.mask > 0].double().numpy()
    assert row["ratio_mean"] == pytest.approx(np.exp(difference).mean(), rel=1e-4)


def test_decoupled_the_loss_is_weighted_by_old_over_rollout() -> None:
    """First minibatch, ratio 1: the loss is -Σ min(π_old/π_rollout, 2)·Â ÷ tokens."""
    batch = Batch.of(mixed())
    for row in range(len(batch.mask)):
        batch.rollout[row] -= batch.mask[row] * (row - 4) / 4  # some weights above the cap, some below 1
    _, numbers = step(configured(estimator="grpo"), batch)
    chosen = batch.mask.numpy() > 0
    weight = np.minimum(np.exp((batch.old - batch.rollout).double().numpy()), 2.0)[chosen]
    expected = -(weight * batch.advantages.double().numpy()[chosen]).sum() / chosen.sum()
    assert numbers["loss_policy"] == pytest.approx(expected, rel=1e-4)
    assert numbers["weight/mean"] == pytest.approx(weight.mean(), rel=1e-5)
    assert numbers["weight/capped"] == pytest.approx((weight >= 2.0).mean(), rel=1e-5) != 0
    assert numbers["weight/masked"] == 0.0


def test_what_is_dropped_still_counts_in_the_denominator() -> None:
    batch = Batch.of(mixed())
    batch.rollout[0] -= batch.mask[0] * 3.0
    config = configured(estimator="grpo", importance_mask="geometric", importance_cap=None)
    _, numbers = step(config, batch)
    chosen, kept = batch.mask.numpy() > 0, batch.mask.numpy() > 0
    kept[0] = False
    expected = -batch.advantages.double().numpy()[kept].sum() / chosen.sum()
    assert numbers["loss_policy"] == pytest.approx(expected, rel=1e-4)
    assert numbers["weight/masked"] == pytest.approx(1 - kept.sum() / chosen.sum(), rel=1e-5)


# --- numbers -----------------------------------------------------------------------------------------


def test_the_row_tells_lengths_ratios_and_clips() -> None:
    batch = Batch.of(made_episodes(10))
    config = configured({"ppo_epochs": 4, "policy_lr": 3e-3}, clip_low=0.05, clip_high=0.05, dual_clip=1.001)
    _, row = step(config, batch, minibatches=3)
    assert row["length/response_max"] == float(batch.responses.max())
    assert row["length/actions_mean"] == pytest.approx(float(batch.mask.sum(1).mean()))
    assert row["ratio_min"] < 1 < row["ratio_max"]
    assert row["clipped_low"] > 0 and row["clipped_high"] > 0 and row["clipped_dual"] > 0
    assert row["clipped_low"] + row["clipped_high"] <= row["clipped"]
    assert row["action_tokens"] == float(batch.mask.sum())
