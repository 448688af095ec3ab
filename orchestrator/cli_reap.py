"""What `orchestrate reap` does and says.

What it does not do
    It finds and removes nothing itself: `orchestrator.reap` does.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click
from rich.text import Text

from orchestrator import cli_runs, reap, runs, view
from orchestrator.reap import Found, Leftover


def main(name: str | None, yes: bool, wait: float | None, runs_dir: Path | None, as_json: bool) -> int:
    """Exit code: 1 when something could not be removed, 0 otherwise."""
    only = runs.find_run(cli_runs.runs_directory(runs_dir), name) if name else None
    folder = only.root.parent if only else cli_runs.runs_directory(runs_dir)
    found = reap.look(folder, only, wait)
    removed = reap.remove(folder, only, found) if yes and found.leftovers else []
    failed = [item for item, problem in removed if problem]
    if as_json:
        click.echo(_as_json(found, removed, yes))
    else:
        view.console().print(view.lines(_shown(found, removed, yes, name)))
    return 1 if failed else 0


def _as_json(found: Found, removed: list[tuple[Leftover, str]], yes: bool) -> str:
    done = [{**dataclasses.asdict(item), "problem": problem} for item, problem in removed]
    return json.dumps({**dataclasses.asdict(found), "acted": yes, "removed": done})


def _shown(found: Found, removed: list[tuple[Leftover, str]], yes: bool, name: str | None) -> list[Text]:
    rows = [_kept(item) for item in found.kept]
    rows += [view.row("not seen", Text(view.clean(what), "yellow")) for what in found.unseen]
    if yes:
        rows += [_removed(item, problem) for item, problem in removed]
        rows += [] if removed else [view.row("", "nothing to remove")]
        return rows
    rows += [_line("left", item, "yellow") for item in found.leftovers]
    if not found.leftovers:
        return [*rows, view.row("", "nothing was left")]
    command = f"orchestrate reap{f' {name}' if name else ''} --yes"
    return [*rows, view.row("", Text("nothing was removed yet", "dim")), view.next_steps([command])]


def _line(label: str, item: Leftover, style: str) -> Text:
    run = f"  {Path(item.run_dir).name}" if item.run_dir else ""
    return view.row(label, Text(view.clean(item.what), style), Text(f"{run}  {view.clean(item.why)}", "dim"))


def _kept(item: Leftover) -> Text:
    return _line("kept", item, "")


def _removed(item: Leftover, problem: str) -> Text:
    if problem:
        return _line("failed", dataclasses.replace(item, why=problem), "red")
    return _line("removed", item, "green")
