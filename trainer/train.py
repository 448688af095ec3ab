"""The training loop. Read it top to bottom: this is the algorithm.

What it is
    `train` is PPO as a page of prose: collect episodes, look at them (log-probabilities, values,
    advantages), update critic and policy, bring the new weights to the engine and prove them, log, save.
    The arithmetic is in `ppo`, the models' part in `learner`, everything slow and parallel in `rollout`.

How to use it
    reason = await train(assemble(run, config, interrupt))       # `python -m trainer --run-dir R` does

What it does not do
    It reads no configuration file, handles no signal and chooses no exit code (`trainer.__main__`), and makes
    none of its parts (`trainer.assemble`).
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch

from orchestrator.contract import EventLog
from orchestrator.schema import Config
from trainer.batch import trainable
from trainer.checkpoint import Checkpoints, Progress, capture, score_of
from trainer.data import Sampler
from trainer.distributed import deal
from trainer.engines import Engine
from trainer.environments import Environment
from trainer.episode import Episode
from trainer.errors import Collapsed, MismatchError
from trainer.harvest import harvests, mask_stale
from trainer.interrupt import Interrupt
from trainer.learner import Learner
from trainer.metrics import Clock, Metrics, Row, alarms
from trainer.ranks import ALONE, Ranks
from trainer.rollout import Rollouts
from trainer.saving import SaveTimes
from trainer.summary import staleness, summary
from trainer.tasks import Task
from trainer.together import shared
from trainer.view import write_rollouts

P = ParamSpec("P")
T = TypeVar("T")

NO_UPDATE: Row = dict.fromkeys(("loss_policy", "loss_value", "kl", "mismatch"), 0.0)
"""What a row says when no episode of the step could be trained on."""


@dataclass
class Training:
    """The parts of a run, and where it stands. `step` steps are done, of `steps`."""

    config: Config
    learner: Learner
    engine: Engine
    environment: Environment
    rollouts: Rollouts
    tasks: Sequence[Task]
    sampler: Sampler
    store: Checkpoints
    metrics: Metrics
    events: EventLog
    rollout_dir: Path
    probe_prompt: list[int]
    save_times: SaveTimes
    steps: int
    step: int = 0
    validation: Sequence[Task] = ()
    interrupt: Interrupt = field(default_factory=Interrupt)
    ranks: Ranks = ALONE
    voice: Ranks = ALONE
    """The same ranks, for what is said about episodes, which may be played while the models are trained."""
    pause_s: float = 1.0
    """Before a step that was lost is played again."""

    def close(self) -> None:
        """What is being written comes to its end."""
        self.store.close()
        self.metrics.close()

    def save(self, progress: Progress, score: float | None = None, wait: bool = True) -> None:
        """Write a checkpoint and say so once it is there; without `wait` training goes on meanwhile. `score`:
        of its validation; the store keeps the best."""

        def say(path: Path, seconds: float) -> None:
            self.events.add("checkpoint", step=progress.step, path=str(path), seconds=round(seconds, 3))
            self.save_times.saved(seconds)

        self.store.save(self.learner, progress, score, wait, say)


async def train(job: Training) -> str:
    """Train to the last step; returns why it ended. Raises TrainerError, or Interrupted when told to end.

    Whenever it ends between two updates, the state of that moment has been saved, unless it was told to stop.
    """
    config, learner = job.config, job.learner
    await job.interrupt.during(job.environment.wait_ready(config.runtime.ready_timeout))
    await synchronise(job)
    clock, best = Clock(), best_score(job)
    async with harvests(job) as field:
        while job.step < job.steps:
            # collect: every episode acts in a sandbox of its own
            with clock("rollout"):
                harvest = await field.next()
            episodes = harvest.episodes
            mask_stale(episodes, job.step, config.rollout.max_staleness)
            row: Row = {"step": job.step, **NO_UPDATE, **harvest.row, **summary(episodes)}
            row |= staleness(episodes, job.step)

            # log-probabilities and values before the update → advantages
            chosen = trainable(episodes, config.algorithm.truncated)
            if chosen:
                batch, division = deal(chosen, config.trainer, job.ranks)
                with clock("logprob"):
                    row |= await aside(job, learner.prepare, batch, division)

                # update: the critic always, the policy once the critic knows something
                with clock("update"):
                    row |= learner.pace(job.step, job.steps)
                    train_policy = job.step >= config.trainer.critic_warmup_steps
                    row |= await aside(job, learner.update, batch, division, train_policy)

            # bring the weights to the engine, and prove that it computes the same policy
            job.step += 1
            with clock("sync"):
                row["probe"] = await synchronise(job)

            # validate, log, save
            due = job.step % config.trainer.save_every == 0 or job.step == job.steps
            score = None
            if validation_due(job, due):
                with clock("validate"):
                    row |= await validate(job)
                score = row["validation/reward_mean"]
            row |= {**clock.row(), **speed(job, episodes, clock)}
            clock = Clock()
            row |= job.store.timings
            if job.ranks.first:
                write_rollouts(job.rollout_dir, job.step - 1, episodes)
                job.save_times.worked(row["time/total"] - row["time/rollout"])
            report(job, row)
            if due or (score is not None and score > best):
                best = max(best, -math.inf if score is None else score)
                job.save(capture(job.step, field.cursor, config), score, not config.trainer.async_save)
    job.store.wait()
    return f"{job.steps} steps done"


async def aside(job: Training, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Compute, in another thread where episodes are played meanwhile."""
    if not job.config.rollout.asynchronous:
        return work(*args, **kwargs)
    return await asyncio.to_thread(work, *args, **kwargs)


# --- validation --------------------------------------------------------------------------------------


def validation_due(job: Training, saving: bool) -> bool:
    """Every so many steps and after the last one, or wherever a checkpoint is due."""
    every = job.config.rollout.validate_every
    if not job.validation or every is None:
        return bool(job.validation) and saving
    return job.step % every == 0 or job.step == job.steps


async def validate(job: Training) -> Row:
    """Success on the validation tasks; nothing is learned from them. The same seeds each time."""
    rollouts = job.rollouts.for_validation(job.config)

    async def play(tasks: Sequence[Task], groups: Sequence[int]) -> tuple[list[Episode], int]:
        return await rollouts.collect(tasks, 0, groups=groups), 0

    episodes, _ = await shared(job.voice, job.interrupt, job.validation, (), play)
    if job.ranks.first:
        write_rollouts(job.rollout_dir, job.step, episodes, "validation")
    found = summary(episodes)
    names = ("success_rate", "reward_mean", "status/truncated", "status/infra", "length/response")
    return {f"validation/{name}": found[name] for name in names}


def best_score(job: Training) -> float:
    """Of the validations until now, as the store keeps it."""
    path = job.store.best()
    return job.ranks.broadcast_object(-math.inf if path is None else score_of(path))


# --- weights, log ------------------------------------------------------------------------------------


async def synchronise(job: Training) -> float:
    """Load the present weights into the engine and probe it. Returns nats. Raises MismatchError."""
    return await prove(job.engine, job.step, job.probe_prompt, job.config.trainer.mismatch_limit, job.ranks)


async def prove(engine: Engine, step: int, prompt: list[int], limit: float, ranks: Ranks) -> float:
    """Load the weights of `step` into the engine and probe it. Returns nats. Raises MismatchError when they
    are more than `limit`."""
    await engine.load(step)
    difference = float(ranks.max(torch.tensor(await engine.probe(prompt))))
    if not (math.isfinite(difference) and difference <= limit):
        raise MismatchError(
            f"after the weight sync of step {step} engine and trainer differ by {difference:.3g} nats, "
            f"allowed are {limit:g} (trainer.mismatch_limit): the engine does not sample from this policy"
        )
    return difference


def speed(job: Training, episodes: Sequence[Episode], clock: Clock) -> Row:
    """Tokens per second of the step and of its parts, and how long anything was sampled or run, whatever
    else was going on at the same time."""
    row, watched = clock.row(), job.rollouts.watch.take()
    sampled, every = sum(e.action_tokens for e in episodes), sum(len(e.ids) for e in episodes)
    generate, train = watched.get("generate", 0.0), row["time/train"]
    return {
        "time/generate": generate,
        "time/environment": watched.get("environment", 0.0),
        "tokens_per_s": sampled / max(row["time/total"], 1e-9),
        "tokens_per_s/generate": sampled / generate if generate else 0.0,
        "tokens_per_s/train": every / train if train else 0.0,
    }


def report(job: Training, row: Row) -> None:
    """Write the row, raise its alarms. Raises Collapsed on a fatal one."""
    job.metrics.log(row)
    shown = ("success_rate", "reward_mean", "kl", "entropy", "time/total")
    say(job, f"step {row['step']:>4}", *(f"{n} {row[n]:.3f}" for n in shown if n in row))
    stale = job.config.rollout.asynchronous
    found = alarms(row, job.metrics.rows[:-1], job.config.trainer.mismatch_limit, stale)
    for alarm in job.ranks.broadcast_object(found):
        job.events.add("alarm", step=row["step"], name=alarm.name, message=alarm.message, fatal=alarm.fatal)
        say(job, "alarm", f"{alarm.name}: {alarm.message}")
        if alarm.fatal:
            raise Collapsed(f"step {row['step']:.0f}: {alarm.message}")


def say(job: Training, *words: str) -> None:
    """To whoever looks at the log; one rank is enough."""
    if job.ranks.first:
        print(*words, sep="  ", flush=True)
