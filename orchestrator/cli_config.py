"""What `orchestrate config …` does: print configurations and keys.

What it does not do
    It changes nothing. Values of variables that sound like secrets are masked.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import click
from rich.text import Text

from orchestrator import config_keys, view
from orchestrator.config import Resolved, load


def show(name: str | None, only_set: bool, as_json: bool, assignments: Sequence[str]) -> None:
    """Every value with its origin, in the order of the schema."""
    found = load(name, assignments)
    rows = [(key, value, found.origin(key)) for key, value in values(found)]
    if only_set:
        rows = [r for r in rows if r[2] != "default"]
    if as_json:
        click.echo(
            json.dumps({key: {"value": value, "origin": origin} for key, value, origin in rows}, indent=1)
        )
        return
    console = view.console()
    for key, value, origin in rows:
        plain = "dim" if origin == "default" else ""
        console.print(Text.assemble((f"{key:<36}", plain), f"{_written(key, value):<28}", (origin, "dim")))


def values(found: Resolved) -> list[tuple[str, Any]]:
    """(key, value) of every key; an open mapping gives a row for each name in it."""
    rows: list[tuple[str, Any]] = []
    for key in config_keys.keys().values():
        value: Any = found.config
        for part in key.name.split("."):
            value = getattr(value, part)
        if key.is_mapping:
            names = {f"{key.name}.{n}": v for n, v in value.items()}
            rows += [(name, view.hidden(name, v)) for name, v in names.items()]
        else:
            rows.append((key.name, value))
    return rows


def _written(name: str, value: Any) -> str:
    key = config_keys.keys().get(name)
    return config_keys.shown(key, value) if key is not None else str(value)


def keys(pattern: str | None, markdown: bool, as_json: bool) -> None:
    """The keys whose names contain the pattern; with `markdown` the whole reference page."""
    if markdown:
        click.echo(config_keys.markdown(), nl=False)
        return
    found = [k for k in config_keys.keys().values() if pattern is None or pattern in k.name]
    if as_json:
        click.echo(json.dumps([_as_dict(key) for key in found], indent=1))
        return
    if not found:
        close = config_keys.nearest(pattern or "")
        raise click.UsageError(
            f"no key contains {pattern!r}" + (f"; try {', '.join(close)}" if close else "")
        )
    console = view.console()
    for key in found:
        about = f"{key.name:<36}{key.shown_default:<24}"
        console.print(Text.assemble(about, (f"{key.allowed}. {key.doc}", "dim")))


def _as_dict(key: config_keys.Key) -> dict[str, Any]:
    return {"key": key.name, "default": key.default, "takes": key.allowed, "meaning": key.doc}
