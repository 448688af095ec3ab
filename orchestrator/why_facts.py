"""Collects what `orchestrate why` judges: records, scheduler, health, heartbeats, logs and disk.

How to use it
    facts = collect(run, scheduler, watch_s=None)

What it does not do
    It judges nothing (`orchestrator.why` does) and changes nothing, but for one empty file that is written
    into the run directory and removed, which is the only way to know that it can be written.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from pathlib import Path

from orchestrator import checkpoints, runs
from orchestrator.contract import (
    CompleteFlag,
    JobStatus,
    Manifest,
    Pulse,
    ReadyFlag,
    RunDirectory,
    read_json_lines,
    wait_for,
)
from orchestrator.errors import OrchestrateError
from orchestrator.peer import runtime_health
from orchestrator.schedulers import JobInfo, JobState, Scheduler, SchedulerError
from orchestrator.why import Disk, Facts, JobFacts

TAIL_LINES, TAIL_BYTES = 60, 65536


def collect(
    run: RunDirectory, scheduler: Scheduler | None, name: str = "", watch_s: float | None = None
) -> Facts:
    """Everything about a run. Watches the heartbeats of running jobs for up to `watch_s` seconds, less
    when all beat; None means one and a half beats. Raises NotARun."""
    manifest = runs.manifest_of(run)
    settings = manifest.job_settings()
    look = runs.view(run, scheduler)
    infos, problem = _ask(manifest, scheduler, [job.job_id for job in look.jobs if job.job_id])
    running = [job.role for job in look.jobs if job.state == JobState.RUNNING]
    wait_s = 1.5 * settings.heartbeat_every if watch_s is None else watch_s
    pulses = watch({role: run.heartbeat(role) for role in running}, wait_s)
    metrics = read_json_lines(run.metrics)
    return Facts(
        run_id=run.run_id,
        name=name or run.run_id,
        scheduler=manifest.scheduler,
        mode=manifest.mode,
        start_policy=settings.start_policy,
        state=look.state,
        reason=look.reason,
        jobs=tuple(_job(run, manifest, job, infos.get(job.job_id), pulses) for job in look.jobs),
        scheduler_problem=problem,
        health=_health(run, manifest, running),
        ready=run.read(run.ready_flag, ReadyFlag) is not None,
        complete=run.read(run.complete_flag, CompleteFlag) is not None,
        cancelled=run.cancel_asked(),
        checkpoint=checkpoints.newest(run),
        step=int(metrics[-1].get("step", -1)) + 1 if metrics else 0,
        heartbeat_every=settings.heartbeat_every,
        disk=look_at_disk(run.root),
    )


def _ask(manifest: Manifest, scheduler: Scheduler | None, ids: list[str]) -> tuple[dict[str, JobInfo], str]:
    """The scheduler's answers, and why there are none."""
    if scheduler is None:
        return {}, f"this version or machine has no {manifest.scheduler} scheduler"
    if not ids:
        return {}, ""
    try:
        infos = scheduler.query(ids)
    except SchedulerError as error:
        return {}, str(error)
    silent = [info.reason or "no answer" for info in infos.values() if info.state == JobState.UNKNOWN]
    return infos, silent[0] if silent else ""


def _job(
    run: RunDirectory, manifest: Manifest, job: runs.JobView, info: JobInfo | None, pulses: dict[str, float]
) -> JobFacts:
    role, job_id = job.role, job.job_id
    args = manifest.jobs.get(role, {}).get("args", [])
    status = run.read(run.status(role), JobStatus)
    info = info or JobInfo(job_id, JobState.UNKNOWN if job_id else JobState.GONE)
    current = status if status is not None and status.attempt >= run.latest_attempt(role) else None
    code = status.exit_code if status is not None and status.exit_code is not None else info.exit_code
    return JobFacts(
        role=role,
        job_id=job_id,
        state=info.state,
        reason=info.reason,
        raw=info.raw,
        exit_code=code,
        partition=next((a.partition("=")[2] for a in args if a.startswith("--partition=")), ""),
        host=(status.host if status else "") or info.host,
        phase=current.phase if current else "",
        outcome=current.outcome if current else "",
        said=current.reason if current else "",
        attempt=run.latest_attempt(role),
        still_s=pulses.get(role),
        tail=tuple(tail(run, role, job_id)),
    )


def _health(run: RunDirectory, manifest: Manifest, running: list[str]) -> str | None:
    """None when there is nobody to ask: no runtime job runs, or it has not said where it is."""
    if manifest.mode != "runtime-url" and "runtime" not in running:
        return None
    return runtime_health(run, manifest.mode).problem


def watch(heartbeats: dict[str, Path], seconds: float) -> dict[str, float]:
    """Seconds that each heartbeat stood still while we watched, by our own clock; 0 once it has changed."""
    pulses = {name: Pulse(path) for name, path in heartbeats.items()}
    for pulse in pulses.values():
        pulse.still_for()  # the first look only learns what is there
    started = time.monotonic()
    beats: set[str] = set()

    def all_beat() -> bool | None:
        now = time.monotonic() - started
        beats.update(name for name, pulse in pulses.items() if pulse.still_for() < now - 0.001)
        return True if beats >= set(pulses) else None

    if not pulses or seconds <= 0:
        return {}
    with contextlib.suppress(OrchestrateError):  # the time is up: that is what we wanted to know
        wait_for(all_beat, "a heartbeat", seconds, first_s=0.1, longest_s=0.5)
    still = time.monotonic() - started
    return {name: 0.0 if name in beats else still for name in pulses}


def tail(run: RunDirectory, role: str, job_id: str, lines: int = TAIL_LINES) -> list[str]:
    """The last lines of a job's output, then of its standard error, which says more."""
    return [
        line
        for path in (run.out(role, job_id), run.err(role, job_id))
        for line in _end_of(path).splitlines()[-lines:]
    ]


def _end_of(path: Path) -> str:
    with contextlib.suppress(OSError), path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
        return file.read().decode(errors="replace")
    return ""


def look_at_disk(folder: Path) -> Disk:
    """Room and files left, and whether a file can be written and removed there."""
    problem = ""
    beside = folder / f".why.{uuid.uuid4().hex}"
    try:
        try:
            beside.write_bytes(b"x" * 4096)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        problem = str(error.strerror or error)
    try:
        seen = os.statvfs(folder)
    except OSError:
        return Disk(problem=problem)
    return Disk(
        free=seen.f_bavail * seen.f_frsize,
        total=seen.f_blocks * seen.f_frsize,
        free_inodes=seen.f_favail,
        inodes=seen.f_files,
        problem=problem,
    )
