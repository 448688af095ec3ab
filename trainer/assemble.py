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
from trainer.engines import open_engine
from trainer.environments import Environment, open_environment
from trainer.errors import CheckpointError
from trainer.formats import Tokenizer, open_format
from trainer.interrupt import Interrupt
from trainer.learner import Learner, needs_critic, needs_reference
from trainer.loggers import open_loggers
from trainer.metrics import Metrics
from trainer.model import (
    ByteTokenizer,
    find_model,
    freeze,
    load_policy,
    load_tokenizer,
    make_critic,
    tiny_policy,
)
from trainer.preflight import TINY
from trainer.rollout import Rollouts
from trainer.tasks import load_tasks
from trainer.train import Training
from trainer.warmstart import warm_start
from trainer.weights import save_model


def assemble(
    run: RunDirectory,
    config: Config,
    interrupt: Interrupt,
    events: EventLog,
    world: Environment | None = None,
) -> Training:
    """Every part of the training, restored from the newest checkpoint unless `trainer.resume` is never.

    `world` is where episodes act; left out, the sandboxes of the run's runtime server. Raises TrainerError.
    """
    device, wanted = prepare_torch(config), config.trainer
    tasks = load_tasks(config.data.train, run.training)
    store = Checkpoints(Path(wanted.checkpoint_dir or run.checkpoints), wanted.keep_checkpoints)
    tokenizer, origin = find_origin(config, store)
    form = open_format(config, tokenizer, origin)  # refuses a template before anything heavy is loaded
    policy = load_policy(origin, device)
    reference = freeze(load_policy(origin, device)) if needs_reference(config.algorithm) else None
    critic = make_critic(policy) if needs_critic(config.algorithm) else None
    learner = Learner.of(config, policy, critic, reference)
    learner.check = interrupt.check
    sampler = Sampler(len(tasks), config.run.seed, config.data.shuffle)
    step = resume(config, store, learner, sampler, events)
    engine = open_engine(config.rollout.engine, policy, origin, config)
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
        metrics=Metrics(run.metrics, run.tensorboard, step, open_loggers(wanted.loggers, run, config)),
        events=events,
        rollout_dir=Path(wanted.rollout_dir or run.rollouts),
        probe_prompt=form.prompt(tasks[0].messages or tasks[0].prompt),
        steps=wanted.total_steps
        or steps_in(len(tasks), config.rollout.prompts_per_step, wanted.total_epochs),
        step=step,
        validation=load_tasks(config.data.validation, run.training) if config.data.validation else (),
        interrupt=interrupt,
    )


def prepare_torch(config: Config) -> str:
    """Threads and seeds; returns the device."""
    torch.set_num_threads(config.trainer.threads or config.training.cpus)
    random.seed(config.run.seed)
    np.random.seed(config.run.seed % 2**32)
    torch.manual_seed(config.run.seed)
    return "cuda" if config.training.gpus_per_node and torch.cuda.is_available() else "cpu"


def find_origin(config: Config, store: Checkpoints) -> tuple[Tokenizer, Path]:
    """The tokenizer, and the directory of the model that training starts from and keeps as reference.

    The built-in model is made once, warm-started, and kept beside the checkpoints.
    """
    if config.model.path != TINY:
        folder = find_model(config.model.path)
        return load_tokenizer(folder), folder
    tokenizer, folder = ByteTokenizer(), store.root / "origin"
    if config.trainer.resume == "never" or not folder.is_dir():
        policy = tiny_policy(config.run.seed)
        warm_start(policy, config.model.warmstart_steps, config.run.seed, tokenizer)
        publish_directory(folder, lambda beside: save_model(policy, beside))
    return tokenizer, folder


def resume(config: Config, store: Checkpoints, learner: Learner, sampler: Sampler, events: EventLog) -> int:
    """Restore the newest checkpoint; returns its step, 0 without one. Raises CheckpointError, TaskError."""
    newest = store.newest() if config.trainer.resume == "auto" else None
    if newest is None:
        return 0
    changed = changed_keys(read_progress(newest).config, config.model_dump(mode="json"))
    if "model.path" in changed:
        raise CheckpointError(
            f"{newest} is of another model than {config.model.path}: name that one, "
            "choose another trainer.checkpoint_dir, or set trainer.resume=never"
        )
    progress = restore(newest, learner)
    sampler.load_state_dict(progress.cursor)
    events.add("resumed", step=progress.step, path=str(newest), changed=changed, digest=progress.digest)
    return progress.step
