"""Rollout engines: what turns token ids into sampled token ids, with log-probabilities.

What it is
    `Engine` is the one interface of both engines. `vllm` (`vllm_engine`) samples fast, on GPUs or on
    CPUs; `torch` (`torch_engine`) is exact, deterministic and slow, for tests and for machines where
    vLLM cannot be installed.

How to use it
    engine = open_engine("vllm", policy, directory, config)
    sample = await engine.generate(prompt_ids, Sampling(max_tokens=28, stop_token_ids=(10,)))
    await engine.load(step)                       # the live module's weights, now
    difference = await engine.probe(prompt_ids)   # nats, engine against trainer; ~1e-6 in float32

What it does not do
    It imports neither engine before one is asked for; no text: ids in, ids out.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from trainer.errors import EngineError

if TYPE_CHECKING:
    from torch import nn

    from orchestrator.schema import Config

KINDS = ("vllm", "torch")


@dataclass(frozen=True)
class Sampling:
    """How one request samples. Full distribution only: truncated sampling (top-p, top-k) would make
    every probability ratio wrong, so there is no such setting."""

    max_tokens: int
    temperature: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    ignore_eos: bool = False
    greedy: bool = False
    """The likeliest token each time, for validation; nothing is trained on its log-probabilities."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or self.temperature <= 0:
            raise EngineError(
                f"cannot sample {self.max_tokens} tokens at temperature {self.temperature}: "
                "max_tokens must be at least 1 and temperature above 0"
            )


@dataclass(frozen=True)
class Sample:
    """What was sampled: the stop token is the last id; logprobs (nats) are at the request's temperature.

    finish_reason is "stop" or "length". `spans`: (first of these ids, version of the weights that sampled
    from there on); more than one where weights came in flight.
    """

    ids: list[int]
    logprobs: list[float]
    finish_reason: str
    spans: tuple[tuple[int, int], ...] = ()


class Engine(Protocol):
    """A rollout engine over a live module. Any number of coroutines may call `generate` at once."""

    @property
    def version(self) -> int:
        """Of the weights it samples from: what the last `load` was given."""

    async def generate(self, ids: list[int], sampling: Sampling) -> Sample:
        """Continue `ids`. Raises EngineError when they do not fit, EngineDied when the engine is gone."""

    async def load(self, version: int) -> None:
        """Take over the present weights of the module it was built over; old key-values are dropped."""

    async def probe(self, prompt: list[int]) -> float:
        """Largest |log-probability difference| in nats between engine and module on a fresh sample."""

    async def close(self) -> None:
        """Release everything: no thread, process or memory stays. May be called twice."""


def open_engine(kind: str, model: nn.Module, directory: Path, config: Config) -> Engine:
    """The engine named `kind` over the live `model`.

    `directory` holds the same model as saved by `save_pretrained` (vLLM reads its configuration and
    first weights there; the torch engine ignores it). Raises EngineError on an unknown kind.
    """
    engine = _opened(kind, model, directory, config)
    if config.rollout.asynchronous and config.rollout.update_in_flight == "pause":
        from trainer.engines.pausing import Pausing

        return Pausing(engine)
    return engine


def _opened(kind: str, model: nn.Module, directory: Path, config: Config) -> Engine:
    if kind == "torch":
        from trainer.engines.torch_engine import TorchEngine

        return TorchEngine.over(model, config)
    if kind == "vllm":
        from trainer.engines.vllm_engine import VllmEngine

        return VllmEngine.over(model, directory, config)
    raise EngineError(f"no rollout engine is called {kind!r}; choose one of {', '.join(KINDS)}")
