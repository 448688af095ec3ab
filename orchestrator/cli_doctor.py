"""What `orchestrate doctor` does and says.

What it does not do
    The checks are `orchestrator.doctor`'s.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.text import Text

from orchestrator import view
from orchestrator.checks import Check
from orchestrator.config import load
from orchestrator.doctor import Groups, Probe, login
from orchestrator.launch import absolute
from orchestrator.schedulers import SchedulerError, open_scheduler

SYMBOLS = {"ok": ("✓", "green"), "warn": ("!", "yellow"), "fail": ("✗", "red")}


def main(
    config_name: str | None, probe: bool, timeout: float, as_json: bool, assignments: tuple[str, ...]
) -> int:
    """Exit code: 1 when a check failed."""
    config = absolute(load(config_name, assignments).config, Path.cwd())
    groups = login(config)
    if not as_json:
        view.console().print(_shown(groups))
    if probe:
        runs_dir = Path(config.run.runs_dir)
        runs_dir.mkdir(parents=True, exist_ok=True)
        scheduler = open_scheduler(config.scheduler.kind, runs_dir)
        console = view.console(stderr=True)
        found = _probe(
            Probe(config, scheduler, lambda text: console.print(f"  … {text}", style="dim")), timeout
        )
        groups |= found
        if not as_json:
            view.console().print(_shown(found))
    failed = [check for checks in groups.values() for check in checks if check.level == "fail"]
    if as_json:
        every = {name: [check.as_dict() for check in checks] for name, checks in groups.items()}
        click.echo(json.dumps({"ok": not failed, "groups": every}))
    else:
        view.console().print(_verdict(groups, probe))
    return 1 if failed else 0


def _probe(probe: Probe, timeout: float) -> Groups:
    try:
        return probe.run(timeout)
    except SchedulerError as error:
        return {"probe": [Check("submission", "fail", str(error).replace("\n", "; "))]}


def _shown(groups: Groups) -> Text:
    rows: list[Text] = []
    for name, checks in groups.items():
        rows.append(Text(f"  {name}", "bold"))
        for check in checks:
            rows += _line(check)
    return view.lines(rows)


def _line(check: Check) -> list[Text]:
    symbol, colour = SYMBOLS[check.level]
    head = Text.assemble("  ", (f"{symbol} ", colour), (f"{check.name:<18}", ""), view.clean(check.text))
    return [head, Text(f"                      → {check.remedy}", "dim")] if check.remedy else [head]


def _verdict(groups: Groups, probed: bool) -> Text:
    levels = [check.level for checks in groups.values() for check in checks]
    counts = f"{levels.count('ok')} ok, {levels.count('warn')} warnings, {levels.count('fail')} failures"
    more = "" if probed else "; --probe looks at the compute nodes too"
    return view.row("doctor", counts, Text(more, "dim"))
