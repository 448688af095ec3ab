"""Small Python repositories with a real bug each, and pytest suites: software tasks without downloads.

What it is
    Each program of `trainer.families.programs` is written down once, right, with its tests. A `Bug` breaks
    it in one place, in one of several ways that programmers do; a task is a program with one bug, filled with
    names and numbers drawn from a seed, in a repository with a README, visible tests that pass, and a history
    of git. The hidden suite has tests that fail because of the bug (FAIL_TO_PASS) and tests that pass with
    and without it (PASS_TO_PASS).

How to use it
    tasks = training()            builtin:repositories
    tasks = validation()          builtin:repositories-validation: kinds of bugs that training never shows

What it does not do
    It runs nothing. `python -m trainer.families check` does: that each task's tests fail before the fix and
    pass after it. Nothing here depends on the machine: the same seed gives the same tasks.
"""

from __future__ import annotations

import random
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

from trainer.families.programs import PROGRAMS
from trainer.families.shape import Bug, Program
from trainer.tasks import Budget, Reward, Setup, Task

WORKDIR = "/repo"
VARIANTS = 6
VALIDATION = ("swallowed exception", "state leak", "wrong comparison")
"""Kinds of bugs that are never trained on."""
COMMIT = (
    "git init -q && git add -A && "
    "git -c user.name=repo -c user.email=repo@localhost commit -q --no-gpg-sign -m 'Import'"
)
PROMPT = """\
You are in {workdir}, the repository of {title}. Users report this:

> {report}

Find the mistake in the package `{package}` and mend it. Do not change what works: the tests in tests/ pass
already and must go on passing. `python3 -m pytest -q` runs them. Hidden tests decide whether it is mended.
"""
_FIRST = re.compile(r"^(def|class) ", re.MULTILINE)


@dataclass(frozen=True)
class Mended:
    """A task and its reference fix: the files of the right program."""

    task: Task
    fix: dict[str, str]
    kind: str


def training() -> list[Task]:
    """All tasks of the kinds of bugs that are trained on."""
    return [made.task for made in every() if made.kind not in VALIDATION]


def validation() -> list[Task]:
    """All tasks of the kinds that are held out."""
    return [made.task for made in every() if made.kind in VALIDATION]


def every(seed: int = 0) -> Iterator[Mended]:
    """Every program with every bug of it, in several variants."""
    for program in PROGRAMS:
        for bug in program.bugs:
            for variant in range(VARIANTS):
                yield make(program, bug, variant, seed)


def make(program: Program, bug: Bug, variant: int, seed: int = 0) -> Mended:
    """One task. Raises ValueError when the bug is nowhere in its program."""
    name = f"{program.name}-{bug.name}-{variant}".replace(" ", "-")
    names = program.names(random.Random(f"{seed}/{program.name}/{variant}"))  # noqa: S311 - words, no secret
    right = _filled(program.source, names)
    wrong = _broken(right, _filled(bug.right, names), _filled(bug.wrong, names), name)
    wrong = _FIRST.sub(lambda first: f"{bug.above}\n\n\n{first[0]}", wrong, count=1) if bug.above else wrong
    package, title = names["package"], _filled(program.title, names).strip()
    module, hidden = f"{package}/{names['module']}.py", f"tests/test_{names['module']}_hidden.py"
    tests = _filled(program.hidden, names)
    failing = tuple(f"{hidden}::{test}" for test in bug.fails)
    passing = tuple(f"{hidden}::{test}" for test in _tests(tests) if test not in bug.fails)
    files = {
        "README.md": f"# {package}\n\n{_filled(program.about, names)}\n",
        f"{package}/__init__.py": f'"""{title.capitalize()}."""\n',
        module: wrong,
        f"tests/test_{names['module']}.py": _filled(program.visible, names),
        ".gitignore": "__pycache__/\n",
    }
    prompt = PROMPT.format(
        workdir=WORKDIR, title=title, report=_filled(bug.report, names).strip(), package=package
    )
    reward = Reward(kind="tests", files={hidden: tests}, fail_to_pass=failing, pass_to_pass=passing)
    task = Task(
        name,
        prompt,
        reward,
        Setup(files, [COMMIT]),
        workdir=WORKDIR,
        budget=Budget(),
        source=f"repositories/{bug.kind}",
    )
    return Mended(task, {module: right}, bug.kind)


def _filled(text: str, names: dict[str, str]) -> str:
    """A template with its names in: @name@, for braces are Python's own."""
    text = textwrap.dedent(text).lstrip("\n")
    for name, value in names.items():
        text = text.replace(f"@{name}@", value)
    return text


def _broken(source: str, right: str, wrong: str, name: str) -> str:
    """The source with its right lines made wrong, wherever they are indented. Raises ValueError."""
    right, wrong = right.strip("\n"), wrong.strip("\n")
    for depth in range(0, 24, 4):
        text = textwrap.indent(right, " " * depth)
        if f"\n{text}\n" in f"\n{source}":
            broken = textwrap.indent(wrong, " " * depth)
            return f"\n{source}".replace(f"\n{text}\n", f"\n{broken}\n", 1)[1:]
    raise ValueError(f"{name}: its bug is nowhere in the program")


def _tests(source: str) -> list[str]:
    """The names of the test functions, in order."""
    lines = (line for line in source.splitlines() if line.startswith("def test_"))
    return [line.removeprefix("def ").partition("(")[0] for line in lines]
