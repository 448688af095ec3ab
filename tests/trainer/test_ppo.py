"""The arithmetic of PPO against numbers worked out by hand, and against plain NumPy in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer import ppo

E_MASK = [1, 1, 0, 0, 1, 1]
E_REWARD = [0, 0, 0, 0, 0, 1]
E_VALUE = [0.1, 0.2, 0.9, 0.9, 0.3, 0.4]
A = [0, 1, 4, 5]  # the action places of E


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def close(found: Any, expected: Any, tolerance: float = 1e-6) -> None:
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=0, atol=tolerance)


def episode_e(gamma: float, lam: float) -> Tensor:
    return ppo.gae(row(*E_REWARD), row(*E_VALUE), row(*E_MASK), gamma, lam)


# --- rewards and advantages --------------------------------------------------------------------------


def test_the_reward_goes_to_the_last_action_token() -> None:
    mask = torch.tensor([[1, 1, 0, 0, 1, 1, 0, 0], [0] * 8, [0, 1, 0, 0, 0, 0, 0, 0.0]])
    found = ppo.place_rewards(torch.tensor([0.5, 3.0, -2.0]), mask)
    assert found.nonzero().tolist() == [[0, 5], [2, 1]]
    assert found[0, 5] == 0.5 and found[2, 1] == -2.0


@pytest.mark.parametrize(
    ("gamma", "lam", "expected"),
    [
        (1.0, 0.95, [0.799675, 0.7365, 0.67, 0.6]),
        (0.99, 0.95, [0.77329, 0.718012, 0.6603, 0.6]),
        (1.0, 1.0, [0.9, 0.8, 0.7, 0.6]),
    ],
)
def test_gae_of_the_worked_episode(gamma: float, lam: float, expected: list[float]) -> None:
    found = episode_e(gamma, lam)
    close(found[0, A], expected)
    close(found[0, [2, 3]], [0, 0], 0)


def test_what_stands_at_observations_never_matters() -> None:
    wild = row(0.1, 0.2, -1e6, 1e6, 0.3, 0.4)
    found = ppo.gae(row(*E_REWARD), wild, row(*E_MASK), 0.99, 0.95)
    close(found, episode_e(0.99, 0.95), 0)


def numpy_gae(r: Any, v: Any, m: Any, gamma: float, lam: float) -> Any:
    """Backward over one row, carrying (V', Â') unchanged through the masked places."""
    out = np.zeros_like(r)
    following = advantage = 0.0
    for t in reversed(range(len(r))):
        if m[t]:
            advantage = r[t] + gamma * following - v[t] + gamma * lam * advantage
            following = v[t]
            out[t] = advantage
    return out


def test_gae_equals_the_carrying_form_on_random_rows() -> None:
    random = np.random.default_rng(0)
    shape = (40, 33)
    r, v, m = random.normal(size=shape), random.normal(size=shape), (random.random(shape) < 0.6) * 1.0
    m[7] = 0
    found = ppo.gae(torch.tensor(r), torch.tensor(v), torch.tensor(m), 0.97, 0.9)
    close(found, np.stack([numpy_gae(*rows, 0.97, 0.9) for rows in zip(r, v, m, strict=True)]), 1e-12)


def test_gae_of_a_batch_without_any_action_is_zero() -> None:
    nothing = torch.zeros(3, 4)
    assert not ppo.gae(nothing, torch.ones(3, 4), nothing, 1.0, 1.0).any()


def test_gae_with_a_critic_that_says_nothing_is_the_reward_to_go() -> None:
    found = ppo.gae(row(*E_REWARD), row(*[0] * 6), row(*E_MASK), 0.9, 1.0)
    close(found[0, A], [0.729, 0.81, 0.9, 1.0])


def test_returns_use_the_unwhitened_advantages() -> None:
    returns = (episode_e(1.0, 0.95) + row(*E_VALUE)) * row(*E_MASK)
    close(returns[0, A], [0.899675, 0.9365, 0.97, 1.0])


def test_whitening_is_unbiased_and_over_actions_only() -> None:
    x, mask = row(0.9, 0.8, 99, 99, 0.7, 0.6), row(*E_MASK)
    found = ppo.whiten(x, mask, ppo.moments(x, mask))
    close(found[0], [1.161895, 0.387298, 0, 0, -0.387298, -1.161895], 1e-5)


def test_two_ranks_whiten_like_one() -> None:
    x, mask = row(0.9, 0.8, 0.7, 0.6), row(1, 1, 1, 1)
    totals = ppo.moments(x[:, :2], mask[:, :2]) + ppo.moments(x[:, 2:], mask[:, 2:])
    ranks = [ppo.whiten(x[:, part], mask[:, part], totals) for part in (slice(0, 2), slice(2, 4))]
    close(torch.cat(ranks, 1), ppo.whiten(x, mask, ppo.moments(x, mask)), 1e-12)


def test_one_token_is_only_centred() -> None:
    x, mask = row(3.0, 5.0), row(1, 0)
    assert ppo.whiten(x, mask, ppo.moments(x, mask)).tolist() == [[0.0, 0.0]]
    nothing = row(0, 0)
    assert ppo.whiten(x, nothing, ppo.moments(x, nothing)).tolist() == [[0.0, 0.0]]


def test_equal_advantages_whiten_to_zero() -> None:
    x, mask = torch.full((3, 5), 0.7), torch.ones(3, 5)
    assert ppo.whiten(x, mask, ppo.moments(x, mask)).abs().max() < 1e-2


# --- losses ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rho", "advantage", "loss", "moves"),
    [
        (1.5, 1, -1.28, False),
        (0.5, 1, -0.5, True),
        (1.5, -1, 1.5, True),
        (0.5, -1, 0.8, False),
        (5, -1, 3, False),
    ],
)
def test_clipped_policy_loss(rho: float, advantage: float, loss: float, moves: bool) -> None:
    logprobs = torch.tensor([math.log(rho)], dtype=torch.float64, requires_grad=True)
    found = ppo.policy_loss(logprobs, torch.zeros(1), torch.tensor([float(advantage)]), 0.2, 0.28, 3.0)
    torch.autograd.backward(found.sum())
    close(found.detach(), [loss])
    assert logprobs.grad is not None and (logprobs.grad.abs().item() > 0) is moves


def test_without_dual_clip_a_negative_advantage_is_unbounded() -> None:
    rho = torch.tensor([5.0]).log()
    close(ppo.policy_loss(rho, torch.zeros(1), -torch.ones(1), 0.2, 0.28, None), [5.0], 1e-5)


def test_the_exponent_of_the_ratio_is_bounded() -> None:
    found = ppo.ratio(torch.tensor([1000.0, -1000.0]), torch.zeros(2))
    assert found.isfinite().all() and (found > 0).all()


def test_the_gradient_of_the_first_update_is_the_policy_gradient() -> None:
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    advantages = torch.tensor([0.5, -0.25])
    torch.autograd.backward(ppo.policy_loss(logprobs, logprobs.detach(), advantages, 0.2, 0.28, 3.0).sum())
    close(logprobs.grad, -advantages, 0)


def test_clipped_value_loss() -> None:
    close(ppo.value_loss(row(0.5), row(0.2), row(1.0), 0.2), [[0.18]])
    close(ppo.value_loss(row(0.3), row(0.2), row(1.0), 0.2), [[0.245]])  # inside the clip: plain ½(V-R)²


def test_kl_estimators() -> None:
    lp, ref = row(-1.0), row(-1.2)
    values = [float(ppo.KL[name](lp, ref)) for name in ("k1", "k2", "k3", "k3+")]
    close(values, [0.2, 0.02, 0.018731, 0.018731])


def test_only_k2_has_the_gradient_of_the_kl() -> None:
    probabilities, reference = torch.tensor([0.25, 0.75]).double(), torch.tensor([0.5, 0.5]).double()
    expected = {"k1": 0.0, "k2": -0.205990, "k3": -0.25, "k3+": -0.205990}
    for name, gradient in expected.items():
        logits = probabilities.log().requires_grad_()
        per_token = ppo.KL[name](logits.log_softmax(0), reference.log())
        torch.autograd.backward(
            (probabilities * per_token).sum()
        )  # expectation over tokens drawn from the policy
        assert logits.grad is not None
        close(logits.grad[0], gradient)
    exact = (probabilities * (probabilities / reference).log()).sum()
    close(exact, 0.130812)


def test_entropy() -> None:
    close(ppo.entropy(row(0, math.log(3))), [0.562335])
    close(ppo.entropy(torch.zeros(2, 7)), [math.log(7)] * 2)


def test_importance_weights_are_capped_and_detached() -> None:
    old = torch.tensor([0.0, 0.5, 1.0], requires_grad=True)
    found = ppo.importance_weight(old, torch.zeros(3), 2.0)
    close(found, [1, 1.648721, 2])
    assert not found.requires_grad
    assert ppo.importance_weight(old, torch.zeros(3), None).tolist() == [1, 1, 1]


# --- aggregation and statistics ----------------------------------------------------------------------


def test_token_mean_divides_by_the_global_count() -> None:
    losses, mask = torch.tensor([[1.0, 1.0], [3.0, 77.0]]), torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    close(ppo.token_mean(losses, mask, 3), 5 / 3)
    split = [ppo.token_mean(losses[i : i + 1], mask[i : i + 1], 3) for i in range(2)]
    close(sum(split), 5 / 3)  # a mean of the two micro-batch means would be 2


def test_token_mean_ignores_what_is_not_finite_at_masked_places() -> None:
    losses = torch.tensor([[1.0, float("nan")]])
    assert ppo.token_mean(losses, torch.tensor([[1.0, 0.0]]), 1) == 1.0
    assert ppo.token_mean(losses, torch.zeros(1, 2), 0) == 0.0


def test_mismatch_statistics() -> None:
    old = torch.tensor([[0.0, 0.01, -0.02, 5.0]], dtype=torch.float64)
    found = ppo.mismatch_stats(old, torch.zeros(1, 4), torch.tensor([[1.0, 1, 1, 0]]))
    close(found["k3"], 8.2947e-5, 1e-9)
    close([found["max"], found["mean"], found["outside"]], [0.02, 0.01, 0.0])


def test_mismatch_counts_weights_outside_of_a_tenth() -> None:
    old = torch.tensor([0.0, 0.2, -0.2, 0.05])
    found = ppo.mismatch_stats(old, torch.zeros(4), torch.ones(4))
    assert found["outside"] == 0.5
    assert ppo.mismatch_stats(old, old, torch.zeros(4))["max"] == 0.0


def test_masked_stats() -> None:
    found = ppo.masked_stats(row(1, 2, 9, 3), row(1, 1, 0, 1))
    assert found == {"mean": 2.0, "min": 1.0, "max": 3.0, "std": 1.0}
    assert ppo.masked_stats(row(1), row(0))["std"] == 0.0


def test_the_whole_loss_against_numpy() -> None:
    random = np.random.default_rng(3)
    shape = (6, 9)
    lp, old, roll, adv = (random.normal(scale=s, size=shape) for s in (0.5, 0.5, 0.5, 1.0))
    mask = (random.random(shape) < 0.7) * 1.0
    rho = np.exp(lp - old)
    clipped = np.maximum(-adv * rho, -adv * np.clip(rho, 0.8, 1.28))
    clipped = np.where(adv < 0, np.minimum(clipped, -3.0 * adv), clipped)
    weight = np.minimum(np.exp(old - roll), 2.0)
    expected = (clipped * weight * mask).sum() / mask.sum()
    t = {
        name: torch.tensor(x)
        for name, x in {"lp": lp, "old": old, "roll": roll, "adv": adv, "mask": mask}.items()
    }
    per_token = ppo.policy_loss(t["lp"], t["old"], t["adv"], 0.2, 0.28, 3.0)
    per_token = per_token * ppo.importance_weight(t["old"], t["roll"], 2.0)
    close(ppo.token_mean(per_token, t["mask"], mask.sum()), expected, 1e-12)
