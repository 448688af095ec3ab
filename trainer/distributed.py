"""One training in several processes: torchrun's ranks, sharded models, and a fair share of the work.

What it is
    Each rank plays its share of a step's prompts with an engine of its own, and computes its share of the
    update. Weights, gradients and Adam's moments are sharded over all ranks by FSDP2 (`fully_shard`), layer
    by layer: a rank holds one n-th of each and gathers a layer when it needs it. Losses, skipped steps and
    the division into minibatches are those of one process with all the episodes.

How to use it
    ranks = join(config)                              # ALONE without torchrun
    policy = shard(policy, ranks, half=True)          # before its optimiser is made
    batch, division = deal(episodes, config.trainer, ranks)
    leave(ranks)

What it does not do
    No tensor, pipeline or sequence parallelism of the training; no replication (HSDP). It starts no process:
    torchrun does, and ends all of them when one dies. A rank that waits for a dead or stuck one gives up
    after `trainer.ranks_timeout`.
"""

from __future__ import annotations

import copy
import os
import types
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from trainer import weights
from trainer.batch import Batch, MiniBatch, divide
from trainer.episode import Episode
from trainer.model import Critic, blocks_of
from trainer.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from orchestrator.schema_training import Trainer

T = TypeVar("T")

# --- ranks -------------------------------------------------------------------------------------------


def join(timeout_s: float) -> Ranks:
    """Meet the other processes that torchrun has started. Collective; ALONE when there are none."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    import torch.distributed as dist

    patience = timedelta(seconds=timeout_s)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=patience)
    # A group of its own: what ranks say to each other never mixes with the traffic of the sharded models.
    voice = dist.new_group(backend="gloo", timeout=patience)
    return Ranks(dist.get_rank(), dist.get_world_size(), voice)


def leave(ranks: Ranks) -> None:
    """Say goodbye. Not collective: a rank that fails leaves alone, and the others notice."""
    if ranks.size == 1:
        return
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def device_of(gpus: int) -> str:
    """This rank's device, as the job has it."""
    if not (gpus and torch.cuda.is_available()):
        return "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


# --- models ------------------------------------------------------------------------------------------


def shard(model: nn.Module, ranks: Ranks, half: bool = False, reshard: bool = True) -> nn.Module:
    """Shard `model` over all ranks, in place; every rank must hold the same weights. Collective.

    Each layer is gathered when it is computed and let go of after; without `reshard` it stays from the
    forward to the backward pass, which saves a gathering and costs its memory. With `half` layers are
    gathered and computed in bfloat16; shards, gradients and moments are float32 all the same.
    """
    if ranks.size == 1:
        return model
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    half_precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = half_precision if half else MixedPrecisionPolicy()
    for block in blocks_of(model):
        fully_shard(block, mp_policy=policy, reshard_after_forward=reshard)
    if isinstance(model, Critic):
        fully_shard(model.head)  # one number from float32 states
    # The output layer stays in the root: it is called as often as a rank has parts of logits, and
    # ranks must gather equally often. The root lets go after each pass, or the next step's would be stale.
    fully_shard(model, mp_policy=policy, reshard_after_forward=True)
    gathered = types.MethodType(_work, model)
    model.gathered = gathered  # type: ignore[assignment]
    register_fsdp_forward_method(model, "gathered")
    return model


def _work(_model: nn.Module, work: Callable[[], T]) -> T:
    return work()


class Mirror:
    """A whole copy of a sharded policy, for an engine that samples from a live module.

    `refresh` brings the weights over; it is collective, the copy's own forward passes are not.
    """

    def __init__(self, whole: nn.Module) -> None:
        self.model = copy.deepcopy(whole).requires_grad_(False).eval()

    @torch.no_grad()
    def refresh(self, policy: nn.Module) -> None:
        mine: dict[str, Tensor] = dict(self.model.named_parameters())
        for name, tensor in weights.named_weights(policy):
            mine[name].copy_(tensor)


# --- work --------------------------------------------------------------------------------------------


def share(count: int, ranks: Ranks) -> range:
    """Which of `count` prompts this rank plays: a run of them, near-equal ones for all ranks."""
    return range(count * ranks.rank // ranks.size, count * (ranks.rank + 1) // ranks.size)


def deal(
    episodes: Sequence[Episode], wanted: Trainer, ranks: Ranks, packed: bool = False
) -> tuple[Batch, list[MiniBatch]] | None:
    """This rank's rows of the step and their division; None when no rank has any episode. Collective.

    Every minibatch holds the rows that it would in one process. Within it, rows go to ranks by length, so
    that all have about as many tokens, wherever they were played. Torch's generator moves on all ranks alike.
    """
    if ranks.size == 1:
        if not episodes:
            return None
        batch = Batch.of(episodes)
        return batch, divide(batch.lengths, wanted.minibatches, wanted.micro_batch_tokens, packed)
    everybody = [episode for part in ranks.gather_objects(list(episodes)) for episode in part]
    if not everybody:
        return None
    order = torch.randperm(len(everybody)).tolist()
    mine: list[Episode] = []
    division: list[MiniBatch] = []
    for number in range(min(wanted.minibatches, len(order))):
        lengths = {row: len(everybody[row].ids) for row in order[number :: wanted.minibatches]}
        rows = by_length(lengths, ranks.size)[ranks.rank]
        division.append(_divided(rows, lengths, len(mine), wanted.micro_batch_tokens, packed, ranks))
        mine += [everybody[row] for row in rows]
    return Batch.of(mine) if mine else Batch.nothing(), division


def by_length(lengths: dict[int, int], ranks: int) -> list[list[int]]:
    """Rows for each rank: the longest first, each to the rank that has the fewest tokens so far."""
    found: list[list[int]] = [[] for _ in range(ranks)]
    tokens = [0] * ranks
    for row in sorted(lengths, key=lambda row: (-lengths[row], row)):
        rank = min(range(ranks), key=lambda rank: (tokens[rank], rank))
        found[rank].append(row)
        tokens[rank] += lengths[row]
    return [sorted(rows) for rows in found]


def _divided(
    rows: list[int], lengths: dict[int, int], start: int, budget: int, packed: bool, ranks: Ranks
) -> MiniBatch:
    """One minibatch's micro-batches on this rank, as row numbers from `start` on."""
    with torch.random.fork_rng(devices=[]):  # ranks draw differently many numbers here
        sizes = torch.tensor([lengths[row] for row in rows], dtype=torch.int64)
        (found,) = divide(sizes, 1, budget, packed, ranks)
    return [[start + row for row in micro] for micro in found]
