"""What `orchestrate config import` does and says.

What it does not do
    It reads no shell and maps no name itself: `orchestrator.import_shell` does.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.text import Text

from orchestrator import view
from orchestrator.config import load, resolve
from orchestrator.durable import publish_bytes
from orchestrator.errors import ConfigError
from orchestrator.import_shell import Imported, as_yaml, convert, entries_of, parse
from orchestrator.plan_checks import contradictions, worries


def main(source: Path, output: Path | None, force: bool, as_json: bool) -> int:
    """Exit code: 1 when a value was wrong, 0 otherwise; what was not mapped is said and no error."""
    try:
        text = source.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{source} cannot be read as text: {error}"]) from error
    found = convert(parse(text))
    if output is not None and output.exists() and not force:
        raise ConfigError([f"{output} exists; choose another name, or --force to replace it"])
    written = as_yaml(found, source.name)
    notes = _notes(found)
    if output is not None:
        publish_bytes(output.absolute(), written.encode())
    if as_json:
        click.echo(json.dumps(_about(found, written, notes), indent=1))
    else:
        if output is None:
            click.echo(written, nl=False)
        view.console(stderr=True).print(_shown(found, notes, output))
    return 1 if found.wrong else 0


def _notes(found: Imported) -> list[str]:
    """What the values, together with the defaults, contradict."""
    resolved = load(None)
    entries, _ = entries_of([f"{key}={value}" for key, (value, _) in found.values.items()])
    config = resolve([*resolved.entries.values(), *entries]).config
    return [*contradictions(config, "run"), *worries(config, "run")]


def _about(found: Imported, written: str, notes: list[str]) -> dict[str, object]:
    return {
        "values": {k: {"value": v, "from": a.name, "line": a.line} for k, (v, a) in found.values.items()},
        "unmapped": [{"name": a.name, "line": a.line, "why": why} for a, why in found.unmapped],
        "wrong": found.wrong,
        "notes": notes,
        "yaml": written,
    }


def _shown(found: Imported, notes: list[str], output: Path | None) -> Text:
    names = {each.name for _, each in found.values.values()}
    where = f" into {output}" if output is not None else ""
    rows = [view.row("imported", f"{len(names)} names as {len(found.values)} keys{where}")]
    rows += [view.row("wrong", Text(text, "red")) for text in found.wrong]
    for each, why in found.unmapped:
        rows.append(view.row("unmapped", Text(f"{each.name}, line {each.line}: {why}", "yellow")))
    rows += view.warnings(notes)
    if output is not None:
        rows.append(view.next_steps([f"orchestrate launch --config {output} --dry-run"]))
    return view.lines(rows)
