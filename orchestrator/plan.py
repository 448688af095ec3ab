"""What a launch would do, as data: configuration and context in, jobs with their scripts out.

What it is
    `make_plan` is pure: it opens no file, asks no scheduler, reads no clock. A dry run prints the plan;
    a launch writes it down and submits it (`orchestrator.launch`).

How to use it
    plan = make_plan(config, Context(run_dir=Path("/runs/x"), code=Path("/runs/x/code"), python="python3"))
    plan.job("training").script

What it does not do
    No secrets: a script names `env.sh`, never its content. It does not know how a scheduler is called.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator import plan_slurm
from orchestrator.contract import Env, Role, RunDirectory, Settings
from orchestrator.errors import PlanError
from orchestrator.frozen import asdict, dataclass, field, replace
from orchestrator.plan_checks import contradictions, gpus, launcher_of, roles_of, totals, worries
from orchestrator.quantities import clock
from orchestrator.schema import Config, Job

RESERVED = "ORCHESTRATE_"
"""Variables that start so are ours; an env file may not set them."""


@dataclass(frozen=True)
class Context:
    """What a plan needs beside the configuration, found by the caller."""

    run_dir: Path
    code: Path
    """Folder that holds `jobs/`, and the packages when it is a snapshot."""
    python: str
    snapshot: bool = True
    """The jobs import the packages from `code` instead of from where they are installed."""
    mode: str = "run"
    number: int = 1
    """How often jobs of this run were submitted, this time included; it tells their tokens apart."""
    environ: Mapping[str, str] = field(default_factory=dict)
    """Variables of the launching shell that a job may see (`orchestrator.launch.PASSED`)."""


@dataclass(frozen=True)
class Resources:
    """What one job asks for. Memory in MiB, time in seconds; per node but `nodes`."""

    nodes: int
    cpus: int
    memory: int
    gpus: int
    gpu_type: str
    time_limit: int
    partition: str


@dataclass(frozen=True)
class PlannedJob:
    """One job, ready to be written and submitted."""

    role: str
    name: str
    resources: Resources
    script: str
    """Text of `<role>.sbatch`."""
    args: list[str]
    """Resource arguments of the scheduler's submit command."""
    out: str
    err: str
    env: dict[str, str]
    signal: str
    token: str
    held: bool
    after: str | None
    """Role of the job that must have started first."""
    requeue: bool
    number: int = 1
    """Counts the submissions of this role in its run."""


@dataclass(frozen=True)
class Plan:
    """All of a launch. `jobs` are in the order of submission."""

    run_id: str
    run_dir: str
    mode: str
    scheduler: str
    jobs: list[PlannedJob]
    gpus: int
    """GPUs of the training job over all its nodes."""
    copies: int
    """Copies of the model that generate: GPUs divided by the tensor-parallel size, at least 1."""
    totals: list[str]
    """What is configured per GPU or per node, with what it comes to over all of them."""
    episodes_per_step: int
    warnings: list[str]
    settings: Settings
    evaluation: str = ""
    """What is evaluated, in words; "" when the run trains."""

    def job(self, role: str) -> PlannedJob:
        return next(job for job in self.jobs if job.role == role)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`; variables of the shell are left out."""
        data = asdict(self)
        for job in data["jobs"]:
            job["env"] = sorted(job["env"])
        return data


def make_plan(config: Config, context: Context) -> Plan:
    """The plan of a launch. Raises PlanError with every contradiction, each with its fix."""
    if found := contradictions(config, context.mode):
        raise PlanError(found)
    roles = roles_of(context.mode)
    total = gpus(config) if Role.TRAINING in roles else 0
    return Plan(
        run_id=context.run_dir.name,
        run_dir=str(context.run_dir),
        mode=context.mode,
        scheduler=config.scheduler.kind,
        jobs=[_job(config, context, role) for role in _order(config, roles)],
        gpus=total,
        copies=max(1, total // config.rollout.tensor_parallel_size),
        totals=totals(config) if Role.TRAINING in roles else [],
        episodes_per_step=config.rollout.prompts_per_step * config.rollout.rollouts_per_prompt,
        warnings=worries(config, context.mode),
        settings=settings_of(config),
        evaluation=_evaluation(config) if Role.TRAINING in roles else "",
    )


def _evaluation(config: Config) -> str:
    if not config.evaluation.wanted:
        return ""
    policy = config.evaluation.checkpoint or config.model.path
    ks = ", ".join(f"pass@{k}" for k in config.evaluation.ks)
    return (
        f"{ks} of {policy}, {config.rollout.validation_rollouts} samples a task of {config.data.validation}"
    )


def settings_of(config: Config) -> Settings:
    """What the jobs themselves need to know, so that they need not load the schema."""
    return Settings(
        ready_timeout=config.runtime.ready_timeout,
        peer_grace=config.training.peer_grace,
        stop_timeout=max(25.0, config.runtime.drain_timeout + 5.0),
        start_policy=config.scheduler.start_policy,
        on_timeout=config.scheduler.on_timeout,
        max_restarts=config.scheduler.max_restarts,
        signal_lead=float(config.scheduler.signal.partition("@")[2]),
        runtime_max_restarts=config.runtime.max_restarts,
        failover_timeout=float(config.runtime.failover_timeout),
        runtime_nodes=config.runtime.nodes,
        runtime_ready_nodes=config.runtime.ready_nodes,
        runtime_cpus=config.runtime.cpus,
        checkpoint_dir=config.trainer.checkpoint_dir,
        checkpoint_signal=config.training.checkpoint_signal,
        launcher=launcher_of(config),
        nodes=config.training.nodes,
        processes=max(1, config.training.gpus_per_node),
        cpus=config.training.cpus,
    )


def _order(config: Config, roles: tuple[str, ...]) -> list[str]:
    """A job that another one refers to by id goes first: the runtime job releases the held training job,
    and a plain dependency names the runtime job."""
    held_first = config.scheduler.start_policy == "release-on-ready"
    return sorted(roles, reverse=held_first)


def _job(config: Config, context: Context, role: str) -> PlannedJob:
    run, job = RunDirectory(context.run_dir), _section(config, role)
    waits = role == Role.TRAINING and context.mode == "run"
    held = waits and config.scheduler.start_policy == "release-on-ready"
    gpus_per_node = config.training.gpus_per_node if role == Role.TRAINING else 0
    gpu_type = config.training.gpu_type if gpus_per_node else ""
    planned = PlannedJob(
        role=role,
        name=f"{config.run.name}-{role}",
        resources=Resources(
            job.nodes, job.cpus, job.memory, gpus_per_node, gpu_type, job.time_limit, job.partition
        ),
        script="",
        args=[],
        out=str(run.out(role, plan_slurm.log_id(role, config))),
        err=str(run.err(role, plan_slurm.log_id(role, config))),
        env={**context.environ, Env.RUN_DIR.value: str(run.root)},
        signal=config.scheduler.signal,
        token=f"{run.run_id}.{role}" + (f".{context.number}" if context.number > 1 else ""),
        number=context.number,
        held=held,
        after=Role.RUNTIME.value if waits and not held else None,
        requeue=role == Role.RUNTIME or config.scheduler.on_timeout in ("requeue", "chain"),
    )
    return _with_script(planned, config, context)


def _section(config: Config, role: str) -> Job:
    return config.runtime if role == Role.RUNTIME else config.training


def _with_script(job: PlannedJob, config: Config, context: Context) -> PlannedJob:
    run = RunDirectory(context.run_dir)
    slurm = config.scheduler.kind == "slurm"
    args = plan_slurm.arguments(job, config, run) if slurm else []
    if problems := plan_slurm.unfit(args):
        raise PlanError(problems)
    how = " ".join(["sbatch", *plan_slurm.start(job)]) if slurm else "bash"
    stub = context.code / "jobs" / f"{job.role}.sh"
    text = "\n".join(
        [
            "#!/bin/bash",
            *(plan_slurm.header(args) if slurm else _described(job)),
            f"# The {job.role} job of run {run.run_id}, as it was submitted{_start(job)}.",
            f"# By hand: {how} {shlex.quote(str(run.script(job.role)))}",
            f"exec bash {shlex.quote(str(stub))} {shlex.quote(str(run.root))}",
            "",
        ]
    )
    return replace(job, script=text, args=args)


def _start(job: PlannedJob) -> str:
    return (
        " (held; the runtime job releases it)" if job.held else f" (after: {job.after})" if job.after else ""
    )


def _described(job: PlannedJob) -> list[str]:
    """The header of a local job: the same facts, in words."""
    asked = job.resources
    return [
        f"# job {job.name}: {asked.cpus} CPUs, {asked.memory} MiB, {asked.gpus} GPUs, "
        f"at most {clock(asked.time_limit)}",
        f"# {job.signal.replace('@', ' comes ')} s before the end; logs in {job.out} and .err",
    ]


# --- the environment of the jobs ---------------------------------------------------------------------


def environment_file(config: Config, context: Context, secrets: Mapping[str, str]) -> str:
    """Text of `env.sh` (0600): our variables, the fabric's, those of the env file, those of the
    configuration, then each job's own interpreter and set-up commands.

    A stub sources it with its own name in `$0`, which tells the two jobs apart.
    """
    ours = {Env.RUN_DIR.value: str(context.run_dir), "PYTHONUNBUFFERED": "1"}
    if context.snapshot:
        # the snapshot goes before what is installed; the working directory stays off the path
        ours |= {"PYTHONPATH": str(context.code), "PYTHONSAFEPATH": "1"}
    if config.environment.network_provider:
        ours["FI_PROVIDER"] = config.environment.network_provider
    if config.environment.debug:
        ours["ORCHESTRATE_DEBUG"] = "1"
    theirs = {**secrets, **config.environment.variables}
    if "PYTHONPATH" in theirs and "PYTHONPATH" in ours:
        ours["PYTHONPATH"] += f":{theirs['PYTHONPATH']}"
    everything = {**theirs, **ours}
    exports = [f"export {name}={shlex.quote(value)}" for name, value in everything.items()]
    roles = [line for role in roles_of(context.mode) for line in _role_lines(config, context, role)]
    about = f"# Environment of the jobs of run {context.run_dir.name}. It may hold secrets: mode 0600."
    return "\n".join([about, *exports, 'case "${0##*/}" in', *roles, "esac", ""])


def _role_lines(config: Config, context: Context, role: str) -> list[str]:
    section = _section(config, role)
    python = shlex.quote(section.python or context.python)
    tools = [line for name, line in _TOOLS.items() if any(re.search(name, c) for c in section.setup_commands)]
    return [f"{role}*)", f"export {Env.PYTHON.value}={python}", *tools, *section.setup_commands, ";;"]


_TOOLS = {
    r"\b(module|ml)\b": (
        "command -v module >/dev/null || for init in /etc/profile.d/{modules,lmod,z00_lmod}.sh "
        '"${MODULESHOME:-/none}/init/bash" "${LMOD_PKG:-/none}/init/bash"; do '
        '[ ! -r "$init" ] || { . "$init"; break; }; done'
    ),
    r"\b(conda|mamba)\b": (
        'init=$("${CONDA_EXE:-conda}" info --base 2>/dev/null)/etc/profile.d/conda.sh; '
        '[ ! -r "$init" ] || . "$init"'
    ),
}
"""What set-up commands need that are functions of a login shell: a batch shell has none of them."""
