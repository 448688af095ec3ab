"""What becomes of learning when sandboxes are lost: masked, as we do, or scored 0.

How to run it
    python -m bench.failures [--share 0.1] [--steps 50] [--seed 0] [--out docs/failures.svg] [--json]

What it does
    Trains the demo's policy three times, in vLLM and with the demo's own settings: no sandbox lost; a share
    of the trajectories lost at one of their commands and masked; the same ones scored 0, as a trainer does
    that takes a dead sandbox for a failed task. JSON line last: the mean success rate of the last ten steps
    among all trajectories (what a log shows), and among those whose sandbox lived (what the policy can do).

What it does not do
    Commands run in the unconfined shell, not in containers, so that nothing else is ever lost: the tests in
    tests/end_to_end kill real ones.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import warnings
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from bench.curves import draw
from orchestrator.config import load
from orchestrator.contract import Role, RunDirectory, read_json_lines
from orchestrator.schema import Config
from trainer.assemble import assemble
from trainer.environments import CommandResult, Verdict, Workspace
from trainer.environments.local import LocalEnvironment
from trainer.errors import Broken, Lost
from trainer.interrupt import Interrupt
from trainer.tasks import Task
from trainer.train import train

ROOT = Path(__file__).resolve().parent.parent
CASES: Mapping[str, type[Exception] | None] = {
    "none lost": None,
    "lost, masked": Lost,
    "lost, scored 0": Broken,
}
LAST = 10


@dataclass
class Dying:
    """A workspace that is gone from its command number `dies` on; 0 is the first one, None never."""

    inner: Workspace
    dies: int | None
    failure: type[Exception]
    commands: int = 0

    def __post_init__(self) -> None:
        self.timings = self.inner.timings

    async def run(self, command: str, timeout_s: float, max_output: int) -> CommandResult:
        if self.dies is not None and self.commands >= self.dies:
            raise self.failure("the sandbox died")
        self.commands += 1
        return await self.inner.run(command, timeout_s, max_output)

    async def verify(self, answer: str = "") -> Verdict:
        if self.dies is not None:
            raise self.failure("the sandbox died")
        return await self.inner.verify(answer)


class Failing(LocalEnvironment):
    """Of whose workspaces a share dies, at their first or second command or when they are judged."""

    def __init__(self, share: float, failure: type[Exception] | None, seed: int) -> None:
        super().__init__()
        self.share, self.failure, self.draw = share, failure, random.Random(seed)

    @asynccontextmanager
    async def open(self, task: Task) -> AsyncIterator[Workspace]:
        dies = self.draw.randrange(3) if self.draw.random() < self.share else None
        async with super().open(task) as inner:
            yield inner if self.failure is None else Dying(inner, dies, self.failure)


def settings(steps: int, seed: int) -> Config:
    """The demo's; nothing is tried twice, so that what is lost stays lost."""
    length = [f"trainer.total_steps={steps}", f"trainer.save_every={steps}"]
    return load("local", [f"run.seed={seed}", "rollout.retries=0", *length]).config


async def learn(folder: Path, config: Config, world: LocalEnvironment) -> list[tuple[float, float]]:
    """Of each step: the success rate among all trajectories, and among those whose sandbox lived."""
    run = RunDirectory.create(folder)
    job = assemble(run, config, Interrupt(), run.events_of(Role.TRAINING), world)
    try:
        await train(job)
    finally:
        await job.engine.close()
    episodes = config.rollout.prompts_per_step * config.rollout.rollouts_per_prompt
    found = []
    for row in read_json_lines(run.metrics):
        scored = episodes * (1 - row["status/infra"])
        lived = scored - episodes * row["failure/broken"]
        found.append((row["success_rate"], row["success_rate"] * scored / lived))
    return found


def one(case: str, options: argparse.Namespace) -> list[tuple[float, float]]:
    world = Failing(options.share, CASES[case], options.seed)
    with tempfile.TemporaryDirectory(prefix="bench-failures-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vLLM's own
        return asyncio.run(learn(Path(folder), settings(options.steps, options.seed), world))


def in_a_process(case: str, arguments: list[str]) -> list[tuple[float, float]]:
    """vLLM starts once in a process."""
    command = [sys.executable, "-m", "bench.failures", *arguments, "--case", case]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise SystemExit(f"bench.failures: {case!r} ended with {done.returncode}")
    return [(every, lived) for every, lived in json.loads(done.stdout.splitlines()[-1])]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.failures", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--share", type=float, default=0.1, help="of the trajectories (default: 0.1)")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="an SVG file")
    parser.add_argument("--json", action="store_true", help="only the JSON line")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(one(options.case, options)))
        return 0
    curves: dict[str, list[tuple[float, float]]] = {}
    for case in CASES:
        curves[case] = in_a_process(case, sys.argv[1:])
        every, lived = (mean(pair[n] for pair in curves[case][-LAST:]) for n in (0, 1))
        if not options.json:
            print(f"  {case:<16} success {every:6.1%} of all, {lived:6.1%} of those whose sandbox lived")
    if options.out:
        draw({case: [every for every, _ in pairs] for case, pairs in curves.items()}, options.out)
    last = {
        case: [round(mean(p[n] for p in pairs[-LAST:]), 3) for n in (0, 1)] for case, pairs in curves.items()
    }
    shape = {"share": options.share, "steps": options.steps, "seed": options.seed, "cores": os.cpu_count()}
    print(json.dumps({"bench": "failures", **shape, "last_10_all_and_lived": last}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
