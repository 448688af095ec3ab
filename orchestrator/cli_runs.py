"""What `orchestrate status`, `list` and `cancel` do.

What it does not do
    It knows nothing of records or schedulers; `orchestrator.runs` does.
"""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Sequence
from pathlib import Path

import click

from orchestrator import evaluations, follow, live, runs, view, view_live
from orchestrator.config import load
from orchestrator.contract import Evaluation, Role, RunDirectory
from orchestrator.errors import OrchestrateError
from orchestrator.frozen import asdict
from orchestrator.runs import RunView
from orchestrator.schedulers import JobState, Scheduler, SchedulerError, open_scheduler


def runs_directory(given: Path | None) -> Path:
    """Where the runs are: what was given, else `run.runs_dir` of the layers that are under every run."""
    return (given or Path(load(None).config.run.runs_dir).expanduser()).absolute()


def find(name: str | None, runs_dir: Path | None) -> RunDirectory:
    """The run that is meant. Raises RunNotFound, NotARun."""
    return runs.find_run(runs_directory(runs_dir), name)


def typed_name(run: RunDirectory, runs_dir: Path | None = None) -> str:
    """What to type to name this run again: its short id where that finds it, else its directory."""
    with contextlib.suppress(OrchestrateError):
        short = view.short_id(run.run_id)
        if runs_dir is None and runs.find_run(runs_directory(None), short).root == run.root:
            return short
    return shlex.quote(view.short_path(run.root))


def scheduler_of(run: RunDirectory) -> Scheduler:
    """The scheduler that has a run's jobs. Raises SchedulerError when this version does not have it."""
    return open_scheduler(runs.manifest_of(run).scheduler, run.root.parent)


def look_at(run: RunDirectory) -> RunView:
    """How a run stands; when its scheduler cannot be asked, from its records alone."""
    try:
        return runs.view(run, scheduler_of(run))
    except SchedulerError:
        return runs.view(run, None)


def status(name: str | None, runs_dir: Path | None, as_json: bool) -> None:
    run = find(name, runs_dir)
    look = look_at(run)
    servers = [] if look.is_over else live.look(run, look.mode)
    found = run.read(run.evaluation, Evaluation)
    judged = evaluations.Progress(run).count() if found else 0
    if as_json:
        more = {"servers": [server.as_dict() for server in servers], "sandboxes": live.summary(servers)}
        about = {"evaluation": asdict(found)} if found else {}
        click.echo(follow.as_json(look, (more if servers else {}) | about))
    else:
        rows = [*view_live.rows(servers), *evaluations.rows(found, judged)]
        view.console().print(view.status(look, follow.total_steps(run), rows))


def list_runs(runs_dir: Path | None, limit: int, as_json: bool) -> None:
    folder = runs_directory(runs_dir)
    looks = _look_at_all(runs.list_runs(folder)[-limit:])
    if as_json:
        click.echo(json.dumps([look.as_dict() for look in looks], sort_keys=True, default=str))
    elif looks:
        view.console().print(view.run_list(looks))
    else:
        click.echo(f"no run in {view.short_path(folder)} yet; `orchestrate launch --config local` makes one")


def _look_at_all(found: Sequence[RunDirectory]) -> list[RunView]:
    """How many runs stand, with one question to each scheduler instead of one for each run."""
    manifests = {run: runs.manifest_of(run) for run in found}
    schedulers: dict[str, Scheduler | None] = {}
    for kind in {manifest.scheduler for manifest in manifests.values()}:
        mine = [run for run in found if manifests[run].scheduler == kind]
        ids = {job_id for run in mine for role in Role if (job_id := manifests[run].job_id(role))}
        schedulers[kind] = _asked(mine[0], sorted(ids))
    return [runs.view(run, schedulers[manifests[run].scheduler]) for run in found]


def _asked(run: RunDirectory, ids: list[str]) -> Scheduler | None:
    """The scheduler of a run, which has just been asked about these jobs and remembers the answers; None
    when it does not answer, for it would not answer for each run either."""
    try:
        scheduler = scheduler_of(run)
        states = {info.state for info in scheduler.query(ids).values()}
    except SchedulerError:
        return None
    return None if states == {JobState.UNKNOWN} else scheduler


def cancel(name: str | None, timeout: float, runs_dir: Path | None, as_json: bool) -> None:
    run = find(name, runs_dir)
    before = look_at(run)
    after = before if before.is_over else runs.cancel(run, scheduler_of(run), timeout)
    if as_json:
        click.echo(follow.as_json(after))
    elif before.is_over:
        click.echo(f"{run.run_id} was over already: {before.state}")
    else:
        click.echo(f"{run.run_id} is {after.state}; every job of it is over")
