"""pass@k: how likely it is that at least one of k samples solves a task.

What it is
    Pure functions. `pass_at_k` is the unbiased estimator of Chen et al. 2021 (arXiv 2107.03374, equation 1):
    of n samples c solve the task, so of all subsets of k samples the share 1 − C(n−c, k) / C(n, k) holds one
    that does. `over_tasks` is its mean over tasks, with the standard error of that mean.

How to use it
    pass_at_k(8, 2, 4)                              # 0.786
    over_tasks([Counted("t1", 8, 2), ...], [1, 4, 8])

What it does not do
    It plays nothing and reads nothing (`trainer.evaluate`). Samples that infrastructure lost are not
    counted; a task with fewer than k samples left takes no part in pass@k.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import NamedTuple

Estimate = dict[str, float | None]
"""`value`, `stderr` (null of fewer than two tasks), `tasks` that took part."""


class Counted(NamedTuple):
    """What came of one task: so many samples were judged, so many of them solve it."""

    task: str
    samples: int
    successes: int


def pass_at_k(samples: int, successes: int, k: int) -> float:
    """Of one task, exact to the last bit. Raises ValueError where that is no number: k > samples, say."""
    if not (0 <= successes <= samples and 1 <= k <= samples):
        raise ValueError(f"pass@{k} of {successes} successes in {samples} samples: there is no such number")
    every = math.comb(samples, k)
    return (every - math.comb(samples - successes, k)) / every


def over_tasks(counted: Sequence[Counted], ks: Sequence[int]) -> dict[str, Estimate]:
    """By k, as text, for JSON has no other names. A k that no task has enough samples for has no value."""
    return {
        str(k): _over([pass_at_k(one.samples, one.successes, k) for one in counted if one.samples >= k])
        for k in ks
    }


def _over(values: Sequence[float]) -> Estimate:
    """The tasks are the sample: the error says how the mean would move with other tasks of their kind."""
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"value": fmean(values) if values else None, "stderr": error, "tasks": len(values)}
