"""Weights for vLLM out of a live module of the same process, through vLLM's own transfer registry.

What it is
    A weight-transfer backend named `orchestrate-live`. vLLM drives it with the same three calls
    (`start_weight_update`, `update_weights`, `finish_weight_update`) that drive its IPC and NCCL
    backends; ours reads named tensors from a source that the trainer published under a name.

How to use it
    publish("policy-1", lambda: named_tensors(model)); EngineArgs(weight_transfer_config={"backend": BACKEND})

What it does not do
    It serves no other process: there the tensors would not be live.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from trainer.weights import named_weights

BACKEND = "orchestrate-live"

Source = Callable[[], Iterable[tuple[str, Tensor]]]

# The only state of this module: vLLM makes the backend itself and hands it nothing but JSON, so a name
# is all that can lead it to the tensors.
_sources: dict[str, Source] = {}


def publish(name: str, source: Source) -> None:
    """Offer tensors, under their checkpoint names, to the engines of this process."""
    _sources[name] = source


def withdraw(name: str) -> None:
    """Forget a source, so that the module behind it can be freed."""
    _sources.pop(name, None)


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Each weight under its checkpoint's name: gathered when sharded, which is a collective call of all
    ranks, and with adapters added."""
    yield from named_weights(model)


@dataclass
class LiveInit(WeightTransferInitInfo):  # type: ignore[misc]  # vLLM ships no types
    """Nothing to agree on beforehand."""


@dataclass
class LiveUpdate(WeightTransferUpdateInfo):  # type: ignore[misc]  # vLLM ships no types
    """Which published source to read."""

    source: str


class LiveWeights(WeightTransferEngine[LiveInit, LiveUpdate]):  # type: ignore[misc]  # vLLM ships no types
    """The backend; runs in the engine's thread, between two steps."""

    init_info_cls = LiveInit
    update_info_cls = LiveUpdate

    def init_transfer_engine(self, init_info: LiveInit) -> None:
        """Nothing to connect."""

    def shutdown(self) -> None:
        """Nothing to disconnect."""

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: LiveUpdate) -> None:
        self.model.load_weights(_sources[update_info.source]())

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        repack_tied_head(self.model)


def repack_tied_head(model: nn.Module) -> None:
    """Make a tied head follow its embedding on CPUs.

    vLLM's CPU linear layers compute from a packed copy, made anew when a layer's own weight was
    loaded. A tied head has no weight of its own in a checkpoint, so its copy would stay the first one
    and the policy would be wrong without any sign of it.
    """
    head = getattr(model, "lm_head", None)
    tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    if head is None or not tied or not hasattr(head, "cpu_linear"):
        return
    inner = getattr(model, "model", model)
    head.weight = inner.get_submodule("embed_tokens").weight
    dispatch_cpu_unquantized_gemm(head, remove_weight=True)


if BACKEND not in WeightTransferEngineFactory._registry:  # registering twice is an error there
    WeightTransferEngineFactory.register_engine(BACKEND, LiveWeights)
