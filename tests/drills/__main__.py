"""Runs the drills and writes their table into docs/reliability.md: `make drills`.

How to run it
    python -m tests.drills [-k EXPRESSION]      # a part of them leaves the other rows as they are

What it does not do
    It judges nothing: a drill that fails is a failed test, and its row says so.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reliability.md"
ROWS = ROOT / "docs" / "reliability.jsonl"
BEGIN, END = "<!-- drills -->", "<!-- /drills -->"
HEAD = (
    "| fault | what happened | recovery, s | steps done again | steps counted twice "
    "| left: jobs, processes, sandboxes |\n|---|---|---:|---:|---:|---:|"
)


def line(row: dict[str, object]) -> str:
    left = f"{row['jobs_left']}, {row['processes_left']}, {row['sandboxes_left']}"
    told = (row["fault"], row["happened"], row["recovery_s"], row["steps_lost"], row["counted_twice"], left)
    return "| " + " | ".join(str(cell) for cell in told) + " |"


def merged(new: list[dict[str, object]]) -> list[dict[str, object]]:
    """Rows of earlier runs, each replaced by the latest of its fault."""
    old = [json.loads(text) for text in ROWS.read_text().splitlines()] if ROWS.exists() else []
    return list({row["fault"]: row for row in [*old, *new]}.values())


def write(rows: list[dict[str, object]]) -> None:
    ROWS.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = PAGE.read_text()
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    PAGE.write_text("\n".join([before, HEAD, *map(line, rows), after]))


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.jsonl"
        command = [sys.executable, "-m", "pytest", "-m", "drill", "-v", "tests/drills", *sys.argv[1:]]
        code = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "ORCHESTRATE_DRILLS": str(out)}
        ).returncode
        if out.exists():
            write(merged([json.loads(text) for text in out.read_text().splitlines()]))
    return code


if __name__ == "__main__":
    sys.exit(main())
