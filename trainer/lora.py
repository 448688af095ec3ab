"""Low-rank adapters (LoRA, arXiv 2106.09685) through peft: train a percent of the weights.

What it is
    `inject` puts adapters into a model in place: the model stays what it is, with its own names and methods.
    Only adapters learn. The reference is the same model with its adapters off, so it costs no memory.

How to use it
    inject(policy, rank=16, alpha=32, targets="all-linear")
    reference = AdapterOff(policy); logprobs, _ = score(reference, ids, mask, temperature)

What it does not do
    No merging in place. `trainer.weights` gives the merged weights to engines and files.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trainer.errors import ModelError

ALL = "all-linear"
ADAPTER = "default"


def inject(policy: nn.Module, rank: int, alpha: int, targets: str = ALL, seed: int = 0) -> nn.Module:
    """Adapters of `rank`, scaled by alpha/rank, in the layers whose names end in one of `targets` (names
    separated by commas, or all linear ones but the output layer). At first they change nothing. Raises
    ModelError."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ModelError(
            "model.lora_rank needs peft: install orchestrate-rl[lora], or set model.lora_rank=0"
        ) from error
    wanted = ALL if targets == ALL else [name.strip() for name in targets.split(",")]
    settings = LoraConfig(r=rank, lora_alpha=alpha, target_modules=_names(policy, wanted), lora_dropout=0.0)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(settings, policy, adapter_name=ADAPTER)
    except ValueError as error:
        raise ModelError(f"model.lora_targets={targets!r} names no layer of the model: {error}") from error
    return policy.eval()


def _names(policy: nn.Module, wanted: str | list[str]) -> list[str]:
    """Full names of the layers to adapt: peft's own word for all of them asks for a model that it wrapped."""
    linear = {name for name, part in policy.named_modules() if isinstance(part, nn.Linear)}
    head = getattr(policy, "get_output_embeddings", lambda: None)()
    linear -= {name for name, part in policy.named_modules() if part is head}
    if isinstance(wanted, str):
        return sorted(linear)
    found = sorted(name for name in linear if name.rpartition(".")[2] in wanted)
    if not found:
        kinds = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
        raise ModelError(f"model.lora_targets={','.join(wanted)} names no layer of the model; it has {kinds}")
    return found


def adapted(model: nn.Module) -> list[Any]:
    """The layers with an adapter."""
    return [part for part in model.modules() if hasattr(part, "lora_A") and hasattr(part, "base_layer")]


class AdapterOff(nn.Module):
    """A policy without its adapters: the reference. Holds no weights of its own."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self._policy = [policy]  # in a list: not a part of this module

    @contextmanager
    def applied(self) -> Iterator[nn.Module]:
        """The policy, with its adapters off within."""
        layers = adapted(self._policy[0])
        for layer in layers:
            layer._disable_adapters = True  # `enable_adapters` would also make the adapters trainable again
        try:
            yield self._policy[0]
        finally:
            for layer in layers:
                layer._disable_adapters = False


def merged(name: str, weight: Tensor, layer: Any) -> tuple[str, Tensor]:
    """Name and weight of an adapted layer as if it had no adapter: W + alpha/rank · B·A."""
    low, high = (full(side[ADAPTER].weight) for side in (layer.lora_A, layer.lora_B))
    return name, weight + (high @ low).to(weight.dtype) * layer.scaling[ADAPTER]


def full(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor (a collective call); any other one as it is."""
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach()
