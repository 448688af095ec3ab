"""What `orchestrate drill` does and says.

What it does not do
    It kills and watches nothing itself: `orchestrator.drill` does.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click
from rich.text import Text

from orchestrator import cli_runs, drill, view
from orchestrator.drill import Report, Target


def main(name: str | None, part: str, yes: bool, timeout: float, runs_dir: Path | None, as_json: bool) -> int:
    """Exit code: 0 when it recovered (or nothing was done), 1 when it did not."""
    run = cli_runs.find(name, runs_dir)
    scheduler = cli_runs.scheduler_of(run)
    target = drill.find(run, scheduler, part)
    typed = cli_runs.typed_name(run, runs_dir)
    if not yes:
        _would(target, run.run_id, typed, as_json)
        return 0
    watch = drill.Watch(run, scheduler, target)
    drill.strike(target, scheduler)
    console = view.console(stderr=True)
    console.print(view.row("killed", target.about))
    report = watch.follow(timeout, lambda text: console.print(view.row("", Text(view.clean(text), "dim"))))
    if as_json:
        click.echo(json.dumps({"run_id": run.run_id, **dataclasses.asdict(report)}))
    else:
        view.console().print(_shown(report, typed))
    return 0 if report.recovered else 1


def _would(target: Target, run_id: str, typed: str, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"run_id": run_id, **dataclasses.asdict(target), "acted": False}))
        return
    rows = [view.row("would kill", target.about), view.row("", Text(f"of {run_id}; nothing was done", "dim"))]
    command = f"orchestrate drill {typed} --kill {target.part} --yes"
    view.console().print(view.lines([*rows, view.next_steps([command])]))


def _shown(report: Report, typed: str) -> Text:
    word = Text("recovered", "green") if report.recovered else Text("not recovered", "bold red")
    rows = [view.row("drill", word, f": {report.verdict}")]
    seen = (("noticed", report.noticed_s), ("back", report.back_s), ("next step", report.next_step_s))
    rows += [view.row(label, f"after {seconds:.1f} s") for label, seconds in seen if seconds is not None]
    rows.append(view.row("twice", f"{report.steps_twice} steps were done twice"))
    rows.append(view.next_steps([f"orchestrate {'status' if report.recovered else 'why'} {typed}"]))
    return view.lines(rows)
