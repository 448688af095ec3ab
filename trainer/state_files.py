"""A learner's tensors in a directory and back, by torch.distributed.checkpoint, in safetensors.

What it is
    Critic, adapters and Adam's moments under plain names (`critic.head.weight`,
    `policy_optimizer.model.norm.weight.exp_avg`). Each rank writes what it holds, and reads what it will
    hold, whatever number of ranks has written: one process reads what eight wrote, and the other way round.
    The policy itself lies beside, as Hugging Face saves it, and is read in slices as well.

How to use it
    state = learner_state(learner)
    write_state(state, folder, ranks)              # collective
    read_policy(learner.policy, folder, ranks); read_state(learner, folder, ranks)

What it does not do
    No atomicity and no pruning (`trainer.checkpoint`). No pickle: the tables of contents are in the files.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from trainer import lora
from trainer.ranks import Ranks

if TYPE_CHECKING:
    from trainer.learner import Learner

State = dict[str, Tensor]


def learner_state(learner: Learner) -> State:
    """Everything but the policy's own weights, by name: live tensors, of a sharded model its shards."""
    policy: Any = learner.policy
    state = {f"policy.{name}": tensor for name, tensor in _adapters(policy).items()}
    if learner.critic is not None:
        state |= {f"critic.{name}": tensor for name, tensor in _weights(learner.critic).items()}
    for kind, model, optimizer in _optimizers(learner):
        names = {id(p): name for name, p in model.named_parameters()}
        for parameter, slots in optimizer.state.items():
            state |= {f"{kind}.{names[id(parameter)]}.{slot}": tensor for slot, tensor in slots.items()}
    return {name: tensor.detach() for name, tensor in state.items()}


def write_state(state: State, folder: Path, ranks: Ranks) -> None:
    """Write what this rank holds. Collective. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    if not state:
        return
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        with _alone_is_meant():
            save(state, storage_writer=writer, process_group=ranks.group, no_dist=ranks.size == 1)
    except CheckpointException as error:  # no Exception itself, and the cause is inside
        raise OSError(_first(error)) from error


def copied(state: Mapping[str, Tensor]) -> State:
    """As it is now, in main memory: later steps do not change it."""
    return {name: _copied(tensor) for name, tensor in state.items()}


def _copied(tensor: Any) -> Tensor:
    if not hasattr(tensor, "to_local"):
        return torch.empty_like(tensor, device="cpu").copy_(tensor)
    from torch.distributed.tensor import DTensor

    found: Tensor = DTensor.from_local(
        _copied(tensor.to_local()),
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )
    return found


# --- reading -----------------------------------------------------------------------------------------


def read_policy(policy: nn.Module, folder: Path, ranks: Ranks) -> None:
    """Weights of a model that Hugging Face saved into a live one. With adapters this reads nothing: the files
    hold them merged, the live model has the origin's weights. Collective. Raises ValueError, OSError."""
    if not lora.adapted(policy):
        _read(_weights(policy), folder, ranks)


def read_state(learner: Learner, folder: Path, ranks: Ranks) -> None:
    """What `write_state` wrote into a live learner. Collective. Raises ValueError, OSError."""
    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    sizes: dict[str, Any] = {name: tuple(entry.size) for name, entry in found.items()}  # type: ignore[union-attr]
    state = {f"policy.{name}": tensor for name, tensor in _adapters(learner.policy).items()}
    if learner.critic is not None:
        state |= {f"critic.{name}": tensor for name, tensor in _weights(learner.critic).items()}
    moments = [(parts[2], _slots(*parts, sizes)) for parts in _optimizers(learner)]
    for _, slots in moments:
        state |= {name: tensor for inner in slots.values() for name, tensor in inner.items()}
    _read(state, folder, ranks)
    for optimizer, slots in moments:
        named = {
            number: {name.rpartition(".")[2]: tensor for name, tensor in inner.items()}
            for number, inner in slots.items()
        }
        optimizer.load_state_dict({"state": named, "param_groups": optimizer.state_dict()["param_groups"]})


def _slots(
    kind: str, model: nn.Module, optimizer: Optimizer, sizes: Mapping[str, Any]
) -> dict[int, dict[str, Tensor]]:
    """Room for the moments that the files hold, by number of the parameter; none before the first step."""
    names = {id(p): name for name, p in model.named_parameters()}
    learning = [p for group in optimizer.param_groups for p in group["params"]]
    found: dict[int, dict[str, Tensor]] = {}
    for number, parameter in enumerate(learning):
        prefix = f"{kind}.{names[id(parameter)]}."
        held = {name: size for name, size in sizes.items() if name.startswith(prefix)}
        if held:
            found[number] = {name: _room(parameter, whole) for name, whole in held.items()}
    return found


def _room(parameter: nn.Parameter, size: Any) -> Tensor:
    """A moment is sharded as its parameter is; a step count is whole everywhere."""
    return torch.zeros_like(parameter.detach()) if size == tuple(parameter.shape) else torch.zeros(size)


def _read(state: State, folder: Path, ranks: Ranks) -> None:
    if not state:
        return
    reader = HuggingFaceStorageReader(str(folder))
    try:
        with _alone_is_meant():
            load(state, storage_reader=reader, process_group=ranks.group, no_dist=ranks.size == 1)
    except CheckpointException as error:
        raise ValueError(_first(error)) from error


# --- names -------------------------------------------------------------------------------------------


def _weights(model: nn.Module) -> State:
    """Parameters and buffers that are saved; tied ones once."""
    once = {name for name, _ in model.named_parameters()}
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - once
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def _adapters(policy: nn.Module) -> State:
    if not lora.adapted(policy):
        return {}
    return {name: tensor for name, tensor in _weights(policy).items() if ".lora_" in name}


def _optimizers(learner: Learner) -> list[tuple[str, nn.Module, Optimizer]]:
    found: list[tuple[str, nn.Module, Optimizer]] = [
        ("policy_optimizer", learner.policy, learner.policy_optimizer)
    ]
    if learner.critic is not None and learner.critic_optimizer is not None:
        found.append(("critic_optimizer", learner.critic, learner.critic_optimizer))
    return found


@contextmanager
def _alone_is_meant() -> Iterator[None]:
    """torch warns at each save and load of a single process that there is only one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")
        yield


def _first(error: CheckpointException) -> str:
    rank, (cause, _) = next(iter(error.failures.items()))
    return f"rank {rank}: {cause}" if len(error.failures) > 1 or rank else str(cause)
