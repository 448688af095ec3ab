"""What `orchestrate export` does: it finds the run, and lets the trainer write its policy.

What it does not do
    It reads no weights: checkpoints are the trainer's, which is another package and runs as a command.
"""

from __future__ import annotations

from pathlib import Path

from orchestrator import cli_runs, cli_trainer
from orchestrator.cli_commands import BAD_INPUT
from orchestrator.contract import Exit


def main(name: str | None, out: Path, checkpoint: str, dtype: str, runs_dir: Path | None) -> int:
    """What to exit with. Raises RunNotFound, NotARun."""
    run = cli_runs.find(name, runs_dir)
    where = (str(run.root), f"--out={out}")
    code = cli_trainer.run("export", *where, f"--checkpoint={checkpoint}", f"--dtype={dtype}")
    return BAD_INPUT if code == Exit.USAGE else code
