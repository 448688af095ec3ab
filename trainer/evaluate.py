"""Evaluation: sample every task several times in real sandboxes, judge, and say pass@k. Nothing is learned.

What it is
    What `python -m trainer` does when `evaluation.k` is set. `evaluation` makes the parts: policy, engine,
    sandboxes, rollouts as validation has them; no critic, no optimiser, no reference. `evaluate` plays what
    is not judged yet and writes `training/evaluation.json`, and the trajectories as those of a validation.

How to use it
    orchestrate eval RUN|MODEL --data FILE --samples 8 --k 1,4,8
    job = evaluation(run, config, interrupt, events); await evaluate(job); await job.engine.close()

What it does not do
    An episode that infrastructure lost is played again; one that stays lost is counted as lost and never as
    a failure. Told to end, it leaves what it has judged (`trainer.judged`), and a next life goes on there.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean

from orchestrator.checkpoints import step_of
from orchestrator.contract import Env, Evaluation, EventLog, RunDirectory
from orchestrator.frozen import replace
from orchestrator.schema import Config
from trainer import judged
from trainer.assemble import find_origin, prepare_torch
from trainer.checkpoint import Checkpoints
from trainer.distributed import engine_over, policy_alone
from trainer.engines import Engine
from trainer.environments import Environment, open_environment
from trainer.episode import Episode, Status
from trainer.errors import CheckpointError, Lost
from trainer.formats import Tokenizer, open_format
from trainer.interrupt import Interrupt
from trainer.judged import Journal
from trainer.model import ByteTokenizer, find_model, load_tokenizer
from trainer.passk import Counted, over_tasks
from trainer.preflight import TINY
from trainer.ranks import ALONE, Ranks, another_voice
from trainer.rollout import Rollouts
from trainer.tasks import Task, load_tasks
from trainer.together import shared
from trainer.train import prove
from trainer.view import Line, line, write_lines

TRIES = 5
"""How often an episode that infrastructure loses is played, each time in several fresh sandboxes."""
AT_ONCE = 4096
"""Episodes that are waiting or running at the same time; many more would cost more to look after."""
SUCCESS = 0.5
"""A reward above this solves the task, as everywhere."""
PACKAGES = ("orchestrate-rl", "torch", "transformers", "vllm")


@dataclass
class Evaluating:
    """The parts of an evaluation. `begun` is its record before anything is known, `known` what earlier lives
    have judged, by number."""

    run: RunDirectory
    config: Config
    engine: Engine
    environment: Environment
    rollouts: Rollouts
    tasks: Sequence[Task]
    events: EventLog
    probe_prompt: list[int]
    begun: Evaluation
    known: dict[int, Line]
    journal: Journal
    interrupt: Interrupt = field(default_factory=Interrupt)
    ranks: Ranks = ALONE
    voice: Ranks = ALONE
    pause_s: float = 1.0
    """Before what was lost is played again."""

    @property
    def step(self) -> int:
        """Of the policy; 0 of one that was not trained here."""
        return self.begun.step or 0

    def close(self) -> None:
        """Nothing is open: each episode is on the disk as soon as it is judged."""


def evaluation(
    run: RunDirectory,
    config: Config,
    interrupt: Interrupt,
    events: EventLog,
    world: Environment | None = None,
    ranks: Ranks = ALONE,
) -> Evaluating:
    """Every part, and what earlier lives have judged. Collective. Raises TrainerError."""
    device = prepare_torch(config)
    tasks = ranks.first_then_others(
        lambda: load_tasks(config.data.validation, run.training, config.data.reward_functions)
    )
    tokenizer, origin, weights = ranks.first_then_others(lambda: find_weights(config, run, ranks.first))
    form = open_format(config, tokenizer, origin)
    begun = ranks.broadcast_object(described(config, run, tasks, weights) if ranks.first else None)
    assert begun is not None  # rank 0 has said it
    about = identity(begun)
    policy = policy_alone(config, weights, device, ranks)
    world = world or open_environment("sandbox", config, run)
    engine = engine_over(policy, weights, config, device, ranks)
    return Evaluating(
        run=run,
        config=config,
        engine=engine,
        environment=world,
        rollouts=Rollouts.of(config, engine, world, form).for_validation(config, "evaluation/"),
        tasks=tasks,
        events=events,
        probe_prompt=form.prompt(tasks[0].messages or tasks[0].prompt),
        begun=begun,
        known=ranks.broadcast_object(judged.read(run, about) if ranks.first else {}),
        journal=Journal(run.judged_by(begun.attempt, ranks.rank), about),
        interrupt=interrupt,
        ranks=ranks,
        voice=another_voice(ranks),
    )


def find_weights(config: Config, run: RunDirectory, may_make: bool = True) -> tuple[Tokenizer, Path, Path]:
    """The tokenizer, the directory that it and the chat template are from, and that of the weights."""
    if not config.evaluation.checkpoint:
        tokenizer, origin = find_origin(config, Checkpoints(run.checkpoints), may_make)
        return tokenizer, origin, origin
    if not run.evaluated.is_dir():
        raise CheckpointError(
            f"{run.evaluated} is missing: the launcher puts the policy of {config.evaluation.checkpoint} "
            "there. Launch the evaluation again"
        )
    if config.model.path == TINY:
        return ByteTokenizer(), run.evaluated, run.evaluated
    origin = find_model(config.model.path)
    return load_tokenizer(origin), origin, run.evaluated


def described(config: Config, run: RunDirectory, tasks: Sequence[Task], weights: Path) -> Evaluation:
    """What is evaluated, and how; reads all of the weights and of the data for their digests."""
    checkpoint = config.evaluation.checkpoint
    return Evaluation(
        run_id=run.run_id,
        attempt=int(os.environ.get(Env.ATTEMPT, "0") or 0),
        tasks=len(tasks),
        samples=config.rollout.validation_rollouts,
        temperature=config.rollout.temperature,
        greedy=config.rollout.validation_greedy,
        seed=config.run.seed,
        engine=config.rollout.engine,
        model=config.model.path,
        checkpoint=checkpoint,
        step=step_of(Path(checkpoint)) if checkpoint else None,
        weights=judged.digest_of_weights(weights),
        data=config.data.validation,
        data_digest=judged.digest_of_tasks(config.data.validation, tasks),
        versions=versions(),
    )


def identity(begun: Evaluation) -> judged.About:
    """What two lives must have in common for the episodes of one to count for the other."""
    names = ("weights", "data_digest", "tasks", "samples", "temperature", "greedy", "seed")
    return {name: getattr(begun, name) for name in names}


def versions() -> dict[str, str]:
    """Of what makes a difference to the numbers."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


# --- the evaluation ----------------------------------------------------------------------------------


async def evaluate(job: Evaluating) -> str:
    """Play what is not judged yet and publish the result; returns it in a line. Raises TrainerError, or
    Interrupted when told to end: what is judged by then is kept."""
    if job.ranks.first:
        job.run.publish(job.run.evaluation, job.begun)
    left = missing(job)
    job.events.add("evaluating", tasks=len(job.tasks), judged=len(job.known), tasks_left=len(left))
    await job.interrupt.during(job.environment.wait_ready(job.config.runtime.ready_timeout))
    await prove(job.engine, job.step, job.probe_prompt, job.config.trainer.mismatch_limit, job.ranks)

    async def play_mine(tasks: Sequence[Task], groups: Sequence[int]) -> tuple[list[Line], int]:
        return await play(job, tasks, groups), 0

    tasks = [job.tasks[group] for group in left]
    found = await job.interrupt.during(shared(job.voice, job.interrupt, tasks, left, play_mine))
    lines = job.known | {one["number"]: one for one in found.episodes}
    result = concluded(job, [lines[number] for number in sorted(lines)])
    if job.ranks.first:
        write_lines(job.run.rollouts, job.step, [lines[number] for number in sorted(lines)], "validation")
        job.run.publish(job.run.evaluation, result)
    job.events.add("evaluated", judged=result.judged, lost=result.lost, pass_at=result.pass_at)
    if not result.judged:
        raise Lost(
            f"all {result.lost} episodes were lost to infrastructure, {TRIES} times. See the runtime's log"
        )
    return said(result)


def missing(job: Evaluating) -> list[int]:
    """Tasks, by their place, that have samples which are not judged."""
    samples = job.begun.samples
    return [
        group
        for group in range(len(job.tasks))
        if any(group * samples + n not in job.known for n in range(samples))
    ]


async def play(job: Evaluating, tasks: Sequence[Task], groups: Sequence[int]) -> list[Line]:
    """This rank's share, so many episodes at a time: a line for each that was judged, or stayed lost."""
    found: list[Line] = []
    size = max(1, AT_ONCE // job.begun.samples)
    for start in range(0, len(tasks), size):
        found += await play_some(job, tasks[start : start + size], groups[start : start + size])
    return found


async def play_some(job: Evaluating, tasks: Sequence[Task], groups: Sequence[int]) -> list[Line]:
    """These tasks; what infrastructure loses is played again once the runtime answers."""
    found: list[Line] = []
    mine = set(groups)

    def keep(episode: Episode) -> None:
        told = line(episode)
        job.journal.add(told)
        found.append(told)
        for tokens in (episode.ids, episode.mask, episode.logprobs):
            tokens.clear()  # nobody trains on them, and thousands of long episodes would fill the memory

    episodes = judged.as_known(one for one in job.known.values() if one["group"] in mine)
    for again in range(TRIES):
        if again:
            await asyncio.sleep(job.pause_s)
            await job.environment.wait_ready(
                job.config.training.peer_grace + job.config.runtime.failover_timeout
            )
        episodes = await job.rollouts.collect(tasks, 0, episodes, groups, seen=keep)
        lost = [episode for episode in episodes if not episode.valid]
        if not lost:
            break
        errors = sorted({episode.error for episode in lost})
        job.events.add("episodes_lost", lost=len(lost), episodes=len(episodes), errors=errors[:3])
    return found + [line(episode) for episode in lost]


# --- the result --------------------------------------------------------------------------------------


def concluded(job: Evaluating, lines: Sequence[Line]) -> Evaluation:
    """The record with what came of it."""
    valid = [one for one in lines if one["status"] != Status.INFRA]
    samples = Counter(one["group"] for one in valid)
    successes = Counter(one["group"] for one in valid if one["reward"] > SUCCESS)
    counted = [Counted(task.id, samples[i], successes[i]) for i, task in enumerate(job.tasks)]
    return replace(
        job.begun,
        complete=True,
        judged=len(valid),
        lost=len(lines) - len(valid),
        pass_at=over_tasks(counted, job.config.evaluation.ks),
        reward_mean=fmean(one["reward"] for one in valid) if valid else None,
        by_task=[one._asdict() for one in counted],
        at=time.time(),
    )


def said(result: Evaluation) -> str:
    """In a line, for the reason of the run's end."""
    estimates = [
        f"pass@{k} {one['value']:.3f}" for k, one in result.pass_at.items() if one["value"] is not None
    ]
    lost = f"; {result.lost} episodes stayed lost to infrastructure" if result.lost else ""
    return f"{result.tasks} tasks × {result.samples} samples: {', '.join(estimates) or 'none judged'}{lost}"
