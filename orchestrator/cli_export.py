"""What `orchestrate export` does: it finds the run, and lets the trainer write its policy.

What it does not do
    It reads no weights: checkpoints are the trainer's, which is another package and runs as a command.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from orchestrator import cli_runs
from orchestrator.contract import Exit

BAD_INPUT = 2


def main(name: str | None, out: Path, checkpoint: str, dtype: str, runs_dir: Path | None) -> int:
    """What to exit with. Raises RunNotFound, NotARun."""
    run = cli_runs.find(name, runs_dir)
    command = [sys.executable, "-m", "trainer.export", str(run.root), f"--out={out}"]
    command += [f"--checkpoint={checkpoint}", f"--dtype={dtype}"]
    code = subprocess.run(command, check=False).returncode
    return BAD_INPUT if code == Exit.USAGE else code
