"""Checks of a Slurm site against a configuration: partitions, limits, GPUs, accounting, settings.

What it does not do
    Pure: it asks nobody (`orchestrator.schedulers.site` does).
"""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.checks import Check, fail, ok, warn
from orchestrator.quantities import clock
from orchestrator.schedulers.site import Partition, Site
from orchestrator.schema import Config, Job

_OLD = (21, 8)


def site(config: Config, found: Site) -> Iterator[Check]:
    """Every check of the site, as the login node sees it."""
    if not found.version:
        remedy = "run this on a login node, load Slurm's module, or use scheduler.kind=local"
        yield fail("Slurm", found.problem, remedy)
        return
    yield version(found.version)
    if found.problem:
        yield fail("controller", found.problem, "wait, or tell the site; nothing can be submitted now")
        return
    yield ok("controller", "; ".join(found.controllers)[:160])
    for role, section in (("runtime", config.runtime), ("training", config.training)):
        yield from partition(role, section, found, config.training.gpus_per_node, config.training.gpu_type)
    yield from settings(config, found.settings)


def version(text: str) -> Check:
    number = text.split()[-1]
    parts = tuple(int(part) for part in number.split(".")[:2] if part.isdigit())
    if parts and parts < _OLD:
        return warn("Slurm", text, "22.05 or newer is what we test with")
    return ok("Slurm", text)


def partition(role: str, job: Job, found: Site, gpus: int, gpu_type: str) -> Iterator[Check]:
    """Whether the partition of a job exists and can hold it."""
    name = f"{role} partition"
    part = found.partitions.get(job.partition) if job.partition else found.default
    known = ", ".join(sorted(found.partitions)) or "none"
    if part is None and job.partition:
        yield fail(name, f"there is no {job.partition}", f"set {role}.partition to one of {known}")
        return
    if part is None:
        yield fail(name, "the site has no default partition", f"set {role}.partition to one of {known}")
        return
    problems = list(_too_much(role, job, part))
    if role == "training" and gpus:
        problems += _too_many_gpus(part, gpus, gpu_type)
    for text, remedy in problems:
        yield fail(name, f"{part.name}: {text}", remedy)
    if not problems:
        yield ok(name, _described(part))
    if not part.working and part.nodes:
        yield warn(name, f"{part.name}: none of its {part.nodes} nodes works now", f"sinfo -R -p {part.name}")


def _described(part: Partition) -> str:
    limit = clock(part.max_time) if part.max_time is not None else "no limit"
    gpus = ", ".join(f"{count} × {kind or 'GPU'}" for kind, count in part.gpus.items())
    has = f"{part.nodes} nodes of {part.cpus} CPUs, {part.memory:,} MiB{', ' if gpus else ''}{gpus}"
    return f"{part.name}: {has}; longest job {limit}"


def _too_much(role: str, job: Job, part: Partition) -> Iterator[tuple[str, str]]:
    if not part.up:
        yield "it is not up", f"choose another {role}.partition"
    if part.max_time is not None and job.time_limit > part.max_time:
        longest = clock(part.max_time)
        yield (
            f"jobs may last {longest}, not {clock(job.time_limit)}",
            f"set {role}.time_limit={part.max_time}",
        )
    most = min(part.nodes, part.max_nodes or part.nodes)
    if job.nodes > most:
        yield f"a job may have {most} nodes, not {job.nodes}", f"set {role}.nodes={most}"
    if part.cpus and job.cpus > part.cpus:
        yield f"its largest node has {part.cpus} CPUs, not {job.cpus}", f"set {role}.cpus={part.cpus}"
    if part.memory and job.memory > part.memory:
        text = f"its largest node has {part.memory} MiB, not {job.memory}"
        yield text, f"set {role}.memory={part.memory}"


def _too_many_gpus(part: Partition, gpus: int, gpu_type: str) -> Iterator[tuple[str, str]]:
    types = ", ".join(kind for kind in part.gpus if kind) or "none with a name"
    if not part.gpus:
        yield "its nodes have no GPUs (gres/gpu)", "choose another training.partition, or gpus_per_node=0"
    elif gpu_type and gpu_type not in part.gpus:
        yield f"it has no GPUs of type {gpu_type}", f"set training.gpu_type to one of: {types}"
    elif gpus > (most := part.gpus.get(gpu_type, 0) if gpu_type else max(part.gpus.values())):
        yield f"a node has {most} GPUs, not {gpus}", f"set training.gpus_per_node={most}, and more nodes"


def settings(config: Config, known: dict[str, str]) -> Iterator[Check]:
    """Settings of the cluster that change what our policies can do."""
    accounting = known.get("AccountingStorageType", "").rpartition("/")[2] or "none"
    enabled = accounting not in ("none", "(null)")
    text = "on" if enabled else "off: how a job ended is known from the run's own records only"
    yield ok("accounting", text)
    if known.get("JobRequeue") == "0" and config.scheduler.on_timeout == "requeue":
        yield warn("requeue", "the site requeues no job (JobRequeue=0)", "set scheduler.on_timeout=array")
    wait = _seconds(known.get("KillWait", ""))
    if wait is not None and wait < config.runtime.drain_timeout + 5:
        remedy = f"set runtime.drain_timeout={max(1, wait - 10)}"
        yield warn("KillWait", f"a job has {wait} s between TERM and KILL", remedy)
    segments = known.get("MaxArraySize", "")
    if config.scheduler.on_timeout == "array" and segments.isdigit() and int(segments) < 2:
        yield warn("arrays", "the site has no job arrays", "set scheduler.on_timeout=requeue")
    if "linuxproc" in known.get("ProctrackType", ""):
        text = "proctrack/linuxproc: processes that leave their session survive their job"
        yield warn("process tracking", text, "orchestrate reap finds ours")


def _seconds(text: str) -> int | None:
    first = text.split()[0] if text.split() else ""
    return int(first) if first.isdigit() else None
