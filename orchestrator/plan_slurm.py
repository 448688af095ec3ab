"""A planned job in sbatch's words, and which words of the user's own would contradict it.

What it is
    Pure functions: `arguments` is what sbatch gets on its command line, `header` the same as `#SBATCH`
    lines, so that the script can be submitted by hand; `refused` judges `scheduler.extra_args`.

What it does not do
    The hold and the dependency are added at submission, when the other job's id is known. No secrets: a
    command line and a comment are world-readable.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from orchestrator.contract import Role, RunDirectory
from orchestrator.quantities import clock
from orchestrator.schema import Config, Scheduler

if TYPE_CHECKING:
    from orchestrator.plan import PlannedJob

_OURS = {
    **{"--job-name": "run.name", "-J": "run.name", "--array": "scheduler.on_timeout=array"},
    **{"-a": "scheduler.on_timeout=array", "--signal": "scheduler.signal"},
    **{"--requeue": "scheduler.on_timeout", "--no-requeue": "scheduler.on_timeout"},
    **dict.fromkeys(("--hold", "-H", "--dependency", "-d"), "scheduler.start_policy"),
    **{"--account": "scheduler.account", "-A": "scheduler.account", "--qos": "scheduler.qos"},
    **{"-q": "scheduler.qos", "--reservation": "scheduler.reservation"},
    **dict.fromkeys(("--partition", "-p"), "runtime.partition and training.partition"),
    **dict.fromkeys(("--nodes", "-N"), "runtime.nodes and training.nodes"),
    **dict.fromkeys(("--cpus-per-task", "-c"), "runtime.cpus and training.cpus"),
    **dict.fromkeys(("--mem", "--mem-per-cpu", "--mem-per-gpu"), "runtime.memory and training.memory"),
    **dict.fromkeys(("--time", "-t"), "runtime.time_limit and training.time_limit"),
    **dict.fromkeys(("--constraint", "-C"), "runtime.constraint and training.constraint"),
    **dict.fromkeys(("--gres", "--gpus", "-G", "--gpus-per-node"), "training.gpus_per_node and .gpu_type"),
    **dict.fromkeys(("--gpus-per-task", "--gpus-per-socket"), "training.gpus_per_node"),
    **dict.fromkeys(("--output", "-o", "--error", "-e", "--open-mode", "--chdir", "-D"), "run.runs_dir"),
    **dict.fromkeys(("--export", "--export-file", "--get-user-env"), "environment.variables"),
    **dict.fromkeys(("--no-kill", "-k"), "runtime.nodes"),
    **dict.fromkeys(("--ntasks", "-n", "--ntasks-per-node", "--tasks-per-node"), ""),
    **dict.fromkeys(("--comment", "--parsable", "--wrap", "--wait", "-W", "--test-only", "--help"), ""),
    **dict.fromkeys(("--clusters", "-M", "--uid", "--gid", "--quiet", "-Q", "--version", "-V", "-h"), ""),
}
"""sbatch's options that a plan sets itself or relies on, and the key that says it; "" where none may."""

_NEEDS_QUOTES = re.compile(r"[\s'\"#]")


def refused(scheduler: Scheduler) -> Iterator[str]:
    """What is wrong with `scheduler.extra_args`, one line each, with the key to use instead."""
    for argument in scheduler.extra_args:
        name = _name_of(argument)
        if not name or not argument.isprintable() or "\\" in argument:
            yield (
                f"scheduler.extra_args: {argument!r} is no option of sbatch: write each one as a whole, like "
                f"--licenses=matlab:1"
            )
        elif (key := _owner(name)) is not None:
            instead = f"set {key} instead" if key else "leave it out: the launcher needs it as it is"
            yield f"scheduler.extra_args: {argument} contradicts what the launcher says itself; {instead}"


def _name_of(argument: str) -> str:
    """`--mem` of `--mem=4G`, `-t` of `-t5`; "" for what does not begin an option."""
    found = re.match(r"--[a-z][a-z-]*(?==|$)|-[A-Za-z](?![A-Za-z-]*=)", argument)
    return found[0] if found else ""


def _owner(name: str) -> str | None:
    """The key behind an option, also when it is abbreviated as sbatch allows; None when it is free."""
    if name in _OURS:
        return _OURS[name]
    short = [ours for ours in _OURS if name.startswith("--") and ours.startswith(name)]
    return _OURS[short[0]] if short else None


def arguments(job: PlannedJob, config: Config, run: RunDirectory) -> list[str]:
    """Arguments of sbatch for one job, all but the hold and the dependency.

    `--export=ALL` is of an environment that the scheduler builds from an allow-list: NONE would have
    the node guess a login environment, which fails on some sites, and let the submitter's SLURM_* through
    all the same. The comment is how a job is found again when sbatch's answer was lost.
    """
    asked, scheduler = job.resources, config.scheduler
    section = config.runtime if job.role == Role.RUNTIME else config.training
    gres = f"gpu:{asked.gpu_type}:{asked.gpus}" if asked.gpu_type else f"gpu:{asked.gpus}"
    optional = {
        "--partition": asked.partition,
        "--gres": gres if asked.gpus else "",
        "--constraint": section.constraint,
        "--account": scheduler.account,
        "--qos": scheduler.qos,
        "--reservation": scheduler.reservation,
        "--array": f"1-{scheduler.max_restarts + 1}%1" if is_array(job.role, config) else "",
    }
    return [
        f"--job-name={job.name}",
        f"--comment=run={run.run_id};role={job.role};token={job.token}",
        f"--nodes={asked.nodes}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={asked.cpus}",
        f"--mem={asked.memory}M",
        f"--time={clock(asked.time_limit)}",
        *(f"{name}={value}" for name, value in optional.items() if value),
        f"--signal=B:{job.signal}",
        "--requeue" if job.requeue else "--no-requeue",
        # a fleet goes on without the node that it lost; the loss of the first one ends the job all the same
        *(["--no-kill"] if job.role == Role.RUNTIME and asked.nodes > 1 else []),
        "--open-mode=append",
        f"--chdir={run.root}",
        f"--output={_pattern(job.out, run)}",
        f"--error={_pattern(job.err, run)}",
        "--export=ALL",
        *scheduler.extra_args,
    ]


def is_array(role: str, config: Config) -> bool:
    """An auto-resume array: one segment after the other, none of them requeued."""
    return (
        config.scheduler.kind == "slurm" and config.scheduler.on_timeout == "array" and role == Role.TRAINING
    )


def log_id(role: str, config: Config) -> str:
    """What stands for the job id in the name of a log: an array's task by the id that the task goes by."""
    return "%A_%a" if is_array(role, config) else "%j"


def _pattern(path: str, run: RunDirectory) -> str:
    """The path of a log as sbatch wants it: a % of the directory's own is not one of its words."""
    root = str(run.root)
    return root.replace("%", "%%") + path.removeprefix(root)


def header(args: Sequence[str]) -> list[str]:
    """The arguments as `#SBATCH` lines; sbatch takes quotes there as a shell does."""
    return [f"#SBATCH {shlex.quote(a) if _NEEDS_QUOTES.search(a) else a}" for a in args]


def start(job: PlannedJob) -> list[str]:
    """What is added at submission, with a word for an id that nobody knows yet."""
    hold = ["--hold"] if job.held else []
    return [*hold, f"--dependency=after:{job.after.upper()}_JOB_ID"] if job.after else hold


def unfit(args: Sequence[str]) -> list[str]:
    """What cannot be written as a `#SBATCH` line at all."""
    odd = [a for a in args if not a.isprintable() or "\\" in a]
    return [
        f"sbatch cannot take {a!r}: no backslash and no control character, also not in paths" for a in odd
    ]
