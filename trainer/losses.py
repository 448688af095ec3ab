"""Losses per token and how they become one number: pure functions of tensors.

What it is
    The clipped surrogate, the critic's loss, estimators of the KL, the entropy; and aggregation over tokens,
    rows, micro-batches and ranks. Tensors are [rows, tokens] unless said otherwise; log-probabilities, KL and
    entropy are in nats.

How to use it
    totals = ranks.sum(totals_of(mask))                      # of a whole optimiser step, over all ranks
    per_token = policy_loss(logprobs, old, advantages, 0.2, 0.28, 3.0)
    loss = aggregate(per_token, mask, "token-mean", totals)  # micro-batches and ranks *add* these up

What it does not do
    No model and no communication. Gradients that are averaged over ranks, as data parallelism does, must be
    multiplied by their number: what is right is the sum (`trainer.learner` does).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# --- per token ---------------------------------------------------------------------------------------


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


def clipped_tokens(
    rho: Tensor, advantages: Tensor, low: float, high: float, dual: float | None
) -> dict[str, Tensor]:
    """Where a clip took the gradient away: 1.0 at those tokens, by the clip that did it."""
    down, up = advantages < 0, advantages > 0
    dual_hit = down & (rho > dual) if dual is not None else torch.zeros_like(down)
    found = {"low": down & (rho < 1 - low), "high": up & (rho > 1 + high), "dual": dual_hit}
    return {f"clipped_{name}": hit.to(rho.dtype) for name, hit in found.items()}


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


# --- aggregation -------------------------------------------------------------------------------------

AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "constant")


def totals_of(mask: Tensor) -> Tensor:
    """[2] in float64: action tokens, and rows that have any. Micro-batches and ranks add theirs up."""
    return torch.stack([mask.double().sum(), (mask.sum(1) > 0).double().sum()])


def aggregate(per_token: Tensor, mask: Tensor, how: str, totals: Tensor, constant: float = 1.0) -> Tensor:
    """This part's share of the loss of an optimiser step whose `totals_of`, over all ranks, are given.

    token-mean            Σ L ÷ tokens
    seq-mean-token-mean   Σ over rows of the row's mean ÷ rows
    seq-mean-token-sum    Σ L ÷ rows
    constant              Σ L ÷ (rows · constant), as Dr. GRPO has it (arXiv 2503.20783)
    Added up over micro-batches and ranks it is the whole, whatever the split: a mean of micro-batch means
    would weigh the tokens of short micro-batches more. What is not finite at masked places does not matter.
    """
    tokens, rows = map(float, totals)
    chosen = torch.where(mask > 0, per_token, 0.0)
    if how == "seq-mean-token-mean":
        chosen = chosen / mask.sum(1, keepdim=True).clamp(min=1.0)
    divisor = {"token-mean": tokens, "constant": rows * constant}.get(how, rows)
    return chosen.sum() / (divisor if divisor > 0 else 1.0)


def token_mean(per_token: Tensor, mask: Tensor, count: float | Tensor) -> Tensor:
    """Σ over the mask ÷ `count`, the *global* number of action tokens of the optimiser step; 0 when none."""
    return torch.where(mask > 0, per_token, 0.0).sum() / max(float(count), 1.0)
