"""What an evaluation has judged already: one line per episode, on the disk before it counts.

What it is
    Each process of each life of an evaluation has a file of its own in `training/judged/`. Its first line
    says what is judged (digests of weights and tasks, seeds, sampling); each further one is an episode as
    `trainer.view` writes it. A life begins with the episodes of all lives before it that judged the same; a
    line that a kill cut short is one that never was.

How to use it
    known = read(run, about)
    journal = Journal(run.judged_by(attempt, rank), about); journal.add(line(episode))

What it does not do
    It keeps no episode that infrastructure lost: that one is to be played again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from orchestrator.contract import RunDirectory, append_line, read_json_lines
from orchestrator.durable import fsync_directory
from trainer.episode import Episode, Status
from trainer.tasks import BUILTIN, Task
from trainer.view import Line

About = dict[str, Any]
"""What must be equal for two lives to judge the same."""


class Journal:
    """The file of this process. It is made with the first episode, so that a life that judged none leaves
    none."""

    def __init__(self, path: Path, about: About) -> None:
        self.path, self._about, self._begun = path, about, False

    def add(self, line: Line) -> None:
        """Raises OSError; then the episode is not there."""
        if not self._begun:
            self.path.parent.mkdir(exist_ok=True)
            # A trainer that is started by hand has no number of its own: it goes on in the file of the last
            # one, which may end in half a line.
            above = "\n" if self.path.exists() else ""
            append_line(self.path, above + json.dumps({"about": self._about}, sort_keys=True), sync=True)
            fsync_directory(self.path.parent)
            self._begun = True
        append_line(self.path, json.dumps(line), sync=True)


def read(run: RunDirectory, about: About) -> dict[int, Line]:
    """Every episode that is judged, by its number. Of two lives that both judged it, the one that is read
    last; with the same seeds, they drew from the same distribution."""
    found: dict[int, Line] = {}
    for path in sorted(run.judged.glob("*.jsonl")):
        same = False
        for row in read_json_lines(path):
            if "about" in row:
                same = row["about"] == about
            elif same:
                found[row["number"]] = row
    return found


def as_known(lines: Iterable[Line]) -> list[Episode]:
    """Enough of judged episodes for `Rollouts.collect` not to play them again."""
    return [
        Episode(
            *(one["task"], one["group"], [0], 1, [0], [0.0]),
            reward=one["reward"],
            status=Status(one["status"]),
            number=one["number"],
        )
        for one in lines
    ]


# --- digests -----------------------------------------------------------------------------------------


def digest_of_weights(folder: Path) -> str:
    """sha256 of a model's safetensors, one after the other in the order of their names."""
    whole = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                whole.update(block)
    return whole.hexdigest()


def digest_of_tasks(source: str, tasks: Sequence[Task]) -> str:
    """sha256 of the file, as `sha256sum` prints it; of a built-in family, of its rows as JSON."""
    if not source.startswith(BUILTIN):
        with Path(source).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    rows = [task.row() for task in tasks]
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
