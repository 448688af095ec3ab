"""What `orchestrate status`, `list`, `logs` and `cancel` do.

What it does not do
    It knows nothing of records or schedulers; `orchestrator.runs` does.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import time
from pathlib import Path
from typing import Any

import click
from rich.text import Text

from orchestrator import follow, runs, view
from orchestrator.config import load
from orchestrator.contract import RunDirectory
from orchestrator.durable import read_bytes
from orchestrator.errors import OrchestrateError
from orchestrator.runs import Log, RunView
from orchestrator.schedulers import Scheduler, SchedulerError, open_scheduler


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
    if as_json:
        click.echo(follow.as_json(look))
    else:
        view.console().print(view.status(look, follow.total_steps(run)))


def list_runs(runs_dir: Path | None, limit: int, as_json: bool) -> None:
    folder = runs_directory(runs_dir)
    looks = [look_at(run) for run in runs.list_runs(folder)[-limit:]]
    if as_json:
        click.echo(json.dumps([look.as_dict() for look in looks], sort_keys=True, default=str))
    elif looks:
        view.console().print(view.run_list(looks))
    else:
        click.echo(f"no run in {view.short_path(folder)} yet; `orchestrate launch --config local` makes one")


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


# --- logs --------------------------------------------------------------------------------------------


class Tail:
    """Prints what was added to a set of files, each line with the name of its job in front."""

    def __init__(self, as_json: bool, last: int) -> None:
        self.as_json, self.last = as_json, last
        self.console = view.console()
        self._read: dict[Path, int] = {}

    def show(self, found: list[Log], whole: bool = True) -> None:
        """Print the new lines; a line without its end waits, unless the `whole` rest is wanted."""
        for log in found:
            data = read_bytes(log.path)
            new = data[self._read.get(log.path, 0) :]
            if not whole:
                new = new[: new.rfind(b"\n") + 1]
            first = log.path not in self._read
            self._read[log.path] = self._read.get(log.path, 0) + len(new)
            lines = new.decode(errors="replace").splitlines()
            for line in lines[-self.last :] if first and self.last else lines:
                self._print(log, line)

    def _print(self, log: Log, line: str) -> None:
        if self.as_json:
            click.echo(
                json.dumps({"role": log.role, "stream": log.stream, "file": log.path.name, "line": line})
            )
            return
        colour = "cyan" if log.role == "runtime" else "magenta"
        text = Text.from_ansi(view.clean(line, colour=True))
        self.console.print(Text.assemble((f"{log.role:<8} │ ", colour), text))


def logs(**options: Any) -> None:
    run = find(options["run"], options["runs_dir"])
    tail = Tail(options["as_json"], options["lines"])
    if options["follow"]:
        _follow_logs(run, tail, options["role"])
    found = runs.logs(run, options["role"])
    if not found and not options["as_json"]:
        click.echo(f"{run.run_id} has no logs yet; its jobs have not started", err=True)
    tail.show(found)


def _follow_logs(run: RunDirectory, tail: Tail, role: str | None) -> None:
    """Print until the run is over; Ctrl-C stops the printing, never the run."""
    try:
        while not look_at(run).is_over:
            tail.show(runs.logs(run, role), whole=False)
            time.sleep(0.5)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    return None
