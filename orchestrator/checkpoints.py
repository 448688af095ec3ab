"""Which checkpoints a run has, seen from outside the trainer.

What it is
    Folders `step-NNNNNN`, or another trainer's `NAME-N`, below `training/checkpoints` of the run, or below
    `trainer.checkpoint_dir`, which the launcher writes into the manifest. The trainer renames a checkpoint
    into place when it is whole, so a folder that has its name counts; one that is being written has another.
    `latest` and `best` beside them name one each. What an evaluation goes on from is what it has judged.

How to use it
    newest(run)                                # "step-000120", or "judged-512" of an evaluation
    choose(folder_of(run), "best", run.run_id) # its folder; NoCheckpoint says which there are

What it does not do
    It opens no checkpoint: whether one can be loaded is for the trainer to say. Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from pathlib import Path

from orchestrator.contract import Manifest, RunDirectory, read_bytes
from orchestrator.durable import fsync_directory
from orchestrator.errors import OrchestrateError

STATE, POLICY = "state.json", "policy"
LATEST, BEST = "latest", "best"
_NAME = re.compile(r"[^.].*-(\d+)")


class NoCheckpoint(OrchestrateError):
    """There is no such checkpoint; the message says which there are."""


def folder_of(run: RunDirectory) -> Path:
    """Where the trainer of this run keeps its checkpoints."""
    manifest = run.read(run.manifest, Manifest)
    chosen = manifest.job_settings().checkpoint_dir if manifest else ""
    return Path(chosen) if chosen else run.checkpoints


def newest(run: RunDirectory) -> str:
    """Name of what a next life goes on from: the newest checkpoint by its step number, or how many episodes
    were judged; "" without any."""
    with contextlib.suppress(OSError):
        found = [(_NAME.fullmatch(path.name), path) for path in folder_of(run).iterdir() if path.is_dir()]
        steps = {int(match[1]): path.name for match, path in found if match}
        if steps:
            return steps[max(steps)]
    count = judged(run)
    return f"judged-{count}" if count else ""


def judged(run: RunDirectory) -> int:
    """Episodes that an evaluation has judged in all its lives, not counting what two of them both did."""
    lines = [read_bytes(path).count(b"\n") for path in run.judged.glob("*.jsonl")]
    return sum(max(0, count - 1) for count in lines)  # the first line says what is judged


# --- the built-in trainer's --------------------------------------------------------------------------


def all_in(folder: Path) -> list[Path]:
    """Every checkpoint of the built-in trainer, whole or not, oldest first."""
    numbered = [path for path in folder.glob("step-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(numbered, key=step_of)


def step_of(checkpoint: Path) -> int:
    """How many steps were done when it was written."""
    return int(checkpoint.name.rpartition("-")[2])


def newest_in(folder: Path) -> Path | None:
    """What `latest` names if it is whole, else the newest one that is; None without any."""
    return next(filter(is_whole, [*_named(folder, LATEST), *reversed(all_in(folder))]), None)


def best_in(folder: Path) -> Path | None:
    """The one with the highest score, which `best` names; None without any."""
    return next(filter(is_whole, _named(folder, BEST)), None)


def choose(folder: Path, which: str, of: str) -> Path:
    """`best` (by validation; the newest where nothing was validated), `latest`, also called `newest`, or a
    step, like 120. Raises NoCheckpoint. `of` names the run in its message."""
    there = [path for path in all_in(folder) if is_whole(path)]
    if which in ("best", "latest", "newest"):
        found = (best_in(folder) if which == "best" else None) or newest_in(folder)
    else:
        found = next((path for path in there if which.isdigit() and step_of(path) == int(which)), None)
    if found is None:
        names = f"there are {', '.join(path.name for path in there)}" if there else f"{folder} holds none"
        raise NoCheckpoint(f"no checkpoint {which!r} of {of}: {names}; say best, latest or a step")
    return found


def _named(folder: Path, file: str) -> list[Path]:
    named = read_bytes(folder / file).decode(errors="replace").strip()
    return [path for path in all_in(folder) if path.name == named]


def is_whole(checkpoint: Path) -> bool:
    """True when the last file was written and every file has the size that it says."""
    try:
        sizes = json.loads((checkpoint / STATE).read_text())["sizes"]
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def keep_policy(checkpoint: Path, target: Path) -> None:
    """The policy of a checkpoint once more, in the new folder `target`, so that it stays when its run removes
    the checkpoint: hard links, for nobody ever writes to these files; copies on another filesystem. Raises
    NoCheckpoint when it is gone, OSError."""
    target.mkdir()
    files = [path for path in (checkpoint / POLICY).glob("*") if path.is_file()]
    if not files:
        raise NoCheckpoint(f"{checkpoint} holds no policy (any more): choose another checkpoint")
    for path in files:
        try:
            os.link(path, target / path.name)
        except OSError:
            import shutil  # not for a launch that trains

            shutil.copyfile(path, target / path.name)
    fsync_directory(target)
