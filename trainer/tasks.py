"""Tasks: what the policy is asked, what its sandbox holds, and how its work is judged.

What it is
    `Task` is the one form that rollouts know. A task file is a parquet; its rows may be in our own
    columns (`prompt`, and `instance` with instance_id, image, workdir, setup, reward …), or in those of
    R2E-Gym, SWE-bench, SkyRL and verl (`trainer.columns` reads them all). Built-in families
    (`builtin:lucky-seven`) are written to such a file and read back from it, so there is one path.

How to use it
    tasks = load_tasks("data/train.parquet", run_directory_work)
    python -m trainer.tasks write lucky-seven OUT.parquet
    python -m trainer.tasks show FILE

What it does not do
    It runs nothing and shows the policy nothing but the prompt: what a reward needs reaches the sandbox
    only after the policy's last turn (`trainer.rewards`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from trainer.data import Row, read_rows, write_rows
from trainer.errors import TaskError, TrainerError

BUILTIN = "builtin:"
Kind = Literal["command", "tests", "expected", "python"]
KINDS: tuple[str, ...] = get_args(Kind)


@dataclass(frozen=True)
class Setup:
    """What is in the sandbox before the first turn: files by path, then commands in order.

    Relative paths are under the working directory. A command that fails loses the sandbox.
    """

    files: dict[str, str] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    """Paths of the image that are removed before the policy looks; a fresh sandbox of a judge has them."""


@dataclass(frozen=True)
class Reward:
    """How the work is judged once the policy is done (`trainer.rewards`).

    command     `command` runs beside `files`, and its exit code 0 earns 1
    tests       pytest runs `files`; every test of `fail_to_pass` and `pass_to_pass` must pass
    expected    pytest runs `files`, or what the image brings; the statuses must be exactly `expected`
    python      a function of ours judges the answer, files that are `read` and the output of `command`
    With tests and expected, `command` gets the fresh sandbox ready for pytest.
    """

    command: str = ""
    files: dict[str, str] = field(default_factory=dict)
    timeout_s: float = 60.0
    kind: Kind = "command"
    fail_to_pass: tuple[str, ...] = ()
    pass_to_pass: tuple[str, ...] = ()
    expected: dict[str, str] = field(default_factory=dict)
    """Status (PASSED, FAILED, ERROR …) by test name without its file, as R2E-Gym writes it."""
    patch: str = ""
    """A diff that brings hidden tests into the repository, for data sets that keep them so."""
    base: str = ""
    """The commit that the work starts from: it is then moved as a diff of git, not as files."""
    interpreter: str = "/usr/bin/python3"
    """Runs pytest; relative to the working directory, or absolute. Never looked for on a PATH."""
    arguments: tuple[str, ...] = ()
    """What pytest is told to run; empty means the files of the tests that are named."""
    function: str = ""
    """`module:function`; empty means the configuration's."""
    read: tuple[str, ...] = ()
    """Files of the sandbox that the function gets."""
    ground_truth: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
    """What else the function gets; what JSON can say."""
    fresh: bool = True
    """Tests run in a second sandbox that the policy never touched; False saves it, and trusts the first."""
    partial: bool = False
    """Earn the share of `fail_to_pass` that passes, if all of `pass_to_pass` does; not all or nothing."""


Verify = Reward
"""The older name; `Verify(command, files, timeout_s)` is a hidden command."""


@dataclass(frozen=True)
class Budget:
    """What one episode of this task may take; None means the configuration's."""

    turns: int | None = None
    tokens: int | None = None
    seconds: float | None = None


Message = dict[str, str]


@dataclass(frozen=True)
class Task:
    """One task. `image` "" means the server's default image, `workdir` "" the image's own directory.

    `messages` is the prompt as a dialogue where the file has one; `prompt` is then their text.
    """

    id: str
    prompt: str
    reward: Reward
    setup: Setup = field(default_factory=Setup)
    image: str = ""
    workdir: str = ""
    messages: tuple[Message, ...] = ()
    tools: tuple[str, ...] = ()
    """Names of the tools that the policy gets; empty means the configuration's."""
    budget: Budget = field(default_factory=Budget)
    source: str = ""
    """Where it comes from (a data set, a family of bugs), for statistics."""

    @property
    def verify(self) -> Reward:
        """The older name of `reward`."""
        return self.reward

    def row(self) -> Row:
        """As one row of a task file in our own columns; what is empty is left out."""
        instance = {
            "instance_id": self.id,
            "image": self.image,
            "workdir": self.workdir,
            "setup": _full(asdict(self.setup) | {"files": _entries(self.setup.files)}),
            "reward": _reward_row(self.reward),
            "tools": list(self.tools),
            "budget": {key: value for key, value in asdict(self.budget).items() if value is not None},
        }
        prompt = list(self.messages) or self.prompt
        return {"prompt": prompt, "data_source": self.source, "instance": _full(instance)}


# --- rows --------------------------------------------------------------------------------------------

_JSON = ("expected", "extra")
"""Mappings whose keys differ from row to row: as text, for every row of a parquet has the same fields."""


def reward_of(given: Mapping[str, Any]) -> Reward:
    """A reward as our own columns say it. Raises KeyError, TypeError or ValueError when it does not fit."""
    values = dict(given)
    unknown = set(values) - {field.name for field in fields(Reward)}
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))}: no such field of a reward")
    for name in _JSON:
        if isinstance(values.get(name), str):
            values[name] = json.loads(values[name])
    for name in ("fail_to_pass", "pass_to_pass", "read", "arguments"):
        values[name] = tuple(values.get(name, ()))
    return checked(Reward(**values | {"files": _files(given)}))


def checked(reward: Reward) -> Reward:
    """The same, if its kind has what it needs. Raises ValueError."""
    if reward.kind not in KINDS:
        raise ValueError(f"reward.kind is {reward.kind!r}; it may be {', '.join(KINDS)}")
    if reward.kind == "command" and not reward.command:
        raise ValueError("reward.command is empty: the hidden test needs one")
    if reward.kind == "tests" and not reward.fail_to_pass:
        raise ValueError("reward.fail_to_pass is empty: without it, doing nothing would earn 1")
    if reward.kind == "expected" and not reward.expected:
        raise ValueError("reward.expected is empty: name the tests and their statuses")
    if not 0 < reward.timeout_s < float("inf"):
        raise ValueError(f"reward.timeout_s is {reward.timeout_s}; it must be a positive number of seconds")
    return reward


def task_of(row: Mapping[str, Any], reward: Reward) -> Task:
    """A row in our own columns, with its reward. Raises KeyError, TypeError or ValueError."""
    instance = row["instance"]
    setup, messages = instance.get("setup", {}), row["prompt"]
    return Task(
        id=str(instance["instance_id"]),
        prompt=text_of(messages),
        reward=reward,
        setup=Setup(_files(setup), list(setup.get("commands", [])), list(setup.get("hidden", []))),
        image=instance.get("image", ""),
        workdir=instance.get("workdir", ""),
        messages=messages_of(messages),
        tools=tuple(instance.get("tools", ())),
        budget=Budget(**instance.get("budget", {})),
        source=str(row.get("data_source", "")),
    )


def text_of(prompt: Any) -> str:
    """A prompt as text; of a list of messages, their contents in order."""
    return prompt if isinstance(prompt, str) else "\n".join(str(message["content"]) for message in prompt)


def messages_of(prompt: Any) -> tuple[Message, ...]:
    """The messages of a prompt; none, if it is text."""
    if isinstance(prompt, str):
        return ()
    return tuple({"role": str(m["role"]), "content": str(m["content"])} for m in prompt)


def _reward_row(reward: Reward) -> Row:
    plain = asdict(Reward())
    given = {name: value for name, value in asdict(reward).items() if value != plain[name]}
    given |= {name: json.dumps(given[name]) for name in _JSON if name in given}
    given |= {name: list(value) for name, value in given.items() if isinstance(value, tuple)}
    return given | {"kind": reward.kind} | _full({"files": _entries(reward.files)})


def _full(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is empty: parquet cannot tell the type of an empty list."""
    return {key: value for key, value in values.items() if value not in ("", [], {}, ())}


def _entries(files: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"path": path, "content": content} for path, content in files.items()]


def _files(part: Mapping[str, Any]) -> dict[str, str]:
    return {entry["path"]: entry["content"] for entry in part.get("files", [])}


# --- the smallest family -----------------------------------------------------------------------------

HINT = "It is seven.\n"
NOTES = "Write one digit.\n"
ROWS = 64


def lucky_seven() -> list[Task]:
    """The smallest task that has to be learned by acting: write the digit 7 into answer.txt.

    Nothing in the prompt says so; only the hidden test tells. The rows differ by their id only.
    """
    setup = Setup({"hint.txt": HINT, "notes.txt": NOTES})
    verify = Verify('test "$(cat answer.txt)" = 7', timeout_s=20.0)
    folder = "/tmp/task"  # noqa: S108 - in the sandbox, which is the task's own
    return [Task(f"lucky-seven-{row:02d}", "$ ", verify, setup, workdir=folder) for row in range(ROWS)]


# --- files -------------------------------------------------------------------------------------------


def load_tasks(source: str, work: Path, functions: Sequence[str] = ()) -> list[Task]:
    """The tasks of a parquet file, or of `builtin:NAME` (written into the directory `work` first).

    `functions` are the Python functions that rows may be judged by (`data.reward_functions`). Raises
    TaskError with the file, the row and what is allowed.
    """
    if not source.startswith(BUILTIN):
        return read_tasks(Path(source), functions)
    name = source.removeprefix(BUILTIN)
    path = work / f"{name.replace('/', '-')}.parquet"
    write_tasks(path, family(name))
    return read_tasks(path)


def family(name: str) -> list[Task]:
    """The tasks of a built-in family. Raises TaskError when there is none of that name."""
    from trainer.families import FAMILIES

    if name not in FAMILIES:
        raise TaskError(f"no built-in task family {name!r}; there is {', '.join(sorted(FAMILIES))}")
    return FAMILIES[name]()


def read_tasks(path: Path, functions: Sequence[str] = ()) -> list[Task]:
    """Every row of a task file, in whatever columns. Raises TaskError."""
    from trainer.columns import read

    return [read(row, f"{path}, row {number}", functions) for number, row in enumerate(read_rows(path))]


def write_tasks(path: Path, tasks: Iterable[Task]) -> None:
    """Write a task file; it replaces an older one at once."""
    beside = path.with_name(path.name + ".new")
    write_rows(beside, [task.row() for task in tasks])
    beside.replace(path)


# --- the command line --------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """`python -m trainer.tasks`: write a built-in family, or show a task file."""
    from trainer.families import FAMILIES

    parser = argparse.ArgumentParser(prog="python -m trainer.tasks", description="Write or show a task file.")
    commands = parser.add_subparsers(dest="command", required=True)
    write = commands.add_parser("write", help="write a built-in task family as parquet")
    write.add_argument("family", help=", ".join(sorted(FAMILIES)))
    write.add_argument("file", type=Path)
    show = commands.add_parser("show", help="print the tasks of a file")
    show.add_argument("file", type=Path)
    given = parser.parse_args(arguments)
    try:
        return _write(given.family, given.file) if given.command == "write" else _show(given.file)
    except TrainerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 64


def _write(name: str, path: Path) -> int:
    tasks = family(name)
    write_tasks(path, tasks)
    print(f"wrote {len(tasks)} task(s) to {path}")
    return 0


def _show(path: Path) -> int:
    for task in read_tasks(path):
        print(f"{task.id}\n  prompt  {task.prompt!r}\n  image   {task.image or '(the default)'}")
        for name, content in task.setup.files.items():
            print(f"  file    {name}: {content!r}")
        for command in task.setup.commands:
            print(f"  setup   {command}")
        print(f"  reward  {said(task.reward)}   (within {task.reward.timeout_s:g} s)")
    return 0


def said(reward: Reward) -> str:
    """A reward in one line."""
    if reward.kind == "command":
        return f"exit code 0 of  {reward.command}"
    if reward.kind == "tests":
        return f"pytest: {len(reward.fail_to_pass)} test(s) to mend, {len(reward.pass_to_pass)} to keep"
    if reward.kind == "expected":
        return f"pytest: {len(reward.expected)} status(es) as expected"
    return f"Python: {reward.function}"


if __name__ == "__main__":
    sys.exit(main())
