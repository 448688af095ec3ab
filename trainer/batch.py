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
from typing import Self

import torch
from torch import Tensor

from trainer.episode import Episode, Status

MiniBatch = list[list[int]]
"""Micro-batches of one optimiser step, each a list of row numbers."""


@dataclass
class Batch:
    """One step's rows; every tensor but `lengths` and `outcomes` is [rows, tokens].

    ids                token ids, padded with 0
    mask               1.0 where the policy sampled the token
    rollout            log-probabilities (nats) as the engine gave them, 0 where masked
    outcomes [rows]    reward of each episode
    lengths [rows]     tokens of each episode
    The rest is filled in as the step goes on: `old` log-probabilities and `values` before the update,
    `reference` log-probabilities, whitened `advantages`, `returns`; all 0 where masked.
    """

    ids: Tensor
    mask: Tensor
    rollout: Tensor
    outcomes: Tensor
    lengths: Tensor
    old: Tensor
    values: Tensor
    reference: Tensor
    advantages: Tensor
    returns: Tensor

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
            **{name: torch.zeros_like(rollout) for name in FILLED},
        )

    def take(self, rows: Sequence[int], device: torch.device | None = None) -> Self:
        """These rows, cut to the longest of them, on `device`."""
        index = torch.as_tensor(rows)
        width = int(self.lengths[index].max())
        parts = {f.name: getattr(self, f.name)[index] for f in fields(self)}
        cut = {name: (x[:, :width] if x.dim() == 2 else x).to(device) for name, x in parts.items()}
        return replace(self, **cut)

    def put(self, name: str, rows: Sequence[int], part: Tensor) -> None:
        """Write what was computed for `take(rows)` back into the tensor called `name`."""
        getattr(self, name)[torch.as_tensor(rows), : part.shape[1]] = part.to("cpu", torch.float32)

    def actions(self, minibatch: MiniBatch) -> float:
        """Action tokens of a whole minibatch: what its losses are divided by."""
        return float(sum(self.mask[rows].sum() for rows in minibatch))


FILLED = ("old", "values", "reference", "advantages", "returns")


def trainable(episodes: Sequence[Episode], truncated: str = "score") -> list[Episode]:
    """Episodes that carry a gradient: not lost to infrastructure, with something sampled, and not
    truncated when the configuration masks those (`truncated="mask"`)."""
    masked = {Status.TRUNCATED} if truncated == "mask" else set[Status]()
    return [e for e in episodes if e.valid and e.status not in masked and any(e.mask)]


def divide(lengths: Tensor, minibatches: int, budget: int) -> list[MiniBatch]:
    """Deal the rows out at random into `minibatches` of near-equal size, each into micro-batches.

    A micro-batch holds rows of similar length whose padded tokens (rows × longest) stay within `budget`; a
    row above the budget goes alone. The order comes from torch's global generator: same state, same order.
    """
    order = torch.randperm(len(lengths)).tolist()
    parts = [order[i::minibatches] for i in range(minibatches)]
    return [_pack(sorted(part, key=lambda row: int(lengths[row])), lengths, budget) for part in parts if part]


def _pack(rows: list[int], lengths: Tensor, budget: int) -> MiniBatch:
    """Rows, shortest first, cut into runs within the budget."""
    packed: MiniBatch = [[]]
    for row in rows:
        if packed[-1] and (len(packed[-1]) + 1) * int(lengths[row]) > budget:
            packed.append([])
        packed[-1].append(row)
    return packed


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
