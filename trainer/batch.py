"""Episodes as padded tensors, and their division into minibatches and micro-batches.

What it is
    `Batch` holds one step's episodes as [rows, tokens] tensors, padded on the right; `divide` says which
    rows go through the model together. One division serves a whole step: the log-probabilities before the
    update are computed in the same micro-batches as those during it, because the same rows in other
    company come out a few bits different, and then the first ratio would not be exactly 1.

How to use it
    batch = Batch.of(trainable(episodes, truncated="score"))
    for minibatch in divide(batch.lengths, minibatches=2, budget=16384): # one optimiser step each
        for rows in minibatch:                                           # one forward pass each
            part = batch.take(rows)

What it does not do
    No model. Where padding is follows from lengths and mask, never from ids: a pad id may well be an
    ordinary one (SmolLM2's pad is its end of sequence).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Self

import torch
from torch import Tensor

from trainer.episode import Episode, Status
from trainer.losses import totals_of
from trainer.ranks import ALONE, Ranks

MiniBatch = list[list[int]]
"""Micro-batches of one optimiser step, each a list of row numbers."""
Prompt = tuple[int, int]
"""Of a row: the number of its prompt, and how many tokens it has."""


@dataclass
class Batch:
    """One step's rows; a tensor is [rows, tokens] unless it says [rows].

    ids                token ids, padded with 0
    mask               1.0 where the policy sampled the token
    rollout            log-probabilities (nats) as the engine gave them, 0 where masked
    outcomes [rows]    reward of each episode
    lengths [rows]     tokens of each episode
    responses [rows]   tokens after the prompt, observations included
    groups [rows]      number of the prompt in the step, the same on no two ranks but for the same prompt
    status [rows]      how each episode ended: its place in `Status`
    The rest is filled in as the step goes on: `old` log-probabilities and `values` before the update,
    `reference` log-probabilities, whitened `advantages`, `returns`, and the correction's `weight`; all but
    the last 0 where masked.
    """

    ids: Tensor
    mask: Tensor
    rollout: Tensor
    outcomes: Tensor
    lengths: Tensor
    responses: Tensor
    groups: Tensor
    status: Tensor
    old: Tensor
    values: Tensor
    reference: Tensor
    advantages: Tensor
    returns: Tensor
    weight: Tensor

    @classmethod
    def of(cls, episodes: Sequence[Episode]) -> Self:
        """Pad episodes into one batch. Raises ValueError when there is none, or one is malformed."""
        if not episodes:
            raise ValueError("a batch needs at least one episode")
        for episode in episodes:
            _check(episode)
        rollout = _pad([e.logprobs for e in episodes], torch.float32)
        return cls(
            ids=_pad([e.ids for e in episodes], torch.int64),
            mask=_pad([e.mask for e in episodes], torch.float32),
            rollout=rollout,
            outcomes=torch.tensor([e.reward for e in episodes], dtype=torch.float32),
            lengths=torch.tensor([len(e.ids) for e in episodes]),
            responses=torch.tensor([e.response_length for e in episodes]),
            groups=torch.tensor([e.group for e in episodes]),
            status=torch.tensor([STATUSES.index(e.status) for e in episodes]),
            **{name: torch.zeros_like(rollout) for name in FILLED},
        )

    @classmethod
    def nothing(cls) -> Self:
        """One row of two tokens, all masked: what a rank holds that has no episode while others have some."""
        empty = Episode.start("", -1, [0, 0]).finish(status=Status.INFRA)
        return cls.of([empty])

    @property
    def prompts(self) -> list[Prompt]:
        return list(zip(self.groups.tolist(), (self.lengths - self.responses).tolist(), strict=True))

    @property
    def acting(self) -> Tensor:
        """[rows] True where there is something to learn from: any action at all."""
        return self.mask.sum(1) > 0

    def take(self, rows: Sequence[int], device: torch.device | None = None) -> Self:
        """These rows, cut to the longest of them, on `device`. No rows: `nothing`, which goes through a model
        like any other and adds 0 to every loss."""
        if not rows:
            return self.nothing().take([0], device)
        index = torch.as_tensor(rows)
        width = int(self.lengths[index].max())
        parts = {f.name: getattr(self, f.name)[index] for f in fields(self)}
        cut = {name: (x[:, :width] if x.dim() == 2 else x).to(device) for name, x in parts.items()}
        return replace(self, **cut)

    def put(self, name: str, rows: Sequence[int], part: Tensor) -> None:
        """Write what was computed for `take(rows)` back into the tensor called `name`."""
        if not rows:
            return
        getattr(self, name)[torch.as_tensor(rows), : part.shape[1]] = part.to("cpu", torch.float32)

    def drop(self, rows: Tensor) -> None:
        """Mask these rows ([rows], True) whole: they take no part in the step from now on."""
        self.mask = self.mask * ~rows[:, None]

    def totals(self, minibatch: MiniBatch) -> Tensor:
        """[2] action tokens of a whole minibatch and rows that have any: what its losses are divided by."""
        return totals_of(self.mask[[row for rows in minibatch for row in rows]])


FILLED = ("old", "values", "reference", "advantages", "returns", "weight")
STATUSES = list(Status)


def trainable(episodes: Sequence[Episode], truncated: str = "score") -> list[Episode]:
    """Episodes that carry a gradient: not lost to infrastructure, with something sampled, and not
    truncated when the configuration masks those (`truncated="mask"`)."""
    masked = {Status.TRUNCATED} if truncated == "mask" else set[Status]()
    return [e for e in episodes if e.valid and e.status not in masked and any(e.mask)]


# --- division ----------------------------------------------------------------------------------------


def divide(
    lengths: Tensor,
    minibatches: int,
    budget: int,
    packed: bool = False,
    ranks: Ranks = ALONE,
    prompts: Sequence[Prompt] = (),
) -> list[MiniBatch]:
    """Deal the rows out at random into `minibatches` of near-equal size, each into micro-batches.

    A micro-batch stays within `budget` tokens: real ones when rows are `packed` one behind the other, else
    padded ones (rows × longest), of rows of similar length. A row above the budget goes alone. With the rows'
    `prompts`, packed rows of the same one keep together, and it counts once for them. With several ranks all
    of them get as many minibatches, and in each as many micro-batches, as the one that needs most: a sharded
    model computes on all ranks or on none. Missing ones are made by splitting, then left empty.
    The order comes from torch's global generator: same state, same order.
    """
    order = torch.randperm(len(lengths)).tolist()
    parts = [part for i in range(minibatches) if (part := order[i::minibatches])]
    parts += [[]] * (int(ranks.max(torch.tensor(len(parts)))) - len(parts))
    prompts = prompts or [(row, 0) for row in range(len(lengths))]
    pack = partial(_pack_real, prompts=prompts) if packed else _pack_padded
    made = [pack(sorted(part, key=lambda row: int(lengths[row])), lengths, budget) for part in parts]
    counts: list[int] = ranks.max(torch.tensor([len(mini) for mini in made])).tolist()
    return [_spread(mini, count) for mini, count in zip(made, counts, strict=True)]


def _pack_padded(rows: list[int], lengths: Tensor, budget: int) -> MiniBatch:
    """Rows, shortest first, cut into runs within the budget."""
    packed: MiniBatch = [[]]
    for row in rows:
        if packed[-1] and (len(packed[-1]) + 1) * int(lengths[row]) > budget:
            packed.append([])
        packed[-1].append(row)
    return packed


def _pack_real(rows: list[int], lengths: Tensor, budget: int, prompts: Sequence[Prompt]) -> MiniBatch:
    """Rows with their prompt, longest first, each where it leaves the least room: few micro-batches, all of
    them full."""
    packed: MiniBatch = []
    left: list[int] = []
    for family, size in _families(rows, lengths, budget, prompts):
        fits = [i for i, room in enumerate(left) if size <= room]
        at = min(fits, key=lambda i: left[i], default=len(packed))
        if at == len(packed):
            packed.append([])
            left.append(budget)
        packed[at] += family
        left[at] -= size
    return packed or [[]]


def _families(
    rows: list[int], lengths: Tensor, budget: int, prompts: Sequence[Prompt]
) -> list[tuple[list[int], int]]:
    """Rows that share a prompt, as many together as the budget holds, and their tokens; the largest first."""
    found: list[tuple[list[int], int]] = []
    growing: dict[int, int] = {}
    for row in reversed(rows):
        number, prompt = prompts[row]
        own = int(lengths[row]) - prompt
        at = growing.get(number)
        if at is not None and found[at][1] + own <= budget:
            found[at] = ([*found[at][0], row], found[at][1] + own)
        else:
            growing[number] = len(found)
            found.append(([row], prompt + own))
    return sorted(found, key=lambda family: -family[1])


def _spread(minibatch: MiniBatch, count: int) -> MiniBatch:
    """As `count` micro-batches: the ones with most rows are halved as long as there is one to halve."""
    found = list(minibatch)
    while len(found) < count:
        at = max(range(len(found)), key=lambda i: len(found[i]))
        half = (len(found[at]) + 1) // 2
        found[at : at + 1] = [found[at][:half], found[at][half:]]
    return found


def _check(episode: Episode) -> None:
    """Ids, mask and log-probabilities speak of the same tokens, and the prompt is not trained on."""
    sizes = {len(episode.ids), len(episode.mask), len(episode.logprobs)}
    if len(sizes) != 1 or not episode.prompt_length or any(episode.mask[: episode.prompt_length]):
        raise ValueError(
            f"episode of {episode.task_id}: {len(episode.ids)} ids, {len(episode.mask)} mask places, "
            f"{len(episode.logprobs)} log-probabilities, prompt of {episode.prompt_length}; "
            "the three must be equally long and the mask 0 over a prompt that is not empty"
        )


def _pad(rows: Sequence[Sequence[float]], dtype: torch.dtype) -> Tensor:
    tensors = [torch.tensor(row, dtype=dtype) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)
