"""Runs the attacks and writes their table into docs/security.md: `make escape`.

How to run it
    python -m tests.escape [-k EXPRESSION]      # a part of them leaves the other rows as they are

What it does not do
    It judges nothing: an attempt that succeeds is a failed test, and its row says so.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "security.md"
ROWS = ROOT / "docs" / "security.jsonl"
BEGIN, END = "<!-- escape -->", "<!-- /escape -->"
Cells = dict[str, str]


def merged(new: list[Cells]) -> list[Cells]:
    """Rows of earlier runs, each replaced by the latest of its attempt and engine."""
    old = [json.loads(text) for text in ROWS.read_text().splitlines()] if ROWS.exists() else []
    return list({(row["attempt"], row["engine"]): row for row in [*old, *new]}.values())


def table(rows: list[Cells]) -> list[str]:
    """A line for each attempt, a column for each engine."""
    engines = list(dict.fromkeys(row["engine"] for row in rows))
    seen = {(row["attempt"], row["engine"]): row["seen"] for row in rows}
    lines = [_line("attempt", "tried", "contained by", *(f"seen: {name}" for name in engines))]
    lines.append("|" + "---|" * (3 + len(engines)))
    for row in {row["attempt"]: row for row in rows}.values():
        cells = [seen.get((row["attempt"], name), "–") for name in engines]
        lines.append(_line(row["attempt"], row["tried"], row["contained"], *cells))
    return lines


def _line(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |"


def write(rows: list[Cells]) -> None:
    ROWS.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = PAGE.read_text()
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    PAGE.write_text("\n".join([before, *table(rows), after]))


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.jsonl"
        command = [sys.executable, "-m", "pytest", "-m", "escape", "-q", "tests/escape", *sys.argv[1:]]
        code = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "ORCHESTRATE_ESCAPE": str(out)}
        ).returncode
        if out.exists():
            write(merged([json.loads(text) for text in out.read_text().splitlines()]))
    return code


if __name__ == "__main__":
    sys.exit(main())
