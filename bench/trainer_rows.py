"""The rows of `bench.trainer`, each measured in a process of its own.

How to run one
    python -m bench.trainer_rows ROW FOLDER [--small]     # FOLDER holds the model that all rows share

What it is
    One function per row of `ROWS`. The last line that is printed is the row as JSON. A process for each, so
    that none inherits another's threads, caches or peak memory.

What it does not do
    No ratios and no table: `bench.trainer` makes the whole.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench import trainer_peers as peers
from bench.rollout import Delays
from bench.trainer_kit import SMALL, Row, Shape, make_prompts, make_rows, peak_mib, reset_peak
from orchestrator.schema import Config
from trainer.agent import Limits
from trainer.batch import Batch, divide
from trainer.distributed import models
from trainer.engines import Engine, Sample, open_engine
from trainer.episode import Episode
from trainer.formats import Action
from trainer.learner import Learner
from trainer.model import load_policy
from trainer.ranks import ALONE
from trainer.rollout import Plan, Rollouts
from trainer.tasks import Task, Verify

CACHE_BYTES = 1 << 30
Numbers = dict[str, float | None]


# --- training ----------------------------------------------------------------------------------------


def train(folder: Path, shape: Shape, recompute: bool) -> Numbers:
    """Tokens per second and peak memory of GRPO steps, one optimiser step for each batch."""
    config = Config.model_validate(
        {
            "training": {"gpus_per_node": 0},
            "model": {"dtype": "float32"},
            "rollout": {"rollouts_per_prompt": shape.group, "max_response_length": shape.longest},
            "algorithm": {"estimator": "grpo", "old_logprobs": "rollout"},
            "trainer": {
                "packing": True,
                "activation_checkpointing": recompute,
                "micro_batch_tokens": shape.micro_tokens,
            },
        }
    )
    learner = Learner.of(config, *models(config, folder, "cpu", ALONE))
    episodes = [episode(n, row, shape) for n, row in enumerate(make_rows(shape))]
    clock = peers.Clock()
    reset_peak()
    for _ in range(shape.steps + 1):
        clock.mark()
        batch = Batch.of(episodes)
        division = divide(batch.lengths, 1, shape.micro_tokens, packed=True)
        learner.prepare(batch, division)
        learner.update(batch, division, train_policy=True)
    clock.mark()
    return {"tok_s": sum(len(e.ids) for e in episodes) / clock.median(skip=1), "peak_mib": peak_mib()}


def episode(number: int, row: Row, shape: Shape) -> Episode:
    made = Episode.start(f"t{number}", number // shape.group, row.prompt)
    made.sampled(row.completion, [-10.8] * len(row.completion))  # as likely as any token, untrained
    return made.finish(reward=row.reward)


# --- generating --------------------------------------------------------------------------------------


class Numerals:
    """A format over bare ids: a prompt is written as its ids, and a turn ends where its tokens do."""

    stop_token_ids: tuple[int, ...] = ()
    has_closing_action = False

    def prompt(self, prompt: Any, tools: Sequence[str] | None = None) -> list[int]:
        return [int(word) for word in prompt.split()]

    def action(self, sample: Sample) -> Action:
        return Action("", "act")

    def reply(self, action: Action, outputs: Sequence[bytes], limit: int) -> tuple[str, list[int]]:
        return "", [3]


def rollout(folder: Path, shape: Shape) -> Numbers:
    """Tokens per second of our rollouts over vLLM, what a weight sync takes, how well waiting overlaps."""
    config = Config.model_validate(
        {
            "training": {"gpus_per_node": 0},
            "model": {"dtype": "float32"},
            "rollout": {
                "kv_cache_bytes": CACHE_BYTES,
                "max_prompt_length": shape.prompt,
                "max_response_length": shape.generated + 8,
                "max_parallel_episodes": shape.prompts,
            },
        }
    )
    engine = open_engine("vllm", load_policy(folder), folder, config)
    prompts = make_prompts(shape)
    tasks = [Task(f"p{n}", " ".join(map(str, ids)), Verify("true")) for n, ids in enumerate(prompts)]
    return asyncio.run(generate(engine, tasks, shape))


async def generate(engine: Engine, tasks: list[Task], shape: Shape) -> Numbers:
    async def collect(turns: int, wait_s: float, step: int) -> float:
        """Seconds of one step's episodes, of so many turns, all their tokens taken together the same."""
        limits = Limits(
            max_turns=turns,
            max_tokens_per_turn=shape.generated // turns,
            max_response_length=shape.generated + 8,
        )
        world = Delays(turns, wait_s, wait_s)
        rollouts = Rollouts(engine, world, Numerals(), limits, Plan(max_parallel=len(tasks)))
        start = time.perf_counter()
        episodes = await rollouts.collect(tasks, step)
        took = time.perf_counter() - start
        assert all(e.action_tokens == turns * (shape.generated // turns) for e in episodes), "cut short"
        return took

    await collect(1, 0.0, 0)
    alone = statistics.median([await collect(1, 0.0, step) for step in range(3)])
    turns = statistics.median([await collect(4, 0.0, step) for step in range(3)])
    wait_s = turns / 4  # four commands wait as long as four turns generate
    both = statistics.median([await collect(4, wait_s, step) for step in range(3)])
    syncs = []
    for step in range(3):
        start = time.perf_counter()
        await engine.load(step)
        syncs.append(time.perf_counter() - start)
    await engine.close()
    return {
        "tok_s": len(tasks) * shape.generated / alone,
        "sync_ms": 1000 * statistics.median(syncs),
        "generation_s": turns,
        "environment_s": 4 * wait_s,
        "both_s": both,
    }


# --- all of them -------------------------------------------------------------------------------------


def _demo(folder: Path, name: str) -> Numbers:
    """`folder` is the demo's own warm-started model here."""
    from bench import trainer_demo
    from orchestrator.config import load
    from trainer.tasks import load_tasks

    if name != "trl":
        return trainer_demo.our_demo(folder, name)
    config = load("local").config
    task = load_tasks(config.data.train, folder.parent)[0]
    return trainer_demo.trl_demo(folder, task, config)


ROWS: dict[str, Callable[[Path, Shape], Numbers]] = {
    "train": lambda folder, shape: train(folder, shape, recompute=False),
    "train_recompute": lambda folder, shape: train(folder, shape, recompute=True),
    "trl_train": lambda folder, shape: {**peers.trl_train(folder, make_rows(shape), shape, False)},
    "trl_train_recompute": lambda folder, shape: {**peers.trl_train(folder, make_rows(shape), shape, True)},
    "rollout": rollout,
    "vllm": lambda folder, shape: {
        **peers.vllm_alone(folder, make_prompts(shape), shape.generated, CACHE_BYTES)
    },
    "hf_generate": lambda folder, shape: {**peers.hf_generate(folder, make_prompts(shape), shape.generated)},
    "demo_ppo": lambda folder, shape: _demo(folder, "gae"),
    "demo_grpo": lambda folder, shape: _demo(folder, "grpo"),
    "demo_trl": lambda folder, shape: _demo(folder, "trl"),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.trainer_rows")
    parser.add_argument("row", choices=ROWS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--small", action="store_true", help="seconds instead of minutes; measures nothing")
    options = parser.parse_args()
    print(json.dumps(ROWS[options.row](options.folder, SMALL if options.small else Shape())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
