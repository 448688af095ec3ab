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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.contract import EventLog
from orchestrator.schema import Config
from trainer.batch import Batch, divide, trainable
from trainer.checkpoint import Checkpoints, Progress, capture
from trainer.data import Sampler
from trainer.engines import Engine
from trainer.environments import Environment
from trainer.episode import Episode
from trainer.errors import Collapsed, Lost, MismatchError, TrainerError
from trainer.interrupt import Interrupt, Interrupted, Wanted
from trainer.learner import Learner
from trainer.metrics import Clock, Metrics, Row, alarms
from trainer.rollout import Rollouts, summary
from trainer.tasks import Task
from trainer.view import write_rollouts

LOST_TRIES = 5
"""How often a step may lose most of its episodes, with a runtime that answers, before we give up."""
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
    steps: int
    step: int = 0
    validation: Sequence[Task] = ()
    interrupt: Interrupt = field(default_factory=Interrupt)
    pause_s: float = 1.0
    """Before a step that was lost is played again."""


async def train(job: Training) -> str:
    """Train to the last step; returns why it ended. Raises TrainerError, or Interrupted when told to end.

    Whenever it ends between two updates, the state of that moment has been saved, unless it was told to stop.
    """
    config, learner = job.config, job.learner
    await job.interrupt.during(job.environment.wait_ready(config.runtime.ready_timeout))
    await synchronise(job)
    clock = Clock()
    while job.step < job.steps:
        # collect: every episode acts in a sandbox of its own
        before = capture(job.step, job.sampler.state_dict(), config)
        tasks = [job.tasks[i] for i in job.sampler.take(config.rollout.prompts_per_step)]
        with clock("rollout"), saved_on_failure(job, before):
            episodes, lost = await job.interrupt.during(collect(job, tasks))
            await prefetch(job)
        row: Row = {"step": job.step, "lost_tries": lost, **NO_UPDATE, **summary(episodes)}

        # log-probabilities and values before the update → advantages
        chosen = trainable(episodes, config.algorithm.truncated)
        if chosen:
            batch = Batch.of(chosen)
            division = divide(batch.lengths, config.trainer.minibatches, config.trainer.micro_batch_tokens)
            with clock("logprob"):
                row |= learner.prepare(batch, division)

            # update: the critic always, the policy once the critic knows something
            with clock("update"):
                train_policy = job.step >= config.trainer.critic_warmup_steps
                row |= learner.update(batch, division, train_policy)

        # bring the weights to the engine, and prove that it computes the same policy
        job.step += 1
        with clock("sync"):
            row["probe"] = await synchronise(job)

        # log, save
        due = job.step % config.trainer.save_every == 0 or job.step == job.steps
        if due and job.validation:
            row |= await validate(job)
        row |= {**clock.row(), **speed(episodes, clock)}
        clock = Clock()
        write_rollouts(job.rollout_dir, job.step - 1, episodes)
        report(job, row)
        if due:
            save(job, capture(job.step, job.sampler.state_dict(), config))
    return f"{job.steps} steps done"


# --- collect -----------------------------------------------------------------------------------------


async def collect(job: Training, tasks: Sequence[Task]) -> tuple[list[Episode], int]:
    """Episodes of a step, at least half of them valid, and how many tries were lost before.

    A step that infrastructure spoiled moves nothing. When a runtime went down, what it took along is played
    again, whole, once it is back: the step is then the one that an undisturbed run would have had. Raises
    Lost when no runtime answers for `training.peer_grace` and `runtime.failover_timeout`, or when it answers
    and still loses everything.
    """
    episodes: Sequence[Episode] = ()
    for lost in range(LOST_TRIES):
        episodes = await job.rollouts.collect(tasks, job.step, episodes)
        valid = sum(episode.valid for episode in episodes)
        if valid == len(episodes) or (2 * valid >= len(episodes) and not await job.rollouts.disturbed()):
            return list(episodes), lost
        errors = sorted({episode.error for episode in episodes if not episode.valid})
        job.events.add("step_lost", step=job.step, valid=valid, episodes=len(episodes), errors=errors[:3])
        await asyncio.sleep(job.pause_s)
        wait_s = job.config.training.peer_grace + job.config.runtime.failover_timeout
        await job.environment.wait_ready(wait_s)
    raise Lost(
        f"step {job.step} lost most of its episodes {LOST_TRIES} times although the runtime answers, "
        f"last with: {errors[0]}. See the runtime's log"
    )


async def prefetch(job: Training) -> None:
    """While this step's update is made, the sandboxes of the next one get ready."""
    if job.step + 1 < job.steps:
        coming = job.sampler.peek(job.config.rollout.prompts_per_step)
        await job.rollouts.prefetch([job.tasks[i] for i in coming])


@contextmanager
def saved_on_failure(job: Training, before: Progress) -> Iterator[None]:
    """Until the update nothing has moved: whatever goes wrong, the state before the step is worth keeping."""
    try:
        yield
    except Interrupted as interrupted:
        if interrupted.wanted is Wanted.CHECKPOINT:
            save(job, before)
        raise
    except TrainerError:
        save(job, before)
        raise


async def validate(job: Training) -> Row:
    """Success on the validation tasks, sampled as in training; nothing is learned from them."""
    episodes = await job.rollouts.collect(job.validation, job.step)
    found = summary(episodes)
    return {f"validation/{name}": found[name] for name in ("success_rate", "reward_mean")}


# --- weights, log, save ------------------------------------------------------------------------------


async def synchronise(job: Training) -> float:
    """Load the present weights into the engine and probe it. Returns nats. Raises MismatchError."""
    await job.engine.load(job.step)
    difference = await job.engine.probe(job.probe_prompt)
    limit = job.config.trainer.mismatch_limit
    if not (math.isfinite(difference) and difference <= limit):
        raise MismatchError(
            f"after the weight sync of step {job.step} engine and trainer differ by {difference:.3g} nats, "
            f"allowed are {limit:g} (trainer.mismatch_limit): the engine does not sample from this policy"
        )
    return difference


def speed(episodes: Sequence[Episode], clock: Clock) -> Row:
    """Sampled tokens per second of the step, and the seconds that its episodes spent in sandboxes."""
    tokens = sum(episode.action_tokens for episode in episodes)
    parts = ("create_s", "setup_s", "command_s", "verify_s")
    environment = sum(episode.timings.get(part, 0.0) for episode in episodes for part in parts)
    total = clock.row()["time/total"]
    return {"tokens_per_s": tokens / max(total, 1e-9), "time/environment": environment}


def report(job: Training, row: Row) -> None:
    """Write the row, raise its alarms. Raises Collapsed on a fatal one."""
    job.metrics.log(row)
    shown = ("success_rate", "reward_mean", "kl", "entropy", "time/total")
    print(f"step {row['step']:>4}", *(f"{n} {row[n]:.3f}" for n in shown if n in row), sep="  ", flush=True)
    for alarm in alarms(row, job.metrics.rows[:-1], job.config.trainer.mismatch_limit):
        job.events.add("alarm", step=row["step"], name=alarm.name, message=alarm.message, fatal=alarm.fatal)
        print(f"alarm  {alarm.name}: {alarm.message}", flush=True)
        if alarm.fatal:
            raise Collapsed(f"step {row['step']:.0f}: {alarm.message}")


def save(job: Training, progress: Progress) -> None:
    """Write a checkpoint and say so."""
    path = job.store.save(job.learner, progress)
    job.events.add("checkpoint", step=progress.step, path=str(path))
