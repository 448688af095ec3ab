"""What `orchestrate rollouts` does: it finds the run, and lets the trainer's own viewer show it.

What it does not do
    It reads no trajectory: their format is the trainer's, which is another package and runs as a command.
"""

from __future__ import annotations

from pathlib import Path

from orchestrator import cli_runs, cli_trainer


def main(
    name: str | None,
    runs_dir: Path | None,
    step: int | None,
    task: str,
    validation: bool,
    everything: bool,
    as_json: bool,
) -> int:
    """The viewer's exit code. Raises RunNotFound, NotARun."""
    run = cli_runs.find(name, runs_dir)
    chosen = [] if step is None else [f"--step={step}"]
    flags = {"--validation": validation, "--all": everything, "--json": as_json}
    given = [flag for flag, wanted in flags.items() if wanted]
    return cli_trainer.run("view", str(run.root), f"--task={task}", *chosen, *given)
