"""What the tests of the loop share: a task that needs no sandbox, a small configuration, comparisons."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from orchestrator.contract import Role, RunDirectory
from orchestrator.schema import Config
from trainer.assemble import assemble
from trainer.environments import CommandResult, Verdict, Workspace
from trainer.episode import Episode, Status
from trainer.errors import Lost
from trainer.interrupt import Interrupt
from trainer.learner import Learner, needs_critic, needs_reference
from trainer.model import freeze, make_critic, tiny_policy
from trainer.ranks import ALONE, Ranks
from trainer.tasks import Task, Verify, write_tasks
from trainer.train import Training, train


@dataclass
class Desk:
    """A workspace in this process: it answers a command with its letters sorted, and likes vowels."""

    timings: dict[str, float] = field(default_factory=dict)
    said: str = ""

    async def run(self, command: str, timeout_s: float, max_output: int) -> CommandResult:
        self.said += command
        return CommandResult("".join(sorted(command)).encode()[:max_output], 0)

    async def verify(self, answer: str = "") -> Verdict:
        return Verdict(float(sum(map(ord, self.said)) % 2))


@dataclass
class World:
    """Opens desks. `lost` says which openings (counted from 0) infrastructure loses."""

    lost: Callable[[int], bool] = lambda number: False
    before_open: Callable[[int], None] = lambda number: None
    answers: bool = True
    opened: int = 0
    lives: int = 1

    @asynccontextmanager
    async def open(self, task: Task) -> AsyncIterator[Workspace]:
        number, self.opened = self.opened, self.opened + 1
        self.before_open(number)
        if self.lost(number):
            raise Lost(f"opening {number} was lost")
        yield Desk()

    async def wait_ready(self, timeout_s: float) -> None:
        if not self.answers:
            raise Lost(f"no runtime server answered within {timeout_s:g} s")

    async def life(self) -> object:
        return self.lives if self.answers else None

    async def close(self) -> None:
        pass


def small_config(folder: Path, tasks: int = 4, **trainer: Any) -> Config:
    """Two prompts × three episodes of two short turns; every part of the loss is switched on."""
    data = folder / "tasks.parquet"
    write_tasks(data, [Task(f"t{n}", f"{n} $ ", Verify("true")) for n in range(tasks)])
    return Config.model_validate(
        {
            "training": {"gpus_per_node": 0, "cpus": torch.get_num_threads(), "peer_grace": 1},
            "model": {"dtype": "float32", "warmstart_steps": 0},
            "data": {"train": str(data)},
            "rollout": {
                "engine": "torch",
                "prompts_per_step": 2,
                "rollouts_per_prompt": 3,
                "max_turns": 2,
                "max_tokens_per_turn": 5,
                "max_observation_bytes": 8,
                "retries": 0,
            },
            "algorithm": {"kl_coef": 0.02, "entropy_coef": 0.005},
            "trainer": {
                "ppo_epochs": 2,
                "minibatches": 2,
                "micro_batch_tokens": 64,
                "policy_lr": 1e-3,
                "critic_lr": 2e-3,
                "critic_warmup_steps": 1,
                "save_every": 100,
                **trainer,
            },
        }
    )


def new_run(folder: Path) -> RunDirectory:
    return RunDirectory.create(folder / "runs")


def job_of(run: RunDirectory, config: Config, world: World | None = None) -> Training:
    job = assemble(run, config, Interrupt(), run.events_of(Role.TRAINING, "trainer"), world or World())
    job.pause_s = 0.01
    return job


async def trained(run: RunDirectory, config: Config, world: World | None = None) -> Training:
    """A job that trained to its end, and closed what it held."""
    job = job_of(run, config, world)
    try:
        await train(job)
    finally:
        await job.engine.close()
        job.metrics.close()
    return job


def small_learner(config: Config | None = None, seed: int = 0, ranks: Ranks = ALONE) -> Learner:
    """The built-in model, the one of seed 0 as reference, and fresh optimisers."""
    config = config or Config.model_validate({"model": {"dtype": "float32"}, "algorithm": {"kl_coef": 0.02}})
    policy = tiny_policy(seed)
    reference = freeze(tiny_policy(0)) if needs_reference(config.algorithm) else None
    critic = make_critic(policy) if needs_critic(config.algorithm) else None
    return Learner.of(config, policy, critic, reference, ranks)


def made_episodes(count: int = 8, seed: int = 0) -> list[Episode]:
    """Episodes of different lengths with random tokens; the first half is worth something."""
    draw = torch.Generator().manual_seed(seed)

    def tokens(low: int, high: int) -> list[int]:
        size = int(torch.randint(low, high, (1,), generator=draw))
        return torch.randint(32, 127, (size,), generator=draw).tolist()

    episodes = []
    for number in range(count):
        episode = Episode.start(f"t{number}", number // 2, tokens(1, 5))
        for turn in range(1 + number % 3):
            if turn:
                episode.observed(tokens(1, 9))
            ids = tokens(1, 12)
            episode.sampled(ids, [-5.8] * len(ids))
        episodes.append(episode.finish(float(number < count / 2), Status.OK))
    return episodes


def state_of(job: Training) -> dict[str, Any]:
    """Everything that a resumed run must have in common with one that never stopped."""
    learner = job.learner
    both = {"policy": learner.policy_optimizer, "critic": learner.critic_optimizer}
    optimizers = {
        f"{name}.{i}.{key}": value
        for name, optimizer in both.items()
        if optimizer is not None
        for i, inner in optimizer.state_dict()["state"].items()
        for key, value in inner.items()
    }
    weights = {f"policy.{n}": p for n, p in learner.policy.state_dict().items()}
    if learner.critic is not None:
        weights |= {f"critic.{n}": p for n, p in learner.critic.state_dict().items()}
    own = {"cursor": job.sampler.state_dict(), "step": job.step, "torch": torch.get_rng_state()}
    return {**weights, **optimizers, **own}


def same(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Names whose values differ by as much as one bit."""
    assert first.keys() == second.keys()
    return [
        name
        for name, value in first.items()
        if not (
            torch.equal(value, second[name]) if isinstance(value, torch.Tensor) else value == second[name]
        )
    ]
