"""From rewards to advantages: pure functions of tensors, each small enough to check by hand.

What it is
    Estimators of two kinds. One spreads rewards over the tokens of a row ([rows, tokens] → [rows, tokens]);
    the other compares whole rows of one prompt ([rows] scores and groups → [rows]). `mask` is 1.0 at action
    tokens (sampled by the policy) and 0.0 at prompt, observations and padding; what (finite) number stands at
    a masked place never matters, and advantages are 0 there. A row without any action is not there at all:
    it is in no mean.

How to use it
    rewards = place_rewards(outcomes, mask)
    advantages = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    advantages = whiten(advantages, mask, moments(advantages, mask))
    advantages = grpo(scores, groups)[:, None] * mask

What it does not do
    No communication, but for `everywhere` and the `Estimator`s: other group functions are given the rows of
    all ranks, `whiten` the summed moments. Every function is checked in tests/trainer/test_advantages.py
    against numbers worked out independently.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.ranks import ALONE, Ranks

PER_TOKEN = Callable[[Tensor, Tensor, Tensor, float, float], Tensor]
PER_ROW = Callable[[Tensor, Tensor], Tensor]

# --- rewards -----------------------------------------------------------------------------------------


def place_rewards(outcomes: Tensor, mask: Tensor) -> Tensor:
    """[rows] outcome rewards → [rows, tokens], each at its row's last action token.

    Not at the last token: an observation there would swallow or discount it. Rows without an action get 0.
    """
    position = torch.arange(mask.shape[1], device=mask.device)
    last = (mask * (position + 1)).argmax(dim=1)
    rewards = torch.zeros_like(mask)
    rewards[torch.arange(len(mask), device=mask.device), last] = outcomes.to(mask)
    return rewards * mask


def length_penalty(lengths: Tensor, limit: int, cache: int) -> Tensor:
    """[rows] response lengths → [rows]: 0 up to `limit - cache`, then straight down to -1 at `limit`.

    The soft overlong punishment of DAPO (arXiv 2503.14476, equation 13).
    """
    return ((limit - cache - lengths.float()) / cache).clamp(-1.0, 0.0)


# --- per token ---------------------------------------------------------------------------------------


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


def reward_to_go(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """Σ γ^k r over the action tokens from here on: REINFORCE++ (arXiv 2501.03262) before whitening.

    That is GAE of a critic that says nothing at λ = 1; `values` and `lam` are not looked at.
    """
    return gae(rewards, torch.zeros_like(rewards), mask, gamma, 1.0)


# --- per row, within groups --------------------------------------------------------------------------


@dataclass(frozen=True)
class Groups:
    """Rows put together by prompt: for each row how many its group has, their mean, and the difference."""

    size: Tensor
    mean: Tensor
    centred: Tensor
    index: Tensor

    @classmethod
    def of(cls, scores: Tensor, groups: Tensor) -> Groups:
        """scores [rows], groups [rows] (any numbers, equal for rows of one prompt), in float64."""
        scores = scores.double()
        index, count = numbered(groups)
        mean = (_add(scores, index, len(count)) / count)[index]
        return cls(count[index].double(), mean, scores - mean, index)

    def std(self) -> Tensor:
        """[rows] unbiased standard deviation of each row's group; 0 where it is alone."""
        squares = _add(self.centred**2, self.index, int(self.index.max()) + 1)[self.index]
        return (squares / (self.size - 1).clamp(min=1)).sqrt()


def numbered(groups: Tensor) -> tuple[Tensor, Tensor]:
    """[rows] each row's group counted from 0, and [groups] how many rows each has."""
    found: tuple[Tensor, Tensor, Tensor] = torch.unique(groups, return_inverse=True, return_counts=True)
    return found[1], found[2]


def _add(x: Tensor, index: Tensor, size: int) -> Tensor:
    return x.new_zeros(size).index_add(0, index, x)


def grpo(scores: Tensor, groups: Tensor) -> Tensor:
    """(R - mean) / (std + 1e-6) within the group, unbiased std (arXiv 2402.03300). Alone in its group: 0."""
    found = Groups.of(scores, groups)
    return (_nothing_where_equal(found, scores) / (found.std() + 1e-6)).to(scores)


def dr_grpo(scores: Tensor, groups: Tensor) -> Tensor:
    """R - mean of the group, without the division that favours easy and hard prompts (arXiv 2503.20783)."""
    return _nothing_where_equal(Groups.of(scores, groups), scores).to(scores)


def rloo(scores: Tensor, groups: Tensor) -> Tensor:
    """R less the mean of the *others* of the group, that is (R - mean)·n/(n - 1) (arXiv 2402.14740)."""
    found = Groups.of(scores, groups)
    factor = torch.where(found.size > 1, found.size / (found.size - 1).clamp(min=1), 0.0)
    return (_nothing_where_equal(found, scores) * factor).to(scores)


def _nothing_where_equal(found: Groups, scores: Tensor) -> Tensor:
    """R - mean, exactly 0 in a group of equal scores, where rounding would leave a crumb."""
    return torch.where(spread(scores, found.index) > 0, found.centred, 0.0)


def spread(scores: Tensor, groups: Tensor) -> Tensor:
    """[rows] largest less smallest score of each row's group; 0: nothing can be learned from comparing."""
    index, count = numbered(groups)
    high = scores.new_zeros(len(count)).scatter_reduce(0, index, scores, "amax", include_self=False)
    low = scores.new_zeros(len(count)).scatter_reduce(0, index, scores, "amin", include_self=False)
    return (high - low)[index]


def group_sizes(groups: Tensor) -> Tensor:
    """[rows] how many rows each row's group has."""
    index, count = numbered(groups)
    return count[index]


def group_stats(scores: Tensor, groups: Tensor) -> dict[str, float]:
    """How many groups there are, and which share of those with two rows or more has equal scores."""
    sizes, flat = group_sizes(groups), spread(scores, groups) == 0
    several = sizes > 1  # a row counts 1/size, so that every group counts 1
    share = (1.0 / sizes.double())[several]
    count = float(share.sum())
    uniform = float(share[flat[several]].sum()) / count if count else 0.0
    return {
        "groups/count": float(len(numbered(groups)[1])),
        "groups/alone": float((~several).sum()),
        "groups/flat": uniform,
    }


def everywhere(x: Tensor, ranks: Ranks = ALONE) -> tuple[Tensor, slice]:
    """[rows] of this rank → those of all ranks one after the other, on the CPU, and where our own are."""
    parts = [torch.tensor(part, dtype=x.dtype) for part in ranks.gather_objects(x.tolist())]
    start = sum(map(len, parts[: ranks.rank]))
    return torch.cat(parts), slice(start, start + len(x))


@dataclass(frozen=True)
class GroupReport:
    """Which rows of this rank have no other of their prompt on any rank, and numbers for the log."""

    alone: Tensor
    numbers: dict[str, float]

    @classmethod
    def of(cls, scores: Tensor, groups: Tensor, acting: Tensor, ranks: Ranks = ALONE) -> GroupReport:
        """[rows] each; rows that do not act are in no group."""
        (every, _), (there, mine) = everywhere(scores[acting], ranks), everywhere(groups[acting], ranks)
        alone = torch.zeros_like(acting)
        alone[acting] = (group_sizes(there) < 2)[mine].to(acting.device)
        return cls(alone, group_stats(every, there))


# --- all of them -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimator:
    """One of `per_token` and `per_row`; `critic`: values are learned; `whiten` unless told otherwise."""

    per_token: PER_TOKEN | None = None
    per_row: PER_ROW | None = None
    critic: bool = False
    whiten: bool = False

    def __call__(
        self,
        rewards: Tensor,
        values: Tensor,
        mask: Tensor,
        groups: Tensor,
        gamma: float,
        lam: float,
        ranks: Ranks = ALONE,
    ) -> Tensor:
        """Advantages [rows, tokens], not whitened. A row's score is the sum of its rewards."""
        if self.per_row is None:
            assert self.per_token is not None
            return self.per_token(rewards, values, mask, gamma, lam)
        found, there = rewards.new_zeros(len(rewards)), mask.sum(1) > 0
        scores, mine = everywhere((rewards * mask).sum(1)[there], ranks)
        if len(scores):
            found[there] = self.per_row(scores, everywhere(groups[there], ranks)[0])[mine].to(found)
        return found[:, None] * mask


ESTIMATORS: dict[str, Estimator] = {
    "gae": Estimator(per_token=gae, critic=True, whiten=True),
    "reinforce++": Estimator(per_token=reward_to_go, whiten=True),
    "reinforce++-baseline": Estimator(per_row=dr_grpo, whiten=True),
    "grpo": Estimator(per_row=grpo),
    "dr-grpo": Estimator(per_row=dr_grpo),
    "rloo": Estimator(per_row=rloo),
}
"""Advantage estimators by the name that `algorithm.estimator` gives them."""

# --- whitening ---------------------------------------------------------------------------------------


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
