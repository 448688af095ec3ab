"""One training in several processes: torchrun's ranks, sharded models, and a fair share of the work.

What it is
    Each rank plays its share of a step's prompts with an engine of its own, and computes its share of the
    update. Weights, gradients and Adam's moments are sharded over all ranks by FSDP2 (`fully_shard`), layer
    by layer: a rank holds one n-th of each and gathers a layer when it needs it. Losses, skipped steps and
    the division into minibatches are those of one process with all the episodes.

How to use it
    ranks = join(config)                              # ALONE without torchrun
    policy, critic, reference = models(config, origin, device, ranks)
    engine = engine_over(policy, origin, config, device, ranks)
    batch, division = deal(episodes, config.trainer, ranks)
    leave(ranks)

What it does not do
    No tensor, pipeline or sequence parallelism of the training; no replication (HSDP). It starts no process:
    torchrun does, and ends all of them when one dies. A rank that waits for a dead or stuck one gives up
    after `trainer.ranks_timeout`.
"""

from __future__ import annotations

import os
import types
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from trainer import lora, packing, weights
from trainer.batch import Batch, MiniBatch, divide
from trainer.engines import Engine, Sample, Sampling, open_engine
from trainer.episode import Episode
from trainer.learner import needs_critic, needs_reference
from trainer.model import Critic, blocks_of, freeze, load_policy, make_critic, recompute_blocks
from trainer.ranks import ALONE, Ranks, another_voice

if TYPE_CHECKING:
    from orchestrator.schema import Config
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
    return another_voice(Ranks(dist.get_rank(), dist.get_world_size(), None, patience))


def leave(ranks: Ranks) -> None:
    """Say goodbye. Not collective: a rank that fails leaves alone, and the others notice."""
    if ranks.size == 1:
        return
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def threads(config: Config) -> int:
    """CPU threads of this process: its share of the job's CPUs of a node, unless the configuration says."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return config.trainer.threads or max(1, config.training.cpus // processes)


def device_of(gpus: int) -> str:
    """This rank's device, as the job has it."""
    if not (gpus and torch.cuda.is_available()):
        return "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


# --- models ------------------------------------------------------------------------------------------


def shard(
    model: nn.Module, ranks: Ranks, half: bool = False, reshard: bool = True, kind: str = "cpu"
) -> nn.Module:
    """Shard `model` over all ranks, in place; every rank must hold the same weights. Collective.

    Each layer is gathered when it is computed and let go of after; without `reshard` it stays from the
    forward to the backward pass, which saves a gathering and costs its memory. With `half` layers are
    gathered and computed in bfloat16; shards, gradients and moments are float32 all the same. `kind` of
    device: cpu or cuda.
    """
    if ranks.size == 1:
        return model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    half_precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = half_precision if half else MixedPrecisionPolicy()
    mesh = init_device_mesh(kind, (ranks.size,))
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    if isinstance(model, Critic):
        fully_shard(model.head, mesh=mesh)  # one number from float32 states
    # The output layer stays in the root: it is called as often as a rank has parts of logits, and
    # ranks must gather equally often. The root lets go after each pass, or the next step's would be stale.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    gathered = types.MethodType(_work, model)
    model.gathered = gathered  # type: ignore[assignment]
    register_fsdp_forward_method(model, "gathered")
    return model


def _work(_model: nn.Module, work: Callable[[], T]) -> T:
    return work()


class Models(NamedTuple):
    """What a learner is made of."""

    policy: nn.Module
    critic: Critic | None
    reference: nn.Module | None


def models(config: Config, origin: Path, device: str, ranks: Ranks) -> Models:
    """Policy, critic and reference as the configuration wants them: adapters, packed rows, layers that are
    computed again, shards. Collective. Raises ModelError.

    The weights are read into main memory; a sharded model comes to the device layer by layer, in shards.
    """
    wanted, place = config.trainer, device if ranks.size == 1 else "cpu"
    policy = load_policy(origin, place)
    if config.model.lora_rank:
        settings = config.model
        lora.inject(policy, settings.lora_rank, settings.lora_alpha, settings.lora_targets, config.run.seed)
    if wanted.packing:
        packing.install(policy)
    critic = make_critic(policy) if needs_critic(config.algorithm) else None
    reference = _reference(config, policy, origin, place) if needs_reference(config.algorithm) else None
    half = config.model.dtype == "bfloat16"
    for model in (policy, critic, reference):
        if model is None or isinstance(model, lora.AdapterOff):
            continue
        if wanted.activation_checkpointing and model is not reference:
            recompute_blocks(model)
        shard(model, ranks, half, wanted.reshard, torch.device(device).type)
    return Models(policy, critic, reference)


def policy_alone(config: Config, folder: Path, device: str, ranks: Ranks) -> nn.Module:
    """The policy, to sample from and nothing else: frozen, in shards where there are several ranks.
    Collective. Raises ModelError."""
    policy = freeze(load_policy(folder, device if ranks.size == 1 else "cpu"))
    half = config.model.dtype == "bfloat16"
    return shard(policy, ranks, half, config.trainer.reshard, torch.device(device).type)


def _reference(config: Config, policy: nn.Module, origin: Path, device: str) -> nn.Module:
    if config.model.lora_rank:
        return lora.AdapterOff(policy)
    reference = freeze(load_policy(origin, device))
    if config.trainer.packing:
        packing.install(reference)
    return reference


# --- engines -----------------------------------------------------------------------------------------


def engine_over(policy: nn.Module, origin: Path, config: Config, device: str, ranks: Ranks) -> Engine:
    """This rank's engine over the policy. The torch engine cannot sample from shards: every token would be a
    collective call of ranks that sample different things."""
    kind = config.rollout.engine
    if ranks.size == 1 or kind != "torch":
        return open_engine(kind, policy, origin, config)
    mirror = Mirror(load_policy(origin, device))
    return Mirrored(open_engine(kind, mirror.model, origin, config), mirror, policy)


class Mirrored:
    """An engine over a whole copy of a sharded policy; implements `trainer.engines.Engine`."""

    def __init__(self, inner: Engine, mirror: Mirror, policy: nn.Module) -> None:
        self._inner, self._mirror, self._policy = inner, mirror, policy

    @property
    def version(self) -> int:
        return self._inner.version

    async def generate(self, ids: list[int], sampling: Sampling) -> Sample:
        return await self._inner.generate(ids, sampling)

    async def load(self, version: int) -> None:
        """Bring the shards together, then as the inner engine does. Collective."""
        self._mirror.refresh(self._policy)
        await self._inner.load(version)

    async def probe(self, prompt: list[int]) -> float:
        return await self._inner.probe(prompt)

    async def close(self) -> None:
        await self._inner.close()


class Mirror:
    """A whole copy of a sharded policy, for an engine that samples from a live module.

    `refresh` brings the weights over; it is collective, the copy's own forward passes are not.
    """

    def __init__(self, whole: nn.Module) -> None:
        self.model = whole.requires_grad_(False).eval()

    @torch.no_grad()
    def refresh(self, policy: nn.Module) -> None:
        mine: dict[str, Tensor] = dict(self.model.named_parameters())
        for name, tensor in weights.named_weights(policy):
            mine[name].copy_(tensor)


# --- work --------------------------------------------------------------------------------------------


def share(count: int, ranks: Ranks) -> range:
    """Which of `count` prompts this rank plays: a run of them, near-equal ones for all ranks."""
    return range(count * ranks.rank // ranks.size, count * (ranks.rank + 1) // ranks.size)


def deal(episodes: Sequence[Episode], wanted: Trainer, ranks: Ranks = ALONE) -> tuple[Batch, list[MiniBatch]]:
    """This rank's rows of the step and their division. Collective.

    `episodes` are all ranks', the same on each, at least one. Every minibatch holds the rows that it would in
    one process. Within it, rows go to ranks by length, so that all have about as many tokens, wherever they
    were played. Torch's generator moves on all ranks alike.
    """
    if ranks.size == 1:
        batch = Batch.of(episodes)
        sizes = wanted.minibatches, wanted.micro_batch_tokens
        return batch, divide(batch.lengths, *sizes, wanted.packing, prompts=batch.prompts)
    order = torch.randperm(len(episodes)).tolist()
    mine: list[Episode] = []
    division: list[MiniBatch] = []
    for number in range(min(wanted.minibatches, len(order))):
        lengths = {row: len(episodes[row].ids) for row in order[number :: wanted.minibatches]}
        rows = by_length(lengths, ranks.size)[ranks.rank]
        taken = [episodes[row] for row in rows]
        division.append(_divided(taken, len(mine), wanted.micro_batch_tokens, wanted.packing, ranks))
        mine += taken
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


def _divided(episodes: Sequence[Episode], start: int, budget: int, packed: bool, ranks: Ranks) -> MiniBatch:
    """One minibatch's micro-batches on this rank, as row numbers from `start` on."""
    with torch.random.fork_rng(devices=[]):  # ranks draw differently many numbers here
        sizes = torch.tensor([len(one.ids) for one in episodes], dtype=torch.int64)
        prompts = [(one.group, one.prompt_length) for one in episodes]
        (found,) = divide(sizes, 1, budget, packed, ranks, prompts)
    return [[start + row for row in micro] for micro in found]
