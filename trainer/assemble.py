"""From a configuration to the parts of a training, ready to run, or to go on from the newest checkpoint.

What it is
    The one place that knows which class stands for which word of the configuration.

How to use it
    job = assemble(run, config, interrupt, events); await train(job); await job.engine.close()

What it does not do
    It does not train and waits for no server (`trainer.train` does).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from orchestrator.contract import EventLog, RunDirectory
from orchestrator.schema import Config
from trainer.checkpoint import (
    Checkpoints,
    changed_keys,
    publish_directory,
    read_progress,
    restore,
)
from trainer.data import Sampler, steps_in
from trainer.distributed import device_of, engine_over, models, threads
from trainer.environments import Environment, open_environment
from trainer.errors import CheckpointError
from trainer.formats import Tokenizer, open_format
from trainer.interrupt import Interrupt
from trainer.learner import Learner
from trainer.loggers import open_loggers
from trainer.metrics import Metrics
from trainer.model import (
    ByteTokenizer,
    find_model,
    load_tokenizer,
    tiny_policy,
)
from trainer.preflight import TINY
from trainer.ranks import ALONE, Ranks, another_voice
from trainer.rollout import Rollouts
from trainer.saving import SaveTimes
from trainer.tasks import Task, load_tasks
from trainer.train import Training
from trainer.warmstart import warm_start
from trainer.weights import save_model


def assemble(
    run: RunDirectory,
    config: Config,
    interrupt: Interrupt,
    events: EventLog,
    world: Environment | None = None,
    ranks: Ranks = ALONE,
) -> Training:
    """Every part of the training, restored from the newest checkpoint unless `trainer.resume` is never.

    `world` is where episodes act; left out, the sandboxes of the run's runtime server. Raises TrainerError.
    """
    device, wanted = prepare_torch(config), config.trainer
    tasks, validation = ranks.first_then_others(lambda: open_tasks(config, run))
    folder = Path(wanted.checkpoint_dir or run.checkpoints)
    store = Checkpoints(folder, wanted.keep_checkpoints, wanted.keep_best, ranks)
    tokenizer, origin = ranks.first_then_others(lambda: find_origin(config, store, ranks.first))
    form = open_format(config, tokenizer, origin)  # refuses a template before anything heavy is loaded
    learner = Learner.of(config, *models(config, origin, device, ranks), ranks)
    learner.check = interrupt.check
    sampler = Sampler(len(tasks), config.run.seed, config.data.shuffle)
    torch.set_rng_state(ranks.broadcast_object(torch.get_rng_state()))  # one rank may have made the origin
    step = resume(config, store, learner, sampler, events)
    engine = engine_over(learner.policy, origin, config, device, ranks)
    world = world or open_environment("sandbox", config, run)
    return Training(
        config=config,
        learner=learner,
        engine=engine,
        environment=world,
        rollouts=Rollouts.of(config, engine, world, form),
        tasks=tasks,
        sampler=sampler,
        store=store,
        metrics=open_metrics(run, config, step, ranks),
        events=events,
        rollout_dir=Path(wanted.rollout_dir or run.rollouts),
        probe_prompt=form.prompt(tasks[0].messages or tasks[0].prompt),
        steps=wanted.total_steps
        or steps_in(len(tasks), config.rollout.prompts_per_step, wanted.total_epochs),
        step=step,
        validation=validation,
        interrupt=interrupt,
        ranks=ranks,
        voice=another_voice(ranks),
        save_times=SaveTimes(run),
    )


def open_tasks(config: Config, run: RunDirectory) -> tuple[Sequence[Task], Sequence[Task]]:
    """For training and for validation; a family's are made on the spot. Raises TaskError."""
    validation = config.data.validation
    functions = config.data.reward_functions
    tasks = load_tasks(config.data.train, run.training, functions)
    return tasks, load_tasks(validation, run.training, functions) if validation else ()


def open_metrics(run: RunDirectory, config: Config, step: int, ranks: Ranks) -> Metrics:
    """Of the run on rank 0. The others' rows say how long they took and waited; nobody else reads them."""
    if not ranks.first:
        return Metrics(run.training / f"rank-{ranks.rank}.jsonl", None, step)
    return Metrics(run.metrics, run.tensorboard, step, open_loggers(config.trainer.loggers, run, config))


def prepare_torch(config: Config) -> str:
    """Threads and seeds; returns the device."""
    torch.set_num_threads(threads(config))
    random.seed(config.run.seed)
    np.random.seed(config.run.seed % 2**32)
    torch.manual_seed(config.run.seed)
    return device_of(config.training.gpus_per_node)


def find_origin(config: Config, store: Checkpoints, may_make: bool = True) -> tuple[Tokenizer, Path]:
    """The tokenizer, and the directory of the model that training starts from and keeps as reference.

    The built-in model is made once, warm-started, and kept beside the checkpoints; only one rank may make it.
    """
    if config.model.path != TINY:
        folder = find_model(config.model.path)
        return load_tokenizer(folder), folder
    tokenizer, folder = ByteTokenizer(), store.root / "origin"
    if may_make and (config.trainer.resume == "never" or not folder.is_dir()):
        policy = tiny_policy(config.run.seed)
        warm_start(policy, config.model.warmstart_steps, config.run.seed, tokenizer)
        publish_directory(folder, lambda beside: save_model(policy, beside))
    return tokenizer, folder


def resume(config: Config, store: Checkpoints, learner: Learner, sampler: Sampler, events: EventLog) -> int:
    """Restore the newest checkpoint; returns its step, 0 without one. Raises CheckpointError, TaskError."""
    ranks = learner.ranks
    newest = ranks.broadcast_object(store.newest() if config.trainer.resume == "auto" else None)
    if newest is None:
        return 0
    changed = changed_keys(read_progress(newest).config, config.model_dump(mode="json"))
    if "model.path" in changed:
        raise CheckpointError(
            f"{newest} is of another model than {config.model.path}: name that one, "
            "choose another trainer.checkpoint_dir, or set trainer.resume=never"
        )
    progress = restore(newest, learner, ranks)
    sampler.load_state_dict(progress.cursor)
    events.add("resumed", step=progress.step, path=str(newest), changed=changed, digest=progress.digest)
    return progress.step
