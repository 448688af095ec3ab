"""Runs the drills and writes their table into docs/reliability.md: `make drills`.

How to run it
    python -m tests.drills                      # the whole table anew, if all of them pass; two at a time
    python -m tests.drills -k EXPRESSION        # a part of them leaves the other rows as they are

What it does not do
    It judges nothing: a drill that fails is a failed test, and the exit code is pytest's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
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
    recovery = "–" if row["recovery_s"] is None else row["recovery_s"]
    told = (row["fault"], row["happened"], recovery, row["steps_lost"], row["counted_twice"], left)
    return "| " + " | ".join(str(cell) for cell in told) + " |"


def merged(new: list[dict[str, object]]) -> list[dict[str, object]]:
    """Rows of earlier runs, each replaced by the latest of its fault."""
    old = [json.loads(text) for text in ROWS.read_text().splitlines()] if ROWS.exists() else []
    return latest([*old, *new])


def latest(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """One of each fault: workers have an undisturbed run each."""
    return list({row["fault"]: row for row in rows}.values())


def origin(rows: list[dict[str, object]], whole: bool, seconds: float) -> str:
    if not whole:
        return "These rows are of several runs, each the latest of its fault."
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    told = f"{len(rows) - 1} faults and the undisturbed run, two at a time, in {seconds / 60:.0f} minutes"
    return f"{told} on {os.cpu_count()} cores, {date.today()}, code of `{commit.stdout.strip()}`."


def write(rows: list[dict[str, object]], said: str) -> None:
    ROWS.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = PAGE.read_text()
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    PAGE.write_text("\n".join([before, said, "", HEAD, *map(line, rows), after]))


def main() -> int:
    start, whole = time.monotonic(), not sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.jsonl"
        pytest = [sys.executable, "-m", "pytest", "-v", "-n", "2", "--dist", "worksteal"]
        command = [*pytest, "-m", "drill", "tests/drills", *sys.argv[1:]]
        environment = os.environ | {"ORCHESTRATE_DRILLS": str(out)}
        code = subprocess.run(command, cwd=ROOT, env=environment).returncode
        new = [json.loads(text) for text in out.read_text().splitlines()] if out.exists() else []
    whole = whole and code == 0
    if new:
        rows = latest(new) if whole else merged(new)
        write(rows, origin(rows, whole, time.monotonic() - start))
    return code


if __name__ == "__main__":
    sys.exit(main())
