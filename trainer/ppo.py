"""The arithmetic of PPO: pure functions of tensors, each small enough to check by hand.

What it is
    Advantages, losses and statistics. Tensors are [rows, tokens] unless said otherwise; `mask` is 1.0 at
    action tokens (sampled by the policy) and 0.0 at prompt, observations and padding. Log-probabilities,
    KL and entropy are in nats. What (finite) number stands at a masked place never matters, and advantages
    are 0 there.

How to use it
    rewards = place_rewards(outcomes, mask)
    advantages = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    returns = (advantages + values) * mask
    advantages = whiten(advantages, mask, moments(advantages, mask))
    loss = token_mean(policy_loss(logprobs, old, advantages, 0.2, 0.28, 3.0), mask, count)

What it does not do
    No models, no devices, no communication: where a number is global over ranks, the function takes the
    sums, so that a caller with several ranks adds them up first. Every function is checked in
    tests/trainer/test_ppo.py against numbers worked out independently in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

# --- rewards and advantages --------------------------------------------------------------------------


def place_rewards(outcomes: Tensor, mask: Tensor) -> Tensor:
    """[rows] outcome rewards → [rows, tokens], each at its row's last action token.

    Not at the last token: an observation there would swallow or discount it. Rows without an action get 0.
    """
    position = torch.arange(mask.shape[1], device=mask.device)
    last = (mask * (position + 1)).argmax(dim=1)
    rewards = torch.zeros_like(mask)
    rewards[torch.arange(len(mask), device=mask.device), last] = outcomes.to(mask)
    return rewards * mask


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimates over the action tokens alone (arXiv 1506.02438).

    The masked places are squeezed out first: time passes when the policy acts, not while it reads, so
    neither γ nor λ decays through an observation. Returns advantages, not whitened.
    """
    order = torch.argsort(mask, dim=1, descending=True, stable=True)[:, : int(mask.sum(1).max())]
    r, v, m = (x.gather(1, order) for x in (rewards, values, mask))
    out = torch.zeros_like(r)
    advantage = value = r.new_zeros(len(r))
    for t in reversed(range(r.shape[1])):
        advantage = (r[:, t] + gamma * value - v[:, t] + gamma * lam * advantage) * m[:, t]
        value = v[:, t] * m[:, t]
        out[:, t] = advantage
    return torch.zeros_like(mask).scatter(1, order, out)


ESTIMATORS: dict[str, Callable[[Tensor, Tensor, Tensor, float, float], Tensor]] = {"gae": gae}
"""Advantage estimators by the name that `algorithm.estimator` gives them."""


def moments(x: Tensor, mask: Tensor) -> Tensor:
    """[3] in float64: count, sum and sum of squares over the mask. Ranks add theirs up before `whiten`."""
    chosen = x.double() * mask
    return torch.stack([mask.double().sum(), chosen.sum(), (chosen * x).sum()])


def whiten(x: Tensor, mask: Tensor, totals: Tensor) -> Tensor:
    """(x - μ) / √(σ² + 1e-8) with mean and unbiased variance of the *global* batch, from its `moments`.

    With one action token or none there is no variance: only centred.
    """
    count, total, squares = map(float, totals)
    mean = total / max(count, 1.0)
    if count < 2:
        return (x - mean) * mask
    variance = max(squares - count * mean * mean, 0.0) / (count - 1)
    return (x - mean) / math.sqrt(variance + 1e-8) * mask


# --- losses per token --------------------------------------------------------------------------------


def ratio(logprobs: Tensor, old: Tensor) -> Tensor:
    """π/π_old; the exponent is bounded, so that one absurd token cannot make everything infinite."""
    return (logprobs - old).clamp(-20.0, 20.0).exp()


def policy_loss(
    logprobs: Tensor, old: Tensor, advantages: Tensor, low: float, high: float, dual: float | None
) -> Tensor:
    """Clipped surrogate per token: max(-Âρ, -Â·clip(ρ, 1-low, 1+high)).

    A higher upper bound leaves room for unlikely tokens (clip-higher, arXiv 2503.14476); `dual` bounds
    the loss where Â < 0 by -dual·Â (dual clip, arXiv 1912.09729), None leaves it unbounded.
    """
    rho = ratio(logprobs, old)
    loss = torch.maximum(-advantages * rho, -advantages * rho.clamp(1 - low, 1 + high))
    if dual is None:
        return loss
    return torch.where(advantages < 0, torch.minimum(loss, -dual * advantages), loss)


def value_loss(values: Tensor, old: Tensor, returns: Tensor, clip: float) -> Tensor:
    """½·max((V-R)², (clip(V, V_old ± clip)-R)²) per token: the critic moves in small steps as well."""
    clipped = old + (values - old).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)


def kl_k1(logprobs: Tensor, reference: Tensor) -> Tensor:
    """log π - log ref: unbiased, of either sign. Its gradient as a loss is 0 on average."""
    return logprobs - reference


def kl_k2(logprobs: Tensor, reference: Tensor) -> Tensor:
    """½(log π - log ref)²: the one estimator whose gradient is that of the KL."""
    return 0.5 * (logprobs - reference) ** 2


def kl_k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """e^d - d - 1 with d = log ref - log π: unbiased, never negative (joschu.net/blog/kl-approx)."""
    difference = (reference - logprobs).clamp(-20.0, 20.0)
    return difference.exp() - difference - 1


def kl_k3_plus(logprobs: Tensor, reference: Tensor) -> Tensor:
    """The value of k3 with the gradient of k2."""
    straight = kl_k2(logprobs, reference)
    return straight - straight.detach() + kl_k3(logprobs, reference).detach()


KL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "k1": kl_k1,
    "k2": kl_k2,
    "k3": kl_k3,
    "k3+": kl_k3_plus,
}
"""KL estimators by the name that `algorithm.kl_estimator` gives them."""


def entropy(logits: Tensor) -> Tensor:
    """[..., vocabulary] → [...]: logsumexp(z) - Σ p·z."""
    return logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)


def importance_weight(old: Tensor, rollout: Tensor, cap: float | None) -> Tensor:
    """Truncated importance sampling: min(π_old / π_rollout, cap) per token, without gradient.

    The engine's policy and the trainer's differ a little; the weight corrects for it, the cap bounds its
    variance. None switches the correction off: weight 1.
    """
    if cap is None:
        return torch.ones_like(old)
    return ratio(old, rollout).clamp(max=cap).detach()


# --- aggregation and statistics ----------------------------------------------------------------------


def token_mean(per_token: Tensor, mask: Tensor, count: float | Tensor) -> Tensor:
    """Σ over the mask ÷ `count`, the *global* number of action tokens of the optimiser step.

    Summed over micro-batches (and ranks) this is the mean over all action tokens, whatever the split;
    a mean of micro-batch means would weigh the tokens of short micro-batches more. Zero when none.
    """
    return torch.where(mask > 0, per_token, 0.0).sum() / max(float(count), 1.0)


def masked_stats(x: Tensor, mask: Tensor) -> dict[str, float]:
    """mean, min, max and std (unbiased) over the mask; all 0.0 when it is empty."""
    chosen = x[mask > 0].double()
    if not len(chosen):
        return dict.fromkeys(("mean", "min", "max", "std"), 0.0)
    spread = float(chosen.std()) if len(chosen) > 1 else 0.0
    return {
        "mean": float(chosen.mean()),
        "min": float(chosen.min()),
        "max": float(chosen.max()),
        "std": spread,
    }


def mismatch_stats(old: Tensor, rollout: Tensor, mask: Tensor) -> dict[str, float]:
    """How far engine and trainer disagree about the same tokens under the same weights.

    mean and max of |Δ| in nats with Δ = old - rollout, k3 (an estimate of KL(rollout ‖ old)), and the
    share of tokens whose weight π_old/π_rollout lies outside [0.9, 1.1]. Zeros when the mask is empty.
    """
    chosen = mask > 0
    delta = (old[chosen] - rollout[chosen]).double()
    if not len(delta):
        return dict.fromkeys(("mean", "max", "k3", "outside"), 0.0)
    weight = delta.exp()
    outside = (weight < 0.9) | (weight > 1.1)
    found = {"mean": delta.abs(), "k3": weight - delta - 1, "outside": outside.double()}
    return {name: float(x.mean()) for name, x in found.items()} | {"max": float(delta.abs().max())}
