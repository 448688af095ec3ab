"""`python -m trainer.families`: check the generated repositories, show one, count them.

How to use it
    python -m trainer.families check              every task; --every 10: each tenth
    python -m trainer.families show TASK          its prompt, its mistake, the fix
    python -m trainer.families list               how many tasks of which kind

What it does not do
    It needs no sandbox (`trainer.families.check` says what it runs instead).
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from trainer.families.check import checked
from trainer.families.repositories import VALIDATION, Mended, every


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer.families", description="Generated repositories.")
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="tests fail before the reference fix, and pass after it")
    check.add_argument("--every", type=int, default=1, help="only each N-th task")
    check.add_argument("--jobs", type=int, default=2, help="so many at a time")
    show = commands.add_parser("show", help="a task, its mistake and the fix")
    show.add_argument("task", help="its id, or a beginning of it")
    commands.add_parser("list", help="how many tasks of which kind")
    given = parser.parse_args(arguments)
    if given.command == "check":
        return _check(list(every())[:: given.every], given.jobs)
    return _show(given.task) if given.command == "show" else _list()


def _check(tasks: list[Mended], jobs: int) -> int:
    found: list[str] = []
    with ThreadPoolExecutor(jobs) as pool:
        for number, wrong in enumerate(pool.map(checked, tasks), start=1):
            found += wrong
            for line in wrong:
                print(line, flush=True)
            if number % 25 == 0 and sys.stderr.isatty():
                print(f"{number} of {len(tasks)}", file=sys.stderr)
    print(f"{len(tasks)} task(s) checked, {len(found)} fault(s)")
    return 1 if found else 0


def _show(name: str) -> int:
    made = next((made for made in every() if made.task.id.startswith(name)), None)
    if made is None:
        print(f"error: no task begins with {name!r}; `list` counts them", file=sys.stderr)
        return 64
    print(f"{made.task.id}  ({made.kind})\n\n{made.task.prompt}")
    for path, right in made.fix.items():
        wrong = made.task.setup.files[path]
        lines = (wrong.splitlines(True), right.splitlines(True))
        sys.stdout.writelines(difflib.unified_diff(*lines, f"a/{path}", f"b/{path}"))
    print("\nto mend  " + "\n         ".join(made.task.reward.fail_to_pass))
    return 0


def _list() -> int:
    kinds = Counter(made.kind for made in every())
    for kind, count in sorted(kinds.items()):
        print(f"{count:>4}  {kind}{'   (validation)' if kind in VALIDATION else ''}")
    print(f"{sum(kinds.values()):>4}  together")
    return 0


if __name__ == "__main__":
    sys.exit(main())
