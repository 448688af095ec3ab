"""What `orchestrate resume` does and says.

What it does not do
    It decides and changes nothing itself: `orchestrator.resume` does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click
from rich.text import Text

from orchestrator import cli_runs, resume, view
from orchestrator.resume import Prepared


def main(
    arguments: tuple[str, ...], dry_run: bool, from_scratch: bool, runs_dir: Path | None, as_json: bool
) -> None:
    """The first argument without a `=` names the run; the others change its configuration."""
    names = [argument for argument in arguments if "=" not in argument]
    if len(names) > 1:
        raise click.UsageError(f"one run at a time, not {', '.join(names)}; a change is written KEY=VALUE")
    run = cli_runs.find(names[0] if names else None, runs_dir)
    changes = [argument for argument in arguments if "=" in argument]
    scheduler = cli_runs.scheduler_of(run)
    prepared = resume.prepare(run, scheduler, changes, from_scratch, sys.argv[1:])
    if dry_run:
        _print_plan(prepared, as_json)
        return
    jobs = resume.resume(prepared, scheduler)
    if as_json:
        click.echo(json.dumps({**_about(prepared), "jobs": jobs}))
        return
    console = view.console()
    console.print(view.launched(prepared.plan, jobs, []))
    console.print(view.lines(_changes(prepared)))
    name = cli_runs.typed_name(run, runs_dir)
    console.print(view.next_steps([f"orchestrate {verb} {name}" for verb in ("status", "logs -f", "cancel")]))


def _about(prepared: Prepared) -> dict[str, object]:
    changed = {key: {"before": old, "after": new} for key, (old, new) in prepared.changed.items()}
    run = prepared.run
    return {
        "run_id": run.run_id,
        "path": str(run.root),
        "checkpoint": prepared.checkpoint,
        "changed": {key: view.hidden(key, value) for key, value in changed.items()},
    }


def _print_plan(prepared: Prepared, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({**_about(prepared), "plan": prepared.plan.as_dict()}, default=str))
        return
    view.console().print(view.lines([*_changes(prepared), view.plan(prepared.plan)]))


def _changes(prepared: Prepared) -> list[Text]:
    start = prepared.checkpoint or "the beginning: there is no checkpoint"
    rows = [view.row("from", start)]
    for key, (old, new) in prepared.changed.items():
        before, after = view.hidden(key, old), view.hidden(key, new)
        rows.append(view.row("changed", f"{key}: {before} → {after}"))
    return rows
