"""What a run cannot do, said before anything heavy is imported.

How to use it
    for line in problems(config): print(line)

What it does not do
    It loads no model and opens no data file: a model or a table that is broken inside shows later.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from orchestrator import plan_algorithm, plan_checks
from orchestrator.schema import Config
from trainer import loggers

BUILTIN = "builtin:"
TINY = "builtin:tiny"
MODELS = (TINY, "builtin:smollm2")


def problems(config: Config) -> list[str]:
    """What makes this run impossible here, one line each with its remedy. Imports nothing heavy."""
    found = [*_scale(config), *_inputs(config), *plan_algorithm.contradictions(config)]
    found += plan_checks.evaluation(config)
    found += loggers.missing(config.trainer.loggers)
    packages = ["torch", "transformers", "safetensors", "pyarrow", "tensorboard"]
    packages += ["vllm"] if config.rollout.engine == "vllm" else []
    if missing := [name for name in packages if find_spec(name) is None]:
        found.append(
            f"this interpreter lacks {', '.join(missing)}: install orchestrate-rl[trainer], or [trainer-cpu]"
        )
    return found


def _scale(config: Config) -> list[str]:
    sp, tp, found = config.trainer.sequence_parallel_size, config.rollout.tensor_parallel_size, []
    if sp > 1:
        found.append(
            f"this trainer splits no sequence over {sp} GPUs: set trainer.sequence_parallel_size=1 "
            "(SP_SIZE=1). For long sequences set trainer.packing=true trainer.activation_checkpointing=true, "
            "or take more GPUs, over which weights, gradients and moments are sharded"
        )
    if tp > 1:
        found.append(
            f"rollout.tensor_parallel_size={tp}: each process samples with an engine of its own on its GPU. "
            "Set it to 1; a model that needs several GPUs to sample from is not for this trainer"
        )
    several = config.training.nodes * max(config.training.gpus_per_node, 1) > 1
    if several and config.rollout.asynchronous:
        found.append(
            "rollout.asynchronous is for one training process: set rollout.asynchronous=false, or "
            "training.nodes=1 training.gpus_per_node=1"
        )
    if config.model.lora_rank and find_spec("peft") is None:
        found.append("model.lora_rank needs peft: install orchestrate-rl[lora], or set model.lora_rank=0")
    return found


def _inputs(config: Config) -> list[str]:
    found = []
    sources = {"data.validation": config.data.validation}
    if not config.evaluation.wanted:
        sources |= {"data.train": config.data.train}
    for key, source in sources.items():
        if source and not source.startswith(BUILTIN) and not Path(source).is_file():
            found.append(f"{key}={source} is no file: name a parquet file of tasks, or builtin:NAME")
    path = config.model.path
    if path.startswith(BUILTIN) and path not in MODELS:
        found.append(f"model.path={path}: the built-in models are {' and '.join(MODELS)}")
    if path.startswith(("/", "./", "../", "~")) and not (Path(path) / "config.json").is_file():
        found.append(f"model.path={path} holds no config.json: name a Hugging Face model directory")
    return found
