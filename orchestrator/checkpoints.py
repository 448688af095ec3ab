"""Which checkpoints a run has, seen from outside the trainer.

What it is
    Folders `step-NNNNNN`, or another trainer's `NAME-N`, below `training/checkpoints` of the run, or below
    `trainer.checkpoint_dir`, which the launcher writes into the manifest. The trainer renames a checkpoint
    into place when it is whole, so a folder that has its name counts; one that is being written has another.

What it does not do
    It opens no checkpoint: whether the newest can be loaded is for the trainer to say. Standard library only.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from orchestrator.contract import Manifest, RunDirectory

_NAME = re.compile(r"[^.].*-(\d+)")


def folder_of(run: RunDirectory) -> Path:
    """Where the trainer of this run keeps its checkpoints."""
    manifest = run.read(run.manifest, Manifest)
    chosen = manifest.job_settings().checkpoint_dir if manifest else ""
    return Path(chosen) if chosen else run.checkpoints


def newest(run: RunDirectory) -> str:
    """Name of the newest checkpoint, by its step number; "" without any."""
    with contextlib.suppress(OSError):
        found = [(_NAME.fullmatch(path.name), path) for path in folder_of(run).iterdir() if path.is_dir()]
        steps = {int(match[1]): path.name for match, path in found if match}
        return steps[max(steps)] if steps else ""
    return ""
