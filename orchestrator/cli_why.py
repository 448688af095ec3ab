"""What `orchestrate why` does and says.

What it does not do
    It neither collects nor judges: `orchestrator.why_facts` and `orchestrator.why` do.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click
from rich.text import Text

from orchestrator import cli_runs, view, why
from orchestrator.schedulers import Scheduler, SchedulerError
from orchestrator.why import Facts, Finding
from orchestrator.why_facts import collect

SYMBOLS = {"problem": ("✗", "red"), "warning": ("!", "yellow"), "note": ("·", "blue"), "ok": ("✓", "green")}


def main(name: str | None, wait: float | None, runs_dir: Path | None, as_json: bool) -> int:
    """Exit code: 1 when there is a problem, 0 otherwise."""
    run = cli_runs.find(name, runs_dir)
    scheduler: Scheduler | None
    try:
        scheduler = cli_runs.scheduler_of(run)
    except SchedulerError:
        scheduler = None
    facts = collect(run, scheduler, cli_runs.typed_name(run, runs_dir), wait)
    findings = why.diagnose(facts)
    if as_json:
        about = {"run_id": facts.run_id, "state": facts.state, "reason": facts.reason}
        found = [dataclasses.asdict(finding) for finding in findings]
        click.echo(json.dumps({**about, "findings": found, "facts": dataclasses.asdict(facts)}, default=str))
    else:
        view.console().print(shown(facts, findings))
    return 1 if findings[0].severity == "problem" else 0


def shown(facts: Facts, findings: list[Finding]) -> Text:
    """The diagnosis: a head line, the findings, then the one command to type next."""
    rows = [Text.assemble("  ", (facts.run_id, "bold"), "  ", view.styled(facts.state))]
    for finding in findings:
        rows += _finding(finding)
    if command := next((f.command for f in findings if f.command), ""):
        rows.append(view.next_steps([command]))
    return view.lines(rows)


def _finding(finding: Finding) -> list[Text]:
    symbol, colour = SYMBOLS[finding.severity]
    head = Text.assemble(
        "  ", (f"{symbol} ", colour), (f"{finding.about:<10}", "bold"), view.clean(finding.text)
    )
    evidence = [Text(f"              │ {view.clean(line)}", "dim") for line in finding.evidence]
    return [head, *evidence]
