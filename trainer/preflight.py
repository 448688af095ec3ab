"""What a run cannot do, said before anything heavy is imported.

How to use it
    for line in problems(config): print(line)

What it does not do
    It loads no model and opens no data file: a model or a table that is broken inside shows later.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from orchestrator import plan_algorithm
from orchestrator.schema import Config
from trainer import loggers

BUILTIN = "builtin:"
TINY = "builtin:tiny"


def problems(config: Config) -> list[str]:
    """What makes this run impossible here, one line each with its remedy. Imports nothing heavy."""
    found = [*_scale(config), *_inputs(config), *plan_algorithm.contradictions(config)]
    found += loggers.missing(config.trainer.loggers)
    packages = ["torch", "transformers", "safetensors", "pyarrow", "tensorboard"]
    packages += ["vllm"] if config.rollout.engine == "vllm" else []
    if missing := [name for name in packages if find_spec(name) is None]:
        found.append(
            f"this interpreter lacks {', '.join(missing)}: install orchestrate-rl[trainer], or [trainer-cpu]"
        )
    return found


def _scale(config: Config) -> list[str]:
    gpus = config.training.nodes * config.training.gpus_per_node
    found = []
    if config.training.nodes > 1 or gpus > 1:
        found.append(
            f"the built-in trainer is one process with at most one GPU, the job has {config.training.nodes} "
            f"node(s) and {gpus} GPUs: set training.nodes=1 training.gpus_per_node=1"
        )
    if config.trainer.sequence_parallel_size > 1:
        found.append("one process shares no sequence: set trainer.sequence_parallel_size=1")
    return found


def _inputs(config: Config) -> list[str]:
    found = []
    for key, source in (("data.train", config.data.train), ("data.validation", config.data.validation)):
        if source and not source.startswith(BUILTIN) and not Path(source).is_file():
            found.append(f"{key}={source} is no file: name a parquet file of tasks, or builtin:NAME")
    path = config.model.path
    if path.startswith(BUILTIN) and path != TINY:
        found.append(f"model.path={path}: the only built-in model is {TINY}")
    if path.startswith(("/", "./", "../", "~")) and not (Path(path) / "config.json").is_file():
        found.append(f"model.path={path} holds no config.json: name a Hugging Face model directory")
    return found
