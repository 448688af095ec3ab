"""`python -m trainer.check FILE`: is this task file one that training can use, and what does it need?

What it is
    Reads every row in whatever columns it is written, and says all that is wrong, each with row, column and
    what to do; then how many tasks of which kind there are, which images they need, how long the prompts are,
    and the first task as the policy and the judge will see it. `orchestrate data check` calls this.

How to use it
    python -m trainer.check FILE|builtin:NAME [--tokenizer MODEL] [--function MODULE:FUNCTION] [--json]
    Exit code 0: nothing is wrong; 2: something is, or the file cannot be read.

What it does not do
    It pulls no image and runs no task.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from trainer.columns import read, style
from trainer.data import check_prompt, raw_rows
from trainer.errors import TaskError, TrainerError
from trainer.tasks import BUILTIN, Task, family, said

SHOWN_ERRORS = 20
BAD = 2
Lengths = dict[str, float]


@dataclass
class Report:
    """What was found. `lengths` are of prompts: min, median, p95, max, in `unit`."""

    source: str
    rows: int = 0
    tasks: list[Task] = field(default_factory=list)
    styles: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    lengths: Lengths = field(default_factory=dict)
    unit: str = "characters"

    @property
    def images(self) -> Counter[str]:
        """How many tasks need which image; "" is the server's default."""
        return Counter(task.image for task in self.tasks)


def examine(source: str, functions: Sequence[str] = (), count: Callable[[str], int] = len) -> Report:
    """Every row of a file, or every task of a built-in family. Raises TaskError when it cannot be read."""
    report = Report(source)
    if source.startswith(BUILTIN):
        report.tasks = family(source.removeprefix(BUILTIN))
        report.rows, report.styles["own"] = len(report.tasks), len(report.tasks)
    else:
        _rows(report, Path(source), functions)
    report.errors += _twice(report.tasks)
    report.lengths = spread([count(task.prompt) for task in report.tasks])
    return report


def _rows(report: Report, path: Path, functions: Sequence[str]) -> None:
    for number, row in enumerate(raw_rows(path)):
        report.rows += 1
        where = f"{path}, row {number}"
        try:
            check_prompt(row, where)
            report.tasks.append(read(row, where, functions))
            report.styles[style(row)] += 1
        except TaskError as error:
            report.errors.append(str(error).removeprefix(f"{path}, "))


def _twice(tasks: Sequence[Task]) -> list[str]:
    """Ids that several rows have: statistics and rollouts could not tell them apart."""
    found = Counter(task.id for task in tasks)
    return [
        f"column `instance.instance_id`: {name!r} is the id of {times} rows; make it unique"
        for name, times in found.items()
        if times > 1
    ]


def spread(values: Sequence[int]) -> Lengths:
    """Least, middle, 95 of 100, most."""
    if not values:
        return {}
    ordered = sorted(values)
    p95 = ordered[min(len(ordered) - 1, len(ordered) * 95 // 100)]
    return {"min": ordered[0], "median": median(ordered), "p95": p95, "max": ordered[-1]}


# --- shown -------------------------------------------------------------------------------------------


def as_json(report: Report) -> dict[str, Any]:
    """For programs: counts, images, lengths, errors, and the first task whole."""
    return {
        "source": report.source,
        "rows": report.rows,
        "tasks": len(report.tasks),
        "styles": dict(report.styles),
        "rewards": dict(Counter(task.reward.kind for task in report.tasks)),
        "sources": dict(Counter(task.source for task in report.tasks)),
        "images": dict(report.images),
        "prompt_lengths": report.lengths | {"unit": report.unit} if report.lengths else {},
        "errors": report.errors,
        "first": asdict(report.tasks[0]) if report.tasks else None,
    }


def show(report: Report) -> None:
    """For people."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table.grid(padding=(0, 3))
    for name, value in _facts(report):
        table.add_row(f"[bold]{name}[/]", value)
    console.print(table)
    if report.tasks:
        _first(console, report.tasks[0])
    for error in report.errors[:SHOWN_ERRORS]:
        console.print("✗ ", style="red", end="")
        console.print(error, markup=False, soft_wrap=True)
    if (more := len(report.errors) - SHOWN_ERRORS) > 0:
        console.print(f"  and {more} more; --json has them all")
    verdict = (
        f"[red]{len(report.errors)} thing(s) to mend[/]" if report.errors else "[green]nothing is wrong[/]"
    )
    console.print(f"\n{report.rows} row(s), {len(report.tasks)} task(s): {verdict}")


def _facts(report: Report) -> list[tuple[str, str]]:
    """What stands above the first task."""
    from rich.markup import escape

    images = [f"{name or '(the default image)'}  × {n}" for name, n in report.images.most_common(8)]
    if (more := len(report.images) - len(images)) > 0:
        images.append(f"and {more} more; --json has them all")
    sources = Counter(task.source for task in report.tasks if task.source)
    lengths = "  ".join(f"{name} {value:g}" for name, value in report.lengths.items())
    facts = [
        ("columns", _counted(report.styles)),
        ("rewards", _counted(Counter(task.reward.kind for task in report.tasks))),
        ("from", _counted(sources)),
        ("images", "\n".join(images)),
        ("prompts", f"{lengths}  ({report.unit})" if lengths else ""),
    ]
    return [(name, escape(value)) for name, value in facts if value]


def _counted(counts: Counter[str]) -> str:
    shown = [f"{name} × {n}" for name, n in counts.most_common(10)]
    return "  ".join(shown) + (f"  and {len(counts) - 10} more" if len(counts) > 10 else "")


def _first(console: Any, task: Task) -> None:
    """The first task: what the policy sees, what its sandbox holds, how it is judged."""
    from rich.markup import escape
    from rich.panel import Panel

    prompt = "\n\n".join(f"[{m['role']}]\n{m['content']}" for m in task.messages) or task.prompt
    console.print(Panel(escape(prompt.rstrip()), title=f"first task: {escape(task.id)}", title_align="left"))
    lines = [f"image    {task.image or '(the default)'}", f"workdir  {task.workdir or '(of the image)'}"]
    lines += [f"file     {name}  {len(text)} characters" for name, text in task.setup.files.items()]
    lines += [f"setup    {command}" for command in task.setup.commands]
    lines += [f"hidden   {path}" for path in task.setup.hidden]
    lines += [f"reward   {said(task.reward)}   (within {task.reward.timeout_s:g} s)"]
    lines += [f"test     {name}" for name in task.reward.fail_to_pass[:5]]
    console.print("\n".join(f"  {line}" for line in lines), markup=False, soft_wrap=True)
    console.print()


# --- the command line --------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer.check", description="Check a task file.")
    parser.add_argument("file", help="a parquet file, or builtin:NAME")
    parser.add_argument(
        "--tokenizer", default="", help="model directory or name: prompt lengths in its tokens"
    )
    parser.add_argument("--function", action="append", default=[], help="as in data.reward_functions")
    parser.add_argument("--json", action="store_true", help="for programs")
    given = parser.parse_args(arguments)
    try:
        report = examine(given.file, given.function, counter(given.tokenizer))
    except TrainerError as error:
        print(json.dumps({"error": str(error)}) if given.json else f"error: {error}", file=sys.stderr)
        return BAD
    report.unit = "tokens" if given.tokenizer else "characters"
    if given.json:
        print(json.dumps(as_json(report), indent=2, ensure_ascii=False))
    else:
        show(report)
    return BAD if report.errors else 0


def counter(tokenizer: str) -> Callable[[str], int]:
    """What counts the length of a prompt. Raises ModelError."""
    if not tokenizer:
        return len
    from trainer.model import find_model, load_tokenizer

    loaded = load_tokenizer(find_model(tokenizer))
    return lambda text: len(loaded.encode(text))


if __name__ == "__main__":
    sys.exit(main())
