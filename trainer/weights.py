"""A policy's weights as others want them: whole, merged, and under the names of its checkpoint.

What it is
    `named_weights` gives what an engine loads and a file holds, whether the policy is sharded, has adapters,
    or neither. `save_model` writes it as Hugging Face does, readable by transformers and vLLM.

How to use it
    for name, tensor in named_weights(policy): ...        # on every rank, in the same order
    save_model(policy, folder)

What it does not do
    No optimiser, no state of a run (`trainer.checkpoint`). The tensors are the live ones where they can be:
    copy them before the next optimiser step if they are to stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer import lora


@torch.no_grad()
def named_weights(policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each weight, one after the other: never all whole at once. Collective when sharded.

    Tied weights come once. Adapters are added to the layers that they adapt.
    """
    layers = {f"{name}.": part for name, part in policy.named_modules() if part in set(lora.adapted(policy))}
    for name, parameter in policy.named_parameters():
        owner = next((prefix for prefix in layers if name.startswith(prefix)), "")
        whole = lora.full(parameter) if not _of_adapter(name, owner) else None
        if whole is None:
            continue
        inner = f"{owner}base_layer."
        if name == f"{inner}weight":
            yield lora.merged(f"{owner}weight", whole, layers[owner])
        else:
            yield name.replace(inner, owner) if owner else name, whole


def _of_adapter(name: str, owner: str) -> bool:
    return bool(owner) and not name.startswith(f"{owner}base_layer.")


def save_model(policy: nn.Module, folder: Path) -> None:
    """Export a policy. Collective when it is sharded, and then for small ones: rank 0 holds all of it."""
    write_model(policy, {name: tensor.detach() for name, tensor in named_weights(policy)}, folder)


def write_model(policy: Any, tensors: dict[str, Tensor], folder: Path) -> None:
    """`tensors` as `policy`'s, with its configuration: config.json and safetensors."""
    policy.save_pretrained(folder, state_dict={name: t.cpu().contiguous() for name, t in tensors.items()})
