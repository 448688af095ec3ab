"""AdamW steps that are safe: clipped to a global norm, and skipped when a gradient is not finite.

How to use it
    optimizer = adamw(model.parameters(), lr=6e-4, weight_decay=0.0, eps=1e-8)
    set_rate(optimizer, 6e-4 * share_of_rate(step, steps, "linear", warmup=5, floor=0.1))
    norm, moved = step(optimizer, squared_norm(optimizer), max_norm=1.0)

What it does not do
    `step` does not communicate: with several ranks all of them must give it the same
    `squares`, so that all clip alike and, when one has a gradient that is not finite, all of them skip.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer


def adamw(parameters: Iterable[nn.Parameter], lr: float, weight_decay: float, eps: float) -> AdamW:
    """AdamW over all parameters that learn (arXiv 1711.05101), the update fused into one kernel."""
    learning = [p for p in parameters if p.requires_grad]
    return AdamW(learning, lr=lr, weight_decay=weight_decay, eps=eps, fused=True)


def share_of_rate(step: int, steps: int, schedule: str, warmup: int, floor: float) -> float:
    """What step `step` (from 0) of `steps` has of the full learning rate, between 0 and 1.

    Equal parts up to 1 over the first `warmup` steps; then to `floor` at the last one, on a line or on half a
    cosine wave (arXiv 1608.03983, without restarts). It depends on nothing else, so a resumed run has it too.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    done = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
    left = 1 - done if schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return floor + (1 - floor) * left


def set_rate(optimizer: Optimizer, lr: float) -> None:
    """For all parameters, from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    """Every parameter of an optimiser, in its own order."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def squared_norm(optimizer: Optimizer) -> Tensor:
    """Σ g² over all gradients, a scalar in float32; of a sharded model over all its shards (collective)."""
    gradients = [p.grad for p in parameters(optimizer) if p.grad is not None]
    norm: Any = torch.nn.utils.get_total_norm(gradients)
    whole: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return whole.float() ** 2


def _gradients(optimizer: Optimizer) -> list[Tensor]:
    """What this process holds of each gradient."""
    found: list[Any] = [p.grad for p in parameters(optimizer) if p.grad is not None]
    return [g.to_local() if hasattr(g, "to_local") else g for g in found]


def step(optimizer: Optimizer, squares: Tensor, max_norm: float) -> tuple[float, bool]:
    """Clip to `max_norm`, step, clear the gradients. Returns the norm before clipping and whether it moved.

    `squares` is the global `squared_norm`. When it is not finite nothing moves, Adam's moments included.
    """
    norm = math.sqrt(total) if math.isfinite(total := float(squares)) else total
    moved = math.isfinite(norm)
    if moved:
        scale = (max_norm / (torch.tensor(norm) + 1e-6)).clamp(max=1.0)
        for gradient in _gradients(optimizer):
            gradient.mul_(scale.to(gradient.device))
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, moved
