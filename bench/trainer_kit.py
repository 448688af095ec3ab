"""What the rows of `bench.trainer` share: the model's shape, the same rows for everybody, peak memory."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Row:
    """One finished episode of one turn: token ids and what it was worth."""

    prompt: list[int]
    completion: list[int]
    reward: float


@dataclass(frozen=True)
class Shape:
    """How much is trained and generated. Lengths in tokens."""

    rows: int = 8
    group: int = 4
    prompt: int = 64
    shortest: int = 32
    longest: int = 448
    micro_rows: int = 4
    steps: int = 3
    generated: int = 96
    prompts: int = 32
    layers: int = 30
    vocabulary: int = 49152

    @property
    def micro_tokens(self) -> int:
        """The same micro-batch as a budget of tokens: so many rows of the greatest length."""
        return self.micro_rows * (self.prompt + self.longest)


SMALL = Shape(
    layers=2, vocabulary=1024, rows=4, group=2, micro_rows=2, longest=96, prompts=4, generated=16, steps=1
)
"""Seconds instead of minutes: shows that it runs, measures nothing."""


def make_model(folder: Path, shape: Shape) -> None:
    """SmolLM2-135M's shape (its config.json) with random weights, saved as transformers does."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=shape.layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        rope_theta=100000.0,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    model: Any = LlamaForCausalLM(config)
    model.save_pretrained(folder)


def make_rows(shape: Shape) -> list[Row]:
    """The same for everybody; lengths spread evenly over their range, as those of agents are spread."""
    rng = random.Random(0)
    lengths = [
        shape.shortest + (shape.longest - shape.shortest) * n // (shape.rows - 1) for n in range(shape.rows)
    ]
    rng.shuffle(lengths)
    return [
        Row(draw(rng, shape, shape.prompt), draw(rng, shape, length), float(n % 2))
        for n, length in enumerate(lengths)
    ]


def make_prompts(shape: Shape) -> list[list[int]]:
    rng = random.Random(1)
    return [draw(rng, shape, shape.prompt) for _ in range(shape.prompts)]


def draw(rng: random.Random, shape: Shape, count: int) -> list[int]:
    return [rng.randrange(3, shape.vocabulary) for _ in range(count)]


def reset_peak() -> None:
    """Forget the highest resident size so far (proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> float:
    """The highest resident size since then."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise OSError("the kernel tells no VmHWM")
