"""Task rows from a parquet file, and the order in which training draws them.

What it is
    `read_rows` reads and checks a parquet file of tasks; `Sampler` hands out indices, epoch after epoch,
    and can say in a few numbers where it stands.

How to use it
    rows = read_rows(Path("train.parquet"))
    sampler = Sampler(len(rows), seed=0, shuffle=True)
    batch = [rows[i] for i in sampler.take(16)]
    saved = sampler.state_dict(); sampler.load_state_dict(saved)

The file (docs/reference/data.md)
    prompt      a string, or a list of {role, content} messages; rows of SWE-bench have problem_statement
    others      whatever `trainer.columns` makes a task of; struct fields that are null in a row are left out,
                for parquet gives every row of a column the same fields

What it does not do
    It makes no tasks and no prompts out of rows (`trainer.tasks` does) and imports no torch.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, TypedDict

from trainer.errors import TaskError

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """Every row of a parquet file as a dictionary, checked. Raises TaskError."""
    rows = raw_rows(path)
    for number, row in enumerate(rows):
        check_prompt(row, f"{path}, row {number}")
    return rows


def raw_rows(path: Path) -> list[Row]:
    """Every row of a parquet file as a dictionary without null fields of structs. Raises TaskError."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    if not path.is_file():
        raise TaskError(f"{path} is missing: name a parquet file of tasks, or builtin:NAME")
    try:
        rows: list[Row] = parquet.read_table(path).to_pylist()
    except (arrow.ArrowException, OSError) as error:
        raise TaskError(f"{path} cannot be read as parquet: {error}") from error
    if not rows:
        raise TaskError(f"{path} holds no rows: training needs at least one task")
    return [{key: _without_nulls(value) for key, value in row.items()} for row in rows]


def write_rows(path: Path, rows: list[Row]) -> None:
    """Write rows as parquet; the built-in tasks take the same road as a user's file."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(arrow.Table.from_pylist(rows), path)


def check_prompt(row: Row, where: str) -> None:
    """Raises TaskError, which begins with `where`, when a row has no prompt that can be read."""
    prompt = row.get("prompt")
    if isinstance(prompt, str) and prompt:
        return
    if prompt is None and "prompt" not in row and row.get("problem_statement"):
        return
    if isinstance(prompt, list) and prompt and all(map(_is_message, prompt)):
        return
    raise TaskError(
        f"{where}, column `prompt`: it holds {_short(prompt)}; it must be a non-empty string, "
        "or a non-empty list of messages like {role: user, content: ...}"
    )


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and "content" in value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _without_nulls(value: Any) -> Any:
    """Structs without their null fields, at every depth."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


class Cursor(TypedDict):
    """Where a sampler stands: enough to go on, and to notice that the data is not the same."""

    epoch: int
    position: int
    size: int
    seed: int


class Sampler:
    """Indices 0…size-1, each once an epoch; a batch may reach over the end of an epoch into the next.

    The order of an epoch depends on seed and epoch alone, so a cursor of two numbers restores it.
    """

    def __init__(self, size: int, seed: int, shuffle: bool = True) -> None:
        if size < 1:
            raise TaskError("there are no tasks to draw from")
        self.size, self.seed, self.shuffle = size, seed, shuffle
        self.epoch = self.position = 0

    def take(self, count: int) -> list[int]:
        """The next `count` indices."""
        taken: list[int] = []
        while len(taken) < count:
            part = self._order()[self.position : self.position + count - len(taken)]
            taken += part
            self.position += len(part)
            if self.position == self.size:
                self.epoch, self.position = self.epoch + 1, 0
        return taken

    def peek(self, count: int) -> list[int]:
        """What `take` would give."""
        state = self.state_dict()
        try:
            return self.take(count)
        finally:
            self.load_state_dict(state)

    def state_dict(self) -> Cursor:
        return {"epoch": self.epoch, "position": self.position, "size": self.size, "seed": self.seed}

    def load_state_dict(self, state: Cursor) -> None:
        """Go on from a saved cursor. Raises TaskError when it belongs to other data or another seed."""
        for key, mine in (("size", self.size), ("seed", self.seed)):
            if state.get(key) != mine:
                raise TaskError(
                    f"the checkpoint's data cursor has {key} {state.get(key)}, this run has {mine}: "
                    "go on with the same data and run.seed, or set trainer.resume=never"
                )
        self.epoch, self.position = state["epoch"], state["position"]

    def _order(self) -> list[int]:
        order = list(range(self.size))
        if self.shuffle:
            random.Random(f"{self.seed}/{self.epoch}").shuffle(order)  # noqa: S311 - an order, no secret
        return order


def steps_in(size: int, per_step: int, epochs: int) -> int:
    """Steps that `epochs` passes over `size` tasks take; the last one is filled from the next pass."""
    return -(-size * epochs // per_step)
