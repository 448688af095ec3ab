"""How much it brings that every episode is its own coroutine: the same episodes in lockstep, side by side.

What it is
    A real vLLM engine over the built-in model and an environment that only waits, as long as a command
    in a far sandbox might take. `coroutines` is the trainer's own `Rollouts`; `lockstep` samples a turn
    for all episodes, then waits for the slowest of their commands, and so on.

How to use it
    python -m bench.rollout [--episodes 32] [--turns 4] [--shortest-ms 50] [--longest-ms 250] [--repeats 3]

What it prints
    A few lines for people, and one JSON line last: seconds of both (best of the repeats), how much
    faster, tokens per second, and the engine's start-up, sync and probe.

What it does not do
    No sandboxes (`bench.sandbox` measures those), no training.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.schema import Config
from trainer.agent import Action, Limits, Shell
from trainer.engines import Engine, Sample, Sampling, open_engine
from trainer.environments import CommandResult, Verdict, Workspace
from trainer.episode import Episode
from trainer.model import ByteTokenizer, tiny_policy
from trainer.rollout import Plan, Rollouts
from trainer.tasks import Task, Verify

OBSERVATION = b"file-1.txt file-2.txt file-3.txt\n"
TOKENS_PER_TURN = 48


@dataclass
class Waiting:
    """A workspace whose commands do nothing but take their time; the same times in every repeat."""

    waits: list[float]
    timings: dict[str, float] = field(default_factory=dict)

    async def run(self, command: str, timeout_s: float, max_output: int) -> CommandResult:
        await asyncio.sleep(self.waits.pop())
        return CommandResult(OBSERVATION, 0)

    async def verify(self, answer: str = "") -> Verdict:
        return Verdict(0.0)


class Delays:
    """The environment: an episode's latencies come from its task's name."""

    def __init__(self, turns: int, shortest_s: float, longest_s: float) -> None:
        self._turns, self._range = turns, (shortest_s, longest_s)

    def waits(self, task_id: str) -> list[float]:
        draw = random.Random(task_id)
        return [draw.uniform(*self._range) for _ in range(self._turns)]

    @asynccontextmanager
    async def open(self, task: Task) -> AsyncIterator[Workspace]:
        yield Waiting(self.waits(task.id))

    async def life(self) -> object:
        return "one"

    async def wait_ready(self, timeout_s: float) -> None:
        """Always ready."""

    async def close(self) -> None:
        """Nothing to close."""


class Fixed(Shell):
    """The shell format, but every turn samples its full number of tokens: equal work for both sides."""

    def __init__(self) -> None:
        super().__init__(ByteTokenizer())
        self.stop_token_ids = ()

    def action(self, sample: Sample) -> Action:
        return Action("", "true")


async def coroutines(engine: Engine, environment: Delays, tasks: list[Task], turns: int) -> list[Episode]:
    """The trainer's way."""
    limits = Limits(turns, TOKENS_PER_TURN, 16, 900, 64, 1.0, 60.0, 600.0)
    plan = Plan(max_parallel=len(tasks))
    return await Rollouts(engine, environment, Fixed(), limits, plan).collect(tasks, 0)


async def lockstep(engine: Engine, environment: Delays, tasks: list[Task], turns: int) -> list[list[int]]:
    """All episodes turn by turn, each turn as slow as its slowest command."""
    form = Fixed()
    histories = [form.prompt("$ ") for _ in tasks]
    waits = [environment.waits(task.id) for task in tasks]
    for turn in range(turns):
        asked = [Sampling(TOKENS_PER_TURN, seed=turn * 1000 + n) for n in range(len(tasks))]
        samples = await asyncio.gather(*map(engine.generate, histories, asked))
        await asyncio.gather(*[asyncio.sleep(wait.pop()) for wait in waits])
        seen = form.observation(OBSERVATION, 64)[1]
        histories = [h + sample.ids + seen for h, sample in zip(histories, samples, strict=True)]
    return histories


async def timed(work: Callable[[], Awaitable[Any]], repeats: int) -> tuple[float, Any]:
    """Best wall time of the repeats, and the last result."""
    best, result = float("inf"), None
    for _ in range(repeats):
        start = time.perf_counter()
        result = await work()
        best = min(best, time.perf_counter() - start)
    return best, result


def configuration(episodes: int) -> Config:
    config = Config()
    config.model.dtype = "float32"
    config.rollout.max_prompt_length, config.rollout.max_response_length = 16, 900
    config.rollout.max_parallel_episodes = episodes
    config.rollout.kv_cache_bytes = 128 << 20
    return config


async def measure(given: argparse.Namespace, directory: Path) -> dict[str, float]:
    """Everything, with one engine."""
    model = tiny_policy(0)
    model.save_pretrained(directory)  # type: ignore[operator]
    start = time.perf_counter()
    engine = open_engine("vllm", model, directory, configuration(given.episodes))
    opened = time.perf_counter() - start
    try:
        prompt = Fixed().prompt("$ ")
        await engine.probe(prompt)  # the first request of an engine costs seconds
        sync, _ = await timed(lambda: engine.load(1), 5)
        probe = await engine.probe(prompt)
        environment = Delays(given.turns, given.shortest_ms / 1000, given.longest_ms / 1000)
        tasks = [Task(f"task-{n}", "$ ", Verify("true")) for n in range(given.episodes)]
        lock, _ = await timed(lambda: lockstep(engine, environment, tasks, given.turns), given.repeats)
        own, episodes = await timed(
            lambda: coroutines(engine, environment, tasks, given.turns), given.repeats
        )
    finally:
        await engine.close()
    tokens = sum(episode.action_tokens for episode in episodes)
    return {
        "lockstep_s": round(lock, 3),
        "coroutines_s": round(own, 3),
        "speedup": round(lock / own, 2),
        "tokens_per_s": round(tokens / own),
        "engine_open_s": round(opened, 2),
        "sync_ms": round(sync * 1000, 1),
        "probe": probe,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.rollout", description=__doc__.splitlines()[0])
    parser.add_argument("--episodes", type=int, default=32)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--shortest-ms", type=float, default=50)
    parser.add_argument("--longest-ms", type=float, default=250)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="only the JSON line")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        found = asyncio.run(measure(given, Path(directory)))
    if not given.json:
        span = f"{given.shortest_ms:g}-{given.longest_ms:g} ms"
        print(f"{given.episodes} episodes of {given.turns} turns, commands of {span}")
        print(f"lockstep {found['lockstep_s']} s, coroutines {found['coroutines_s']} s: {found['speedup']} x")
    print(json.dumps({"bench": "rollout", "episodes": given.episodes, "turns": given.turns} | found))


if __name__ == "__main__":
    main()
