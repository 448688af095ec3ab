"""Numbers for the log: masked means, extremes and mismatch, the same whatever the split over ranks.

What it is
    `Tally` adds up scalars over micro-batches without waiting for the device, and over ranks in one call.
    `masked_stats` and `mismatch_stats` describe one tensor.

How to use it
    tally = Tally(); tally.add({"clipped": share}, highs={"ratio_max": largest}); row = tally.close(ranks)
    row |= masked_stats(values, mask, ranks)

What it does not do
    It decides nothing: alarms are in `trainer.metrics`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from trainer.ranks import ALONE, Ranks

Numbers = dict[str, float]
Scalars = Mapping[str, Tensor]


@dataclass
class Tally:
    """Sums, maxima and minima by name. Every rank must add the same names in the same order."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    highs: dict[str, Tensor] = field(default_factory=dict)
    lows: dict[str, Tensor] = field(default_factory=dict)

    def add(
        self, sums: Scalars, highs: Scalars = MappingProxyType({}), lows: Scalars = MappingProxyType({})
    ) -> None:
        """Scalars of one micro-batch."""
        for mine, new, join in (
            (self.sums, sums, torch.add),
            (self.highs, highs, torch.maximum),
            (self.lows, lows, torch.minimum),
        ):
            for name, x in new.items():
                x = x.detach().double()
                mine[name] = join(mine[name], x) if name in mine else x

    def close(self, ranks: Ranks = ALONE) -> Numbers:
        """The numbers over all micro-batches and ranks."""
        ends = {name: -x for name, x in self.lows.items()} | self.highs
        found = _over(self.sums, ranks.sum) | _over(ends, ranks.max)
        return found | {name: -found[name] for name in self.lows}


def _over(numbers: dict[str, Tensor], reduce: Callable[[Tensor], Tensor]) -> Numbers:
    if not numbers:
        return {}
    return dict(zip(numbers, reduce(torch.stack([*numbers.values()])).tolist(), strict=True))


def peak(x: Tensor, mask: Tensor) -> Tensor:
    """The largest over the mask, a scalar; -∞ when it is empty. The smallest is `-peak(-x, mask)`."""
    return torch.where(mask > 0, x, -torch.inf).amax()


def masked_stats(x: Tensor, mask: Tensor, ranks: Ranks = ALONE) -> Numbers:
    """mean, min, max and std (unbiased) over the mask and all ranks; all 0.0 when it is empty."""
    chosen = x[mask > 0].double()
    count, total = ranks.sum(torch.stack([chosen.new_tensor(len(chosen)), chosen.sum()])).tolist()
    if not count:
        return dict.fromkeys(("mean", "min", "max", "std"), 0.0)
    mean = total / count
    squares = float(ranks.sum(((chosen - mean) ** 2).sum()))
    ends = torch.stack([chosen.amax(), -chosen.amin()]) if len(chosen) else chosen.new_full((2,), -torch.inf)
    high, low = ranks.max(ends).tolist()
    return {"mean": mean, "min": -low, "max": high, "std": (squares / max(count - 1, 1)) ** 0.5}


def mismatch_stats(old: Tensor, rollout: Tensor, mask: Tensor, ranks: Ranks = ALONE) -> Numbers:
    """How far engine and trainer disagree about the same tokens under the same weights.

    mean and max of |Δ| in nats with Δ = old - rollout, k3 (an estimate of KL(rollout ‖ old)), and the
    share of tokens whose weight π_old/π_rollout lies outside [0.9, 1.1]. Zeros when the mask is empty.
    """
    tally = Tally()
    tally.add({"count": mask.sum(), **mismatch_sums(old, rollout, mask)}, mismatch_peak(old, rollout, mask))
    found = tally.close(ranks)
    count = max(found.pop("count"), 1.0)
    return {"max": found.pop("max")} | {name: total / count for name, total in found.items()}


def mismatch_sums(old: Tensor, rollout: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Σ over the mask of |Δ|, of k3 and of being outside [0.9, 1.1]; scalars in float64."""
    delta = torch.where(mask > 0, (old - rollout).double(), 0.0)
    weight = delta.exp()
    outside = ((weight < 0.9) | (weight > 1.1)).double()
    return {"mean": delta.abs().sum(), "k3": (weight - delta - 1).sum(), "outside": outside.sum()}


def mismatch_peak(old: Tensor, rollout: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """The largest |Δ| over the mask; a scalar in float64."""
    return {"max": torch.where(mask > 0, (old - rollout).double().abs(), 0.0).amax()}
