"""AdamW steps that are safe: clipped to a global norm, and skipped when a gradient is not finite.

How to use it
    optimizer = adamw(model.parameters(), lr=6e-4, weight_decay=0.0, eps=1e-8)
    norm, moved = step(optimizer, squared_norm(optimizer), max_norm=1.0)

What it does not do
    No schedule and no communication: with several ranks, add up `squared_norm` over them before `step`, so
    that all of them clip alike and, when one has a gradient that is not finite, all of them skip.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer


def adamw(parameters: Iterable[nn.Parameter], lr: float, weight_decay: float, eps: float) -> AdamW:
    """AdamW over all parameters (arXiv 1711.05101), the update fused into one kernel."""
    return AdamW(parameters, lr=lr, weight_decay=weight_decay, eps=eps, fused=True)


def parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    """Every parameter of an optimiser, in its own order."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def squared_norm(optimizer: Optimizer) -> Tensor:
    """Σ g² over all gradients, a scalar in float32."""
    gradients = [p.grad for p in parameters(optimizer) if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients).float() ** 2


def step(optimizer: Optimizer, squares: Tensor, max_norm: float) -> tuple[float, bool]:
    """Clip to `max_norm`, step, clear the gradients. Returns the norm before clipping and whether it moved.

    `squares` is the global `squared_norm`. When it is not finite nothing moves, Adam's moments included.
    """
    norm = math.sqrt(total) if math.isfinite(total := float(squares)) else total
    moved = math.isfinite(norm)
    if moved:
        nn.utils.clip_grads_with_norm_(parameters(optimizer), max_norm, torch.tensor(norm))
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, moved
