"""What `orchestrate export` does: it finds the run, and lets the trainer write its policy.

What it does not do
    It reads no weights: checkpoints are the trainer's, which is another package and runs as a command.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from orchestrator import cli_runs


def main(name: str | None, out: Path, checkpoint: str, dtype: str, runs_dir: Path | None) -> int:
    """The exit code of `trainer.export`. Raises RunNotFound, NotARun."""
    run = cli_runs.find(name, runs_dir)
    command = [sys.executable, "-m", "trainer.export", str(run.root), f"--out={out}"]
    return subprocess.run(
        [*command, f"--checkpoint={checkpoint}", f"--dtype={dtype}"], check=False
    ).returncode
