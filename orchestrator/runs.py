"""The reading side: which runs there are, how one stands, where its logs are, and its end on request.

What it is
    Any process can open a run from its directory alone. `view` reconciles two witnesses: the run's own
    records say what happened, the scheduler says whether a job exists. A scheduler that does not answer
    makes a state unknown, and nothing is ever concluded from that.

How to use it
    run = find_run(runs_dir, "3fa9c1"); look = view(run, open_scheduler("local", runs_dir)); look.state

What it does not do
    It prints nothing (`orchestrator.view`), and the one thing it changes is a cancelled run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.contract import (
    Exit,
    JobStatus,
    Manifest,
    NotARun,
    Outcome,
    ReadyFlag,
    Result,
    Role,
    RunDirectory,
    WaitTimeout,
    read_json_lines,
    wait_for,
)
from orchestrator.errors import RunNotFound
from orchestrator.schedulers import OVER, JobInfo, JobState, Scheduler, SchedulerError


@dataclass(frozen=True)
class JobView:
    """One job: `state` is the scheduler's word, `phase`, `outcome` and `reason` are the job's own."""

    role: str
    job_id: str
    state: str
    phase: str = ""
    outcome: str = ""
    reason: str = ""
    attempt: int = 0
    host: str = ""
    exit_code: int | None = None

    @property
    def is_over(self) -> bool:
        return self.state in OVER or (self.state == JobState.UNKNOWN and self.phase == "ended")


@dataclass(frozen=True)
class RunView:
    """A whole run at one moment.

    state: pending, stranded (nobody is left to start the training), running, ending (a result is written,
    jobs still wind up), unknown (the scheduler does not answer), or how it ended: success, failed,
    cancelled, timeout, requeued, peer_gone.
    """

    run_id: str
    path: str
    name: str
    mode: str
    scheduler: str
    created_at: float
    state: str
    reason: str
    exit_code: int | None
    jobs: list[JobView]
    url: str = ""
    metrics: dict[str, Any] = field(default_factory=dict)
    success_rates: list[float] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        return self.state in set(Outcome) - {Outcome.REQUEUED}

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


# --- finding -----------------------------------------------------------------------------------------


def list_runs(runs_dir: Path) -> list[RunDirectory]:
    """Every run below a directory, the oldest first: names begin with the time of launch."""
    if not runs_dir.is_dir():
        return []
    folders = [RunDirectory(path) for path in runs_dir.iterdir() if not path.name.startswith(".")]
    return sorted((run for run in folders if run.manifest.is_file()), key=lambda run: run.run_id)


def find_run(runs_dir: Path, name: str | None) -> RunDirectory:
    """A run by path, by id, or by a beginning or end of its id that only one run has; None is the latest.

    Raises RunNotFound, NotARun.
    """
    if name is not None and ("/" in name or name in (".", "..")):
        return RunDirectory.open(Path(name).expanduser())
    runs = list_runs(runs_dir)
    if name is None:
        if not runs:
            raise RunNotFound(f"no run in {runs_dir} yet; `orchestrate launch --config local` makes one")
        return runs[-1]
    exact = [run for run in runs if run.run_id == name]
    found = exact or [r for r in runs if name and (r.run_id.startswith(name) or r.run_id.endswith(name))]
    if len(found) == 1:
        return found[0]
    if found:
        raise RunNotFound(f"{name!r} is the name of {len(found)} runs: {_few(found)}; give more of it")
    if (Path(name) / "run.json").is_file():
        return RunDirectory.open(name)
    raise RunNotFound(f"no run in {runs_dir} begins or ends with {name!r}; `orchestrate list` shows them")


def _few(runs: Sequence[RunDirectory]) -> str:
    names = [run.run_id for run in runs[-4:]]
    return ", ".join(names) + (" …" if len(runs) > 4 else "")


def manifest_of(run: RunDirectory) -> Manifest:
    """The manifest of a run, with every submission in it. Raises NotARun when it cannot be read."""
    found = run.read_manifest()
    if found is None:
        raise NotARun(f"{run.manifest} is not readable as a manifest; the run was damaged from outside")
    return found


# --- one run at one moment ---------------------------------------------------------------------------


def job_ids(manifest: Manifest, scheduler: Scheduler | None) -> dict[str, str]:
    """Job id of each role that was to be submitted. A launcher that died between its intent and the
    scheduler's answer left a token, by which the job is found; "" when there is no such job."""
    roles = dict.fromkeys(entry["role"] for entry in manifest.submissions)
    return {role: manifest.job_id(role) or _by_token(manifest, role, scheduler) for role in roles}


def _by_token(manifest: Manifest, role: str, scheduler: Scheduler | None) -> str:
    entries = [entry for entry in manifest.submissions if entry["role"] == role]
    if scheduler is None or entries[-1]["state"] != "intent":
        return ""
    with contextlib.suppress(SchedulerError):
        return scheduler.find(entries[-1]["token"]) or ""
    return ""


def view(run: RunDirectory, scheduler: Scheduler | None) -> RunView:
    """How a run stands. Without a scheduler every job that has not said its end is unknown."""
    manifest = manifest_of(run)
    ids = job_ids(manifest, scheduler)
    infos = _query(scheduler, [job_id for job_id in ids.values() if job_id])
    jobs = [_job_view(run, role, ids[role], infos.get(ids[role])) for role in sorted(ids)]
    result = run.read(run.result, Result)
    state, reason, exit_code = _judge(run, manifest, jobs, result)
    rows = read_json_lines(run.metrics)
    ready = run.read(run.ready_flag, ReadyFlag)
    return RunView(
        run_id=run.run_id,
        path=str(run.root),
        name=manifest.config_name,
        mode=manifest.mode,
        scheduler=manifest.scheduler,
        created_at=manifest.created_at,
        state=state,
        reason=reason,
        exit_code=exit_code,
        jobs=jobs,
        url=ready.url if ready else "",
        metrics=rows[-1] if rows else {},
        success_rates=success_rates(rows),
    )


def success_rates(rows: Sequence[dict[str, Any]]) -> list[float]:
    """Success rate by step; a step that was done again after a restart counts once, the last time."""
    found = {
        row.get("step", i): float(row["success_rate"])
        for i, row in enumerate(rows)
        if isinstance(row.get("success_rate"), int | float)
    }
    return list(found.values())


def _query(scheduler: Scheduler | None, ids: list[str]) -> dict[str, JobInfo]:
    if scheduler is None or not ids:
        return {}
    try:
        return scheduler.query(ids)
    except SchedulerError:
        return {}


def _job_view(run: RunDirectory, role: str, job_id: str, info: JobInfo | None) -> JobView:
    status = run.read(run.status(role), JobStatus)
    if not job_id:
        return JobView(role, "", JobState.GONE, reason="never reached the scheduler")
    state = info.state if info is not None else JobState.UNKNOWN
    if status is None:
        why = info.reason if info else ""
        return JobView(role, job_id, state, reason=why, exit_code=info.exit_code if info else None)
    return JobView(
        role=role,
        job_id=job_id,
        state=state,
        phase=status.phase,
        outcome=status.outcome,
        reason=status.reason or (info.reason if info else ""),
        attempt=status.attempt,
        host=status.host,
        exit_code=status.exit_code if status.exit_code is not None else (info.exit_code if info else None),
    )


def _judge(
    run: RunDirectory, manifest: Manifest, jobs: list[JobView], result: Result | None
) -> tuple[str, str, int | None]:
    """State, reason and exit code of the run, from what its jobs and its result say."""
    if not jobs:
        return "failed", "the launcher died before it submitted a job; launch again", None
    over = all(job.is_over for job in jobs)
    if result is not None:
        return result.outcome if over else "ending", result.reason, result.exit_code
    if over:
        return _ended_without_result(run, manifest, jobs)
    if any(job.state == JobState.RUNNING for job in jobs):
        return "running", "", None
    if any(job.state == JobState.UNKNOWN for job in jobs):
        return "unknown", f"the {manifest.scheduler} scheduler does not answer; nothing is concluded", None
    if why := _stranded(jobs):
        return "stranded", why, None
    return "pending", next((job.reason for job in jobs if job.reason), ""), None


def _stranded(jobs: list[JobView]) -> str:
    """Why the training, which is held until the runtime is ready, will never start; "" while it may."""
    roles = {job.role: job for job in jobs}
    runtime, training = roles.get(Role.RUNTIME), roles.get(Role.TRAINING)
    if runtime is None or training is None or training.state != JobState.HELD:
        return ""
    if runtime.state not in OVER or runtime.outcome == Outcome.REQUEUED:
        return ""
    why = f" ({runtime.reason})" if runtime.reason else ""
    return f"the training will never start: the runtime job is over{why}; `orchestrate cancel` ends the run"


def _ended_without_result(
    run: RunDirectory, manifest: Manifest, jobs: list[JobView]
) -> tuple[str, str, int | None]:
    """Every job is over and nobody wrote a result: say what is known, never guess a success."""
    if run.cancel_asked():
        return Outcome.CANCELLED, "cancelled on request", 128 + 15
    # the training job's word counts first; one that never began left none, and the runtime's stands
    for job in sorted(jobs, key=lambda job: job.role == Role.RUNTIME):
        if job.outcome in ("", Outcome.REQUEUED):
            continue  # a job that was to live again and did not has no outcome
        if job.outcome != Outcome.SUCCESS or manifest.mode == "runtime-only":
            return job.outcome, f"{job.role}: {job.reason}", job.exit_code
    told = [f"{j.role}: {j.reason or j.phase or j.state}" for j in jobs]
    code = next((j.exit_code for j in jobs if j.exit_code), None)
    return Outcome.FAILED, "the jobs ended without a result (" + "; ".join(told) + ")", code


# --- logs --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Log:
    """One log file. stream: out or err."""

    role: str
    stream: str
    path: Path


def logs(run: RunDirectory, role: str | None = None) -> list[Log]:
    """Every log file of a run, of each job that it ever had, in the order of their names."""
    roles = [role] if role else [Role.RUNTIME.value, Role.TRAINING.value]
    found = []
    for each in roles:
        for stream, pattern in (("out", run.out(each, "*")), ("err", run.err(each, "*"))):
            found += [Log(each, stream, path) for path in sorted(run.root.glob(pattern.name))]
    return found


# --- the end on request ------------------------------------------------------------------------------


def cancel(
    run: RunDirectory,
    scheduler: Scheduler,
    timeout_s: float = 90.0,
    watch: Callable[[RunView], object] = bool,
) -> RunView:
    """End a run and wait until the scheduler confirms that every job is over.

    One call for all jobs: a held training job that nobody would release goes too. Raises WaitTimeout
    when jobs are still there at the end; SchedulerError when the scheduler refuses.
    """
    before = view(run, scheduler)
    ids = [job.job_id for job in before.jobs if job.job_id and job.state != JobState.GONE]
    if before.is_over:
        return before
    run.events_of_caller("cancel").add("cancel", jobs=ids)
    scheduler.cancel(ids)
    try:
        after = wait_for(
            lambda: _over(run, scheduler, watch), "the end of every job", timeout_s, longest_s=0.5
        )
    except WaitTimeout as error:
        left = ", ".join(
            f"{j.role} {j.job_id} ({j.state})" for j in view(run, scheduler).jobs if not j.is_over
        )
        raise WaitTimeout(
            f"after {timeout_s:g} s there is still {left}; the jobs were told to end: look again with "
            f"`orchestrate status {run.run_id}`, or cancel once more"
        ) from error
    _record_cancelled(run, after)
    return view(run, scheduler)


def _over(run: RunDirectory, scheduler: Scheduler, watch: Callable[[RunView], object]) -> RunView | None:
    now = view(run, scheduler)
    watch(now)
    return now if all(job.state in OVER for job in now.jobs) else None


def _record_cancelled(run: RunDirectory, now: RunView) -> None:
    """A training job that never started cannot write the result; nobody else is left to do it."""
    if now.mode == "runtime-only":
        return
    ids = {job.role: job.job_id for job in now.jobs}
    run.end_unstarted(ids.get(Role.TRAINING, ""), Outcome.CANCELLED, "cancelled on request", 128 + 15)


def exit_code_of(look: RunView) -> int:
    """What a shell should see of a run: 0 only after a success."""
    if look.state == Outcome.SUCCESS:
        return 0
    return look.exit_code or Exit.SOFTWARE
