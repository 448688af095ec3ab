"""`python -m trainer --run-dir R`: train as the run's `config.yaml` says, to the end or to the next restart.

What it is
    The training command of a run: reads the frozen configuration, sets the environment that torch and
    vLLM read when they are imported, trains, or evaluates (`evaluation.k`), writes `training/summary.json`,
    and says by its exit code how it ended (`orchestrator.records.Exit`):
        0    all steps are done
        64   the configuration or a file that it names is wrong; nothing was trained
        66   no run directory, or no config.yaml in it
        69   no runtime server answers, or episodes are lost all the time; a checkpoint was written
        70   the training stopped itself: collapse, engine and trainer disagree, engine died
        85   asked by SIGUSR1, SIGUSR2, SIGTERM, the run directory or trainer.autoresume_after:
             a checkpoint was written, please requeue
        143  SIGINT or a second request arrived: stopped at once; the last regular checkpoint is there

How to use it
    python -m trainer --run-dir R           train
    python -m trainer --run-dir R --check   say what would go wrong, import nothing heavy
    The sandbox server is found as `trainer.environments.address` says.

What it does not do
    It submits nothing and writes neither `result.json` nor the completion flag: the job around it does.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.contract import Env, Evaluation, Exit, Manifest, Role, RunDirectory, publish_bytes
from trainer import errors
from trainer.errors import TrainerError
from trainer.interrupt import Interrupt, Interrupted, Wanted

if TYPE_CHECKING:
    from orchestrator.contract import EventLog
    from orchestrator.schema import Config
    from trainer.evaluate import Evaluating
    from trainer.ranks import Ranks
    from trainer.train import Training

CODES: dict[type[TrainerError], Exit] = {
    errors.TaskError: Exit.USAGE,
    errors.ModelError: Exit.USAGE,
    errors.CheckpointError: Exit.USAGE,
    errors.Refused: Exit.USAGE,
    errors.EnvironmentFailure: Exit.PEER_GONE,
    TrainerError: Exit.SOFTWARE,
}
"""Exit code by kind of error; the first that fits counts."""
CLOSE_TIMEOUT_S = 10.0


class Unusable(Exception):
    """The run directory cannot be used; carries the exit code."""

    def __init__(self, message: str, code: Exit) -> None:
        super().__init__(message)
        self.code = code


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m trainer",
        description="PPO with rollouts in sandboxes, as the config.yaml of a run says.",
    )
    parser.add_argument("--run-dir", type=Path, default=os.environ.get(Env.RUN_DIR), help="the run directory")
    parser.add_argument("--check", action="store_true", help="check configuration and inputs, then exit")
    given = parser.parse_args(arguments)
    if given.run_dir is None:
        print(f"error: no run directory; give --run-dir, or set {Env.RUN_DIR}", file=sys.stderr)
        return Exit.USAGE
    try:
        run = RunDirectory(given.run_dir)
        config = read_config(run)
    except Unusable as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    if given.check:
        print(f"{run.config}: nothing is wrong with it here")
        return Exit.OK
    return work(run, config)


def read_config(run: RunDirectory) -> Config:
    """The frozen configuration, checked. Raises Unusable."""
    import yaml

    from orchestrator.schema import Config
    from orchestrator.typed import Invalid
    from trainer.preflight import problems

    if not run.config.is_file():
        raise Unusable(f"{run.root} holds no config.yaml; `orchestrate launch` makes one", Exit.NO_INPUT)
    try:
        config = Config.model_validate(yaml.safe_load(run.config.read_text()) or {})
    except (yaml.YAMLError, Invalid) as error:
        raise Unusable(f"{run.config}: {error}", Exit.USAGE) from error
    if found := problems(config):
        raise Unusable("\n".join(found), Exit.USAGE)
    return config


def work(run: RunDirectory, config: Config) -> int:
    """Train, and leave a summary whatever happens."""
    level = logging.DEBUG if config.environment.debug else logging.INFO
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    for noisy in ("httpx", "httpcore", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    set_environment(run, config)
    interrupt, start = Interrupt(), time.monotonic()
    interrupt.listen()
    interrupt.watch(lambda: checkpoint_wanted(run, config, start))
    try:
        code, reason = asyncio.run(_work(run, config, interrupt))
    except Interrupted as interrupted:  # before there was anything to save
        code, reason = ended_by(interrupted, config.evaluation.wanted)
    except TrainerError as error:
        code, reason = code_of(error), str(error)
        print(f"error: {error}", file=sys.stderr)
    except Exception as error:
        # As broad as can be, for it is raised again: whatever it was, the summary must not stay that of an
        # earlier attempt.
        summarise(run, f"{type(error).__name__}: {error}", start)
        raise
    summarise(run, reason, start)
    return code


def checkpoint_wanted(run: RunDirectory, config: Config, start: float) -> bool:
    """Whether the job around us asks for a checkpoint by file, naming this life, or our time is up."""
    after, nonce = config.trainer.autoresume_after, os.environ.get(Env.NONCE, "")
    if after is not None and time.monotonic() - start >= after:
        return True
    with contextlib.suppress(OSError):  # the filesystem hiccups; the next look decides
        return bool(nonce) and run.read_text(run.checkpoint_request) == nonce
    return False


def set_environment(run: RunDirectory, config: Config) -> None:
    """Variables that torch and vLLM read when they are imported; what is set already stays."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    threads = str(config.trainer.threads or max(1, config.training.cpus // processes))
    wanted = {
        "OMP_NUM_THREADS": threads,
        # How long a thread that waits for the others spins before it sleeps. By default almost for ever: when
        # sandboxes or other jobs use the same CPUs, the spinning ones keep the working one from running.
        "GOMP_SPINCOUNT": "1000",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the weights must be live in this process
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "INFO" if config.environment.debug else "ERROR",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    for name, value in wanted.items():
        os.environ.setdefault(name, value)
    manifest = run.read(run.manifest, Manifest)
    if manifest is not None and manifest.mode == "run":
        # The server's address at the start of this job. It may come back at another one, which the run
        # directory tells; a variable that never changes would hide it.
        os.environ.pop(Env.RUNTIME_URL, None)


async def _work(run: RunDirectory, config: Config, interrupt: Interrupt) -> tuple[int, str]:
    from transformers.utils import logging as hugging_face

    from trainer.distributed import join

    hugging_face.disable_progress_bar()
    ranks = join(config.trainer.ranks_timeout)
    events = run.events_of(Role.TRAINING, "trainer" if ranks.first else f"trainer-{ranks.rank}")
    events.attempt = int(os.environ.get(Env.ATTEMPT, "0") or 0)
    work = _evaluate if config.evaluation.wanted else _train
    return Exit.OK, await work(run, config, interrupt, events, ranks)


async def _train(
    run: RunDirectory, config: Config, interrupt: Interrupt, events: EventLog, ranks: Ranks
) -> str:
    from trainer.assemble import assemble
    from trainer.train import train

    job = assemble(run, config, interrupt, events, ranks=ranks)
    events.add("assembled", step=job.step, steps=job.steps, engine=config.rollout.engine)
    try:
        with interrupt.deferred():
            return await train(job)
    finally:
        await close(job)


async def _evaluate(
    run: RunDirectory, config: Config, interrupt: Interrupt, events: EventLog, ranks: Ranks
) -> str:
    from trainer.evaluate import evaluate, evaluation

    job = evaluation(run, config, interrupt, events, ranks=ranks)
    events.add("assembled", step=job.step, tasks=len(job.tasks), engine=config.rollout.engine)
    try:
        with interrupt.deferred():
            return await evaluate(job)
    finally:
        await close(job)


async def close(job: Training | Evaluating) -> None:
    """Remove the sandboxes, end the engine, flush the curves."""
    from trainer.distributed import leave

    with contextlib.suppress(TimeoutError):  # what is not removed by then, the server removes by its TTL
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await job.environment.close()
    await job.engine.close()
    job.close()
    leave(job.ranks)


def ended_by(interrupted: Interrupted, evaluates: bool = False) -> tuple[int, str]:
    """Exit code and reason of a training, or an evaluation, that was told to end."""
    if interrupted.wanted is Wanted.CHECKPOINT:
        kept = "told to end for now; what is judged is kept" if evaluates else ""
        return Exit.REQUEUE, kept or "a checkpoint was asked for and written"
    return 143, "told to stop"


def code_of(error: TrainerError) -> Exit:
    return next(code for kind, code in CODES.items() if isinstance(error, kind))


def summarise(run: RunDirectory, reason: str, start: float) -> None:
    """`training/summary.json`: the last word, for the result of the run."""
    from orchestrator.contract import read_json_lines

    if int(os.environ.get("RANK", "0")):
        return  # rank 0 speaks for all
    rows = read_json_lines(run.metrics)
    metrics: dict[str, float] = {"steps": len(rows), "seconds": time.monotonic() - start}
    for name in ("success_rate", "reward_mean", "tokens_per_s", "time/total"):
        values = [row[name] for row in rows if row.get(name) is not None]
        if values:
            metrics |= {f"{name}_first": _mean(values[:3]), f"{name}_last": _mean(values[-10:])}
    evaluation = run.read(run.evaluation, Evaluation)
    if evaluation is not None and evaluation.complete:
        metrics |= {"tasks": evaluation.tasks, "judged": evaluation.judged, "lost": evaluation.lost}
        estimates = {f"pass@{k}": one["value"] for k, one in evaluation.pass_at.items()}
        metrics |= {name: value for name, value in estimates.items() if value is not None}
    summary = {"metrics": metrics, "reason": reason}
    publish_bytes(run.summary, (json.dumps(summary, indent=2) + "\n").encode())


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    sys.exit(main())
