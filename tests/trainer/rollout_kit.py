"""What the tests of rollouts share: the tiny model, and an engine that follows a script."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import torch
from torch import nn

from trainer.engines import Sample, Sampling
from trainer.model import ByteTokenizer as Bytes
from trainer.model import tiny_policy

__all__ = ["Bytes", "Scripted", "disturb", "tiny"]


def tiny(seed: int = 0) -> nn.Module:
    """The built-in model, untrained."""
    return tiny_policy(seed)


def disturb(model: torch.nn.Module, by: float = 0.1) -> None:
    """Change every weight, as training would, only more."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * by)


class Scripted:
    """An engine that says what a function of the dialogue tells it to; it keeps every prompt it was sent."""

    version = 3

    def __init__(self, say: Callable[[str, Sampling], str]) -> None:
        self.say = say
        self.prompts: list[list[int]] = []
        self.seeds: list[int | None] = []

    async def generate(self, ids: list[int], sampling: Sampling) -> Sample:
        self.prompts.append(list(ids))
        self.seeds.append(sampling.seed)
        await asyncio.sleep(0)
        said = list(self.say(bytes(ids).decode(), sampling).encode())[: sampling.max_tokens]
        stopped = bool(said) and said[-1] in sampling.stop_token_ids
        return Sample(said, [-0.5] * len(said), "stop" if stopped else "length")

    async def load(self, version: int) -> None:
        self.version = version

    async def probe(self, prompt: list[int]) -> float:
        return 0.0

    async def close(self) -> None:
        pass
