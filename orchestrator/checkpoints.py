"""Which checkpoints a run has, seen from outside the trainer.

What it is
    Folders `step-NNNNNN` below `training/checkpoints` of the run, or below `trainer.checkpoint_dir` of its
    frozen configuration. The trainer renames a checkpoint into place when it is whole, so a folder that has
    its name counts; one that is being written has another.

What it does not do
    It opens no checkpoint: whether the newest can be loaded is for the trainer to say.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import yaml

from orchestrator.contract import RunDirectory, read_bytes

_NAME = re.compile(r"step-(\d+)")


def folder_of(run: RunDirectory) -> Path:
    """Where the trainer of this run keeps its checkpoints."""
    with contextlib.suppress(yaml.YAMLError, KeyError, TypeError):
        chosen = yaml.safe_load(read_bytes(run.config))["trainer"]["checkpoint_dir"]
        if chosen:
            return Path(chosen)
    return run.checkpoints


def steps(folder: Path) -> list[int]:
    """Steps that have a checkpoint, in order."""
    with contextlib.suppress(OSError):
        found = (_NAME.fullmatch(path.name) for path in folder.iterdir() if path.is_dir())
        return sorted(int(match[1]) for match in found if match)
    return []


def newest(run: RunDirectory) -> str:
    """Name of the newest checkpoint, "" without any."""
    found = steps(folder_of(run))
    return f"step-{found[-1]:06d}" if found else ""
