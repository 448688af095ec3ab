"""What `bench.trainer` is measured against: TRL's GRPO trainer, vLLM alone, and transformers' `generate`.

What it is
    Each function measures one peer on the model directory and the rows that it is given, and returns
    numbers. `python -m bench.trainer_rows NAME` runs one of them in a process of its own, so that none
    inherits another's threads, caches or peak memory.

What it does not do
    It changes nothing of the peers but what their own options offer: TRL gets finished rollouts through
    its `rollout_func`, which is what its users give it for episodes of several turns.
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.trainer_kit import Row, Shape, peak_mib, reset_peak
from trainer.export import byte_tokenizer


def trl_train(folder: Path, rows: list[Row], shape: Shape, checkpointing: bool) -> dict[str, float]:
    """Tokens per second and peak memory of TRL's optimiser steps on `rows`, no generation in them."""
    clock = Clock()

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        clock.mark()
        return {
            "prompt_ids": [row.prompt for row in rows],
            "completion_ids": [row.completion for row in rows],
            "logprobs": [[0.0] * len(row.completion) for row in rows],
        }

    trainer = grpo(
        folder,
        rollout,
        lambda completions, **_: [row.reward for row in rows],
        per_device_train_batch_size=shape.micro_rows,
        gradient_accumulation_steps=len(rows) // shape.micro_rows,
        num_generations=shape.group,
        max_completion_length=shape.longest,
        max_steps=shape.steps + 1,
        gradient_checkpointing=checkpointing,
    )
    reset_peak()
    trainer.train()
    clock.mark()
    tokens = sum(len(row.prompt) + len(row.completion) for row in rows)
    return {"tok_s": tokens / clock.median(skip=1), "peak_mib": peak_mib()}


def grpo(
    folder: Path,
    rollout: Callable[..., dict[str, Any]],
    reward: Callable[..., list[float]],
    **changes: Any,
) -> Any:
    """TRL's trainer on the CPU in float32; AdamW, constant rate, logs nowhere."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    arguments: dict[str, Any] = {
        "output_dir": str(folder.parent / "trl"),
        "use_cpu": not torch.cuda.is_available(),
        "bf16": torch.cuda.is_available(),
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "beta": 0.0,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "shuffle_dataset": False,
        "temperature": 1.0,
        **changes,
    }
    prompts = Dataset.from_list([{"prompt": f"task {n}"} for n in range(4096)])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=GRPOConfig(**arguments),
        train_dataset=prompts,
        processing_class=byte_tokenizer(),
        rollout_func=rollout,
    )


class Clock:
    """Times between marks."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def mark(self) -> None:
        self.marks.append(time.perf_counter())

    def median(self, skip: int) -> float:
        """Of the spans between marks, the first `skip` of them left out (they warm up)."""
        return statistics.median([b - a for a, b in itertools.pairwise(self.marks)][skip:])


def vllm_alone(folder: Path, prompts: list[list[int]], length: int, cache_bytes: int) -> dict[str, float]:
    """Tokens per second of vLLM's own `LLM.generate` on all prompts at once."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM, SamplingParams

    longest = max(map(len, prompts)) + length
    llm = LLM(
        str(folder),
        dtype="float32",
        max_model_len=longest,
        kv_cache_memory_bytes=cache_bytes,
        skip_tokenizer_init=True,
        enable_prefix_caching=True,
        max_num_seqs=len(prompts),
    )
    wanted = SamplingParams(temperature=1.0, max_tokens=length, ignore_eos=True, detokenize=False)
    given = [{"prompt_token_ids": ids} for ids in prompts]
    llm.generate(given, SamplingParams(max_tokens=4, detokenize=False), use_tqdm=False)
    return {"tok_s": rate(lambda: llm.generate(given, wanted, use_tqdm=False), len(prompts) * length)}


def hf_generate(folder: Path, prompts: list[list[int]], length: int) -> dict[str, float]:
    """Tokens per second of transformers' `generate` on all prompts as one batch."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor(prompts)
    arguments: dict[str, Any] = {
        "attention_mask": torch.ones_like(ids),
        "do_sample": True,
        "top_k": 0,
        "min_new_tokens": length,
        "max_new_tokens": length,
        "pad_token_id": 0,
    }
    model.generate(ids, **(arguments | {"min_new_tokens": 2, "max_new_tokens": 2}))
    return {"tok_s": rate(lambda: model.generate(ids, **arguments), len(prompts) * length, rounds=1)}


def rate(work: Callable[[], object], tokens: int, rounds: int = 3) -> float:
    """Tokens per second, the median of some rounds."""
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        found.append(tokens / (time.perf_counter() - start))
    return statistics.median(found)
