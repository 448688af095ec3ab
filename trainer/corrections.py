"""Corrections for samples that are not quite the trainer's own: pure functions of tensors.

What it is
    The engine that sampled and the trainer that learns compute the same policy with other kernels, and in
    asynchronous training with other weights. The ratio w = π_old / π_rollout of a token, or of a whole row,
    says by how much; the loss is multiplied by a truncated w, or parts of it are dropped.

How to use it
    weight = importance_weight(old, rollout, cap=2.0)                       # truncated: TIS
    weight = correction(old, rollout, mask, Correction(cap=2.0, mask="token", low=0.5, high=2.0))

What it does not do
    Weights carry no gradient, and what is dropped still counts in the denominators: a loss with fewer tokens
    in it is smaller, not noisier.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.losses import ratio


@dataclass(frozen=True)
class Correction:
    """As `algorithm.importance_*` say: the weight's level and cap, and what is dropped outside of a band."""

    cap: float | None = 2.0
    weight: str = "token"
    mask: str = "none"
    low: float = 0.5
    high: float = 2.0


def importance_weight(old: Tensor, rollout: Tensor, cap: float | None) -> Tensor:
    """Truncated importance sampling: min(π_old / π_rollout, cap) per token, without gradient.

    The cap bounds the variance (truncated importance sampling; yaof20/Flash-RL). None switches the correction
    off: weight 1.
    """
    if cap is None:
        return torch.ones_like(old)
    return ratio(old, rollout).clamp(max=cap).detach()


def row_ratio(old: Tensor, rollout: Tensor, mask: Tensor, how: str) -> Tensor:
    """[rows, tokens] → [rows, 1]: the `product` of a row's token ratios, or their `geometric` mean.

    The product is the true ratio of the sequence and grows with its length; the geometric mean does not
    (GSPO, arXiv 2507.18071). The exponent is bounded. A row without an action has 1.
    """
    delta = torch.where(mask > 0, old - rollout, 0.0).sum(1, keepdim=True)
    if how == "geometric":
        delta = delta / mask.sum(1, keepdim=True).clamp(min=1.0)
    return delta.clamp(-20.0, 20.0).exp().detach()


def levelled(old: Tensor, rollout: Tensor, mask: Tensor, how: str) -> Tensor:
    """π_old / π_rollout by `token`, or of the row by `product` or `geometric`; [rows, tokens]."""
    if how == "token":
        return ratio(old, rollout).detach()
    return row_ratio(old, rollout, mask, how).expand_as(old)


def band(weight: Tensor, low: float, high: float) -> Tensor:
    """1 where low ≤ w ≤ high, else 0. Times w per token this is IcePop (arXiv 2510.18855)."""
    return ((weight >= low) & (weight <= high)).to(weight.dtype)


def correction(old: Tensor, rollout: Tensor, mask: Tensor, wanted: Correction) -> Tensor:
    """What each token's loss is multiplied by, [rows, tokens], without gradient."""
    weight = torch.ones_like(old)
    if wanted.cap is not None:
        weight = levelled(old, rollout, mask, wanted.weight).clamp(max=wanted.cap)
    if wanted.mask != "none":
        weight = weight * band(levelled(old, rollout, mask, wanted.mask), wanted.low, wanted.high)
    return weight
