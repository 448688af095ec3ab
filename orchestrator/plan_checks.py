"""Numbers of a configuration that contradict each other, each with the fix named.

What it is
    Pure functions of a `Config`: `contradictions` are refused, `worries` are printed and accepted.

What it does not do
    It checks no single value (the schema does) and looks at no machine (`orchestrator.launch` does).
"""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator import plan_algorithm
from orchestrator.plan_slurm import refused
from orchestrator.quantities import clock
from orchestrator.schema import Config


def contradictions(config: Config, mode: str) -> list[str]:
    """What makes a run impossible, one line each, with the assignment that mends it."""
    found = [*_lengths(config), *_batches(config), *_devices(config), *_times(config, mode)]
    found += _processes(config) if "training" in roles_of(mode) else []
    found += plan_algorithm.contradictions(config) if "training" in roles_of(mode) else []
    found += evaluation(config) if "training" in roles_of(mode) else []
    return [*found, *_sandboxes(config), *_scheduler(config)]


def worries(config: Config, mode: str) -> list[str]:
    """What will work, but probably not as meant."""
    found = [*_capacity(config), *_walltimes(config, mode), *_cpu_training(config)]
    return [*found, *(plan_algorithm.worries(config) if "training" in roles_of(mode) else ())]


def gpus(config: Config) -> int:
    """GPUs of the training job over all its nodes."""
    return config.training.nodes * config.training.gpus_per_node


def launcher_of(config: Config) -> str:
    """How the training processes start: none (one process) or torchrun."""
    training = config.training
    several = training.nodes > 1 or training.gpus_per_node > 1
    return training.launcher if training.launcher != "auto" else "torchrun" if several else "none"


def totals(config: Config) -> list[str]:
    """What is configured per GPU or per node, with what it comes to over the whole training job."""
    training, processes = config.training, config.training.nodes * max(1, config.training.gpus_per_node)
    if processes == 1:
        return []
    shape = f"{training.nodes} nodes × {max(1, training.gpus_per_node)}"
    tokens = config.trainer.micro_batch_tokens
    return [
        f"{shape} = {processes} training processes ({launcher_of(config)})",
        f"{training.cpus} CPUs × {training.nodes} nodes = {training.cpus * training.nodes} CPUs, "
        f"{training.cpus // max(1, training.gpus_per_node)} a process",
        f"{tokens} tokens a GPU × {processes} = {tokens * processes} tokens per forward pass",
    ]


# --- refused -----------------------------------------------------------------------------------------


def _lengths(config: Config) -> Iterator[str]:
    rollout, trainer = config.rollout, config.trainer
    if rollout.max_tokens_per_turn > rollout.max_response_length:
        yield (
            f"one turn may sample {rollout.max_tokens_per_turn} tokens but an episode holds only "
            f"{rollout.max_response_length}: set rollout.max_tokens_per_turn={rollout.max_response_length} "
            f"or less"
        )
    longest = rollout.max_prompt_length + rollout.max_response_length
    if trainer.micro_batch_tokens < longest:
        yield (
            f"an episode may be {longest} tokens long (prompt and response) and does not fit into a forward "
            f"pass of {trainer.micro_batch_tokens}: set trainer.micro_batch_tokens={longest} or more"
        )


def _batches(config: Config) -> Iterator[str]:
    episodes = config.rollout.prompts_per_step * config.rollout.rollouts_per_prompt
    if config.trainer.minibatches > episodes:
        yield (
            f"{episodes} episodes a step ({config.rollout.prompts_per_step} prompts × "
            f"{config.rollout.rollouts_per_prompt}) cannot fill {config.trainer.minibatches} minibatches: "
            f"set trainer.minibatches={episodes} or less, or rollout.prompts_per_step higher"
        )
    replicas = max(1, gpus(config) // config.trainer.sequence_parallel_size)
    if episodes < replicas:
        yield (
            f"{episodes} episodes a step leave some of {replicas} training replicas without work: "
            f"set rollout.rollouts_per_prompt={-(-replicas // config.rollout.prompts_per_step)} or more"
        )


def _devices(config: Config) -> Iterator[str]:
    per_node, total = config.training.gpus_per_node, gpus(config)
    tensor, sequence = config.rollout.tensor_parallel_size, config.trainer.sequence_parallel_size
    if (per_node or 1) % tensor:
        yield (
            f"rollout.tensor_parallel_size={tensor} does not divide the {per_node} GPUs of a node: "
            f"set it to {_divisors(per_node or 1)}, or training.gpus_per_node={tensor}"
        )
    if (total or 1) % sequence:
        yield (
            f"trainer.sequence_parallel_size={sequence} does not divide the {total} GPUs of the training "
            f"job: set it to {_divisors(total or 1)}"
        )
    if not per_node and config.rollout.engine == "vllm" and config.rollout.kv_cache_bytes is None:
        yield (
            "vLLM on CPUs must be told how much memory its cache takes: "
            "set rollout.kv_cache_bytes=1073741824 (1 GiB), or rollout.engine=torch"
        )
    if not per_node and config.training.gpu_type:
        yield f"training.gpu_type={config.training.gpu_type} without GPUs: set training.gpus_per_node=1"


def _processes(config: Config) -> Iterator[str]:
    """Nodes, tasks and GPUs: one task on each node, which starts one process for each of its GPUs."""
    training, per_node = config.training, max(1, config.training.gpus_per_node)
    if launcher_of(config) == "none" and training.nodes > 1:
        yield (
            f"training.launcher=none starts one process, and {training.nodes - 1} of {training.nodes} nodes "
            f"would stay idle: set training.launcher=torchrun, or training.nodes=1"
        )
    if launcher_of(config) == "none" and per_node > 1:
        yield (
            f"training.launcher=none starts one process for {per_node} GPUs: "
            f"set training.launcher=torchrun, or training.gpus_per_node=1"
        )
    if training.cpus < per_node:
        yield (
            f"{per_node} processes a node (one per GPU) share {training.cpus} CPUs: "
            f"set training.cpus={per_node} or more"
        )


def evaluation(config: Config) -> Iterator[str]:
    """What makes an evaluation impossible; the trainer asks the same."""
    wanted, samples = config.evaluation, config.rollout.validation_rollouts
    if wanted.checkpoint and not wanted.wanted:
        yield "evaluation.checkpoint is for an evaluation: set evaluation.k=1, or leave it empty"
    if not wanted.wanted:
        return
    if not config.data.validation:
        yield "an evaluation needs tasks: set data.validation to a parquet file, or builtin:NAME"
    if (most := wanted.ks[-1]) > samples:
        yield (
            f"pass@{most} cannot be estimated from {samples} sample(s) of each task: set "
            f"rollout.validation_rollouts={most} (--samples {most}) or more, or leave {most} out of "
            "evaluation.k (--k)"
        )
    if config.rollout.validation_greedy and samples > 1:
        yield (
            f"rollout.validation_greedy makes all {samples} samples of a task the same: set it to false, or "
            "rollout.validation_rollouts=1 (--samples 1)"
        )


def _divisors(number: int) -> str:
    return " or ".join(str(n) for n in range(1, number + 1) if number % n == 0)


def _times(config: Config, mode: str) -> Iterator[str]:
    lead = int(config.scheduler.signal.partition("@")[2])
    for role, job in (("runtime", config.runtime), ("training", config.training)):
        if lead >= job.time_limit and role in roles_of(mode):
            yield (
                f"the signal comes {lead} s before the end of a job of {job.time_limit} s, that is at once: "
                f"set {role}.time_limit higher, or scheduler.signal=USR1@{max(1, job.time_limit // 4)}"
            )
    rollout = config.rollout
    if rollout.turn_timeout > rollout.episode_timeout:
        yield (
            f"one command may take {rollout.turn_timeout} s but an episode only {rollout.episode_timeout} s: "
            f"set rollout.turn_timeout={rollout.episode_timeout} or less"
        )
    if config.runtime.ready_timeout >= config.runtime.time_limit and "runtime" in roles_of(mode):
        yield (
            f"the runtime job may end ({clock(config.runtime.time_limit)}) before it must be ready "
            f"({clock(config.runtime.ready_timeout)}): set runtime.ready_timeout lower"
        )


def _sandboxes(config: Config) -> Iterator[str]:
    job, sandbox = config.runtime, config.runtime.sandbox
    if job.ready_nodes > job.nodes:
        yield (
            f"runtime.ready_nodes={job.ready_nodes} is more than the runtime job has: "
            f"set it to {job.nodes} or less, or runtime.nodes={job.ready_nodes}"
        )
    if sandbox.memory > job.memory:
        yield (
            f"one sandbox ({sandbox.memory} MiB) is larger than its job ({job.memory} MiB): "
            f"set runtime.sandbox.memory={job.memory} or less"
        )
    if sandbox.cpus > job.cpus:
        yield (
            f"one sandbox ({sandbox.cpus:g} CPUs) is larger than its job ({job.cpus} CPUs): "
            f"set runtime.sandbox.cpus={job.cpus} or less"
        )


def _scheduler(config: Config) -> Iterator[str]:
    if config.scheduler.kind == "slurm":
        yield from refused(config.scheduler)
        return
    if (nodes := config.training.nodes) > 1:
        yield f"training.nodes={nodes}, but the local scheduler is one machine: set training.nodes=1"
    if config.runtime.nodes > 1 and config.runtime.port:
        yield (
            f"{config.runtime.nodes} servers on one machine cannot share port {config.runtime.port}: "
            f"set runtime.port=0, or runtime.nodes=1"
        )
    if config.scheduler.on_timeout == "array":
        yield "scheduler.on_timeout=array needs Slurm: set scheduler.on_timeout=requeue, chain or stop"


def roles_of(mode: str) -> tuple[str, ...]:
    """Which jobs a mode has: run, runtime-only, runtime-url."""
    return {"runtime-only": ("runtime",), "runtime-url": ("training",)}.get(mode, ("runtime", "training"))


# --- accepted, with a word ---------------------------------------------------------------------------


def _capacity(config: Config) -> Iterator[str]:
    runtime, episodes = config.runtime, config.rollout.max_parallel_episodes
    places = runtime.max_parallel_sandboxes * runtime.nodes
    if episodes > places:
        yield (
            f"{episodes} episodes at once share {places} sandboxes; the rest wait in the queue "
            f"(runtime.max_parallel_sandboxes, runtime.nodes)"
        )
    wanted = runtime.max_parallel_sandboxes * runtime.sandbox.memory
    if wanted > runtime.memory:
        yield (
            f"{runtime.max_parallel_sandboxes} sandboxes of {runtime.sandbox.memory} MiB may ask for "
            f"{wanted} MiB of the {runtime.memory} of their node (runtime.memory)"
        )
    if config.scheduler.kind == "slurm" and runtime.drain_timeout > 25:
        yield (
            f"runtime.drain_timeout={runtime.drain_timeout} s is longer than clusters usually leave between "
            f"asking a job to end and killing it (Slurm's KillWait, 30 s)"
        )


def _walltimes(config: Config, mode: str) -> Iterator[str]:
    runtime, training = config.runtime.time_limit, config.training.time_limit
    if mode == "run" and runtime < training:
        yield (
            f"the runtime job ends after {clock(runtime)}, before the training job's {clock(training)}; "
            f"it will have to be requeued (runtime.time_limit)"
        )


def _cpu_training(config: Config) -> Iterator[str]:
    if not gpus(config) and config.model.dtype == "bfloat16":
        yield "model.dtype=bfloat16 is slower and less exact than float32 on CPUs"
