"""How far an evaluation is, and what it found, for whoever looks from outside.

What it is
    `Progress` counts the episodes that are judged; it reads what is new since its last look. `rows` is how an
    evaluation looks in a terminal.

How to use it
    Progress(run).count(); view.lines(rows(run.read(run.evaluation, Evaluation), judged=12))

What it does not do
    It estimates nothing: the trainer does, and its record has the numbers.
"""

from __future__ import annotations

from pathlib import Path

from rich.text import Text

from orchestrator.contract import Evaluation, RunDirectory
from orchestrator.view import clean, row, short_path

WIDTH = 24


class Progress:
    """Of one run. A file may only grow, so that what was counted is not read again."""

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self._read: dict[Path, tuple[int, int]] = {}  # bytes, lines

    def count(self) -> int:
        """Episodes judged so far, in all lives; what two lives both did counts twice."""
        for path in self.run.judged.glob("*.jsonl"):
            size, lines = self._read.get(path, (0, -1))  # the first line is no episode
            with path.open("rb") as file:
                file.seek(size)
                new = file.read()
            self._read[path] = size + len(new), lines + new.count(b"\n")
        return sum(max(0, lines) for _, lines in self._read.values())


def progress_line(found: Evaluation, judged: int) -> str:
    """`judged 120 of 512 episodes`."""
    whole = found.tasks * found.samples
    return f"judged {min(judged, whole):,} of {whole:,} episodes ({min(1.0, judged / max(1, whole)):.0%})"


def rows(found: Evaluation | None, judged: int = 0) -> list[Text]:
    """What is known: numbers once it is complete, how far it is before that, nothing of a training."""
    if found is None:
        return []
    how = "the likeliest token" if found.greedy else f"temperature {found.temperature:g}"
    about = f"{found.tasks:,} tasks × {found.samples} samples, {how}"
    head = [row("evaluates", clean(_policy(found)))]
    data = short_path(found.data) if "/" in found.data else found.data
    head.append(row("on", clean(data), Text(f"  {about}", "dim")))
    if not found.complete:
        return [*head, row("so far", progress_line(found, judged))]
    return [*head, *(_estimate(k, one, found.tasks) for k, one in found.pass_at.items()), *_lost(found)]


def _policy(found: Evaluation) -> str:
    if not found.checkpoint:
        return found.model
    folder = Path(found.checkpoint)
    run = next((part for part in reversed(folder.parts[:-1]) if part not in ("training", "checkpoints")), "")
    return f"{folder.name} of {run}" if run else folder.name


def _estimate(k: str, one: dict[str, float | None], tasks: int) -> Text:
    """`pass@4   81.0 % ± 2.5   ███████`, and how many tasks had enough samples, where not all had."""
    value, error, count = one["value"], one["stderr"], int(one["tasks"] or 0)
    if value is None:
        return row(f"pass@{k}", Text(f"no task has {k} judged samples", "yellow"))
    bar = "█" * round(WIDTH * value)
    spread = f" ± {100 * error:.1f}" if error else ""  # where all tasks are alike it knows nothing
    some = f"   over {count} tasks that have {k} judged samples" if count < tasks else ""
    return row(
        f"pass@{k}",
        Text(f"{100 * value:5.1f} %{spread:<7} ", "bold"),
        Text(bar, "green"),
        Text("░" * (WIDTH - len(bar)), "dim"),
        Text(some, "yellow"),
    )


def _lost(found: Evaluation) -> list[Text]:
    if not found.lost:
        return []
    whole = found.tasks * found.samples
    told = f"{found.lost} of {whole} episodes, to infrastructure, each time that they were played; not scored"
    return [row("lost", Text(told, "yellow"))]
