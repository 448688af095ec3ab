"""Tasks: what the policy is asked, what its sandbox holds, and how its work is judged.

What it is
    A task file is a parquet with two columns: `prompt` (a string, or a list of {role, content}
    messages; what the policy sees first) and `instance` (struct: instance_id, image, workdir,
    setup {files, commands}, verify {files, command, timeout_s}). Other columns are left alone.
    Built-in families (`builtin:lucky-seven`) are written to such a file and read back from it, so there
    is one path.

How to use it
    tasks = load_tasks("data/train.parquet", run_directory_work)
    python -m trainer.tasks write lucky-seven OUT.parquet
    python -m trainer.tasks show FILE

What it does not do
    It runs nothing and shows the policy nothing but the prompt: files and command of `verify` reach
    the sandbox only after the policy's last turn.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trainer.data import Row, read_rows, write_rows
from trainer.errors import TaskError, TrainerError

BUILTIN = "builtin:"


@dataclass(frozen=True)
class Setup:
    """What is in the sandbox before the first turn: files by path, then commands in order.

    Relative paths are under the working directory. A command that fails loses the sandbox.
    """

    files: dict[str, str] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Verify:
    """The hidden test: files brought in after the last turn, and a command whose exit code 0 earns 1."""

    command: str
    files: dict[str, str] = field(default_factory=dict)
    timeout_s: float = 60.0


@dataclass(frozen=True)
class Task:
    """One task. `image` "" means the server's default image, `workdir` "" the image's own directory."""

    id: str
    prompt: str
    verify: Verify
    setup: Setup = field(default_factory=Setup)
    image: str = ""
    workdir: str = ""

    def row(self) -> Row:
        """As one row of a task file; what is empty is left out."""
        instance = {
            "instance_id": self.id,
            "image": self.image,
            "workdir": self.workdir,
            "setup": _full({"files": _entries(self.setup.files), "commands": list(self.setup.commands)}),
            "verify": _full(asdict(self.verify) | {"files": _entries(self.verify.files)}),
        }
        return {"prompt": self.prompt, "instance": _full(instance)}

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Task:
        """A row of a task file. Raises KeyError, TypeError or ValueError when it does not fit."""
        instance = row["instance"]
        setup, verify = instance.get("setup", {}), instance["verify"]
        if not verify["command"]:
            raise ValueError("instance.verify.command is empty")
        test = Verify(verify["command"], _files(verify), float(verify.get("timeout_s", Verify.timeout_s)))
        return cls(
            id=str(instance["instance_id"]),
            prompt=_text(row["prompt"]),
            verify=test,
            setup=Setup(_files(setup), list(setup.get("commands", []))),
            image=instance.get("image", ""),
            workdir=instance.get("workdir", ""),
        )


# --- the built-in family -----------------------------------------------------------------------------

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


FAMILIES: dict[str, Callable[[], list[Task]]] = {"lucky-seven": lucky_seven}


# --- files -------------------------------------------------------------------------------------------


def load_tasks(source: str, work: Path) -> list[Task]:
    """The tasks of a parquet file, or of `builtin:NAME` (written into the directory `work` first).

    Raises TaskError with the file, the row and what is allowed.
    """
    if not source.startswith(BUILTIN):
        return read_tasks(Path(source))
    name = source.removeprefix(BUILTIN)
    path = work / f"{name}.parquet"
    write_tasks(path, family(name))
    return read_tasks(path)


def family(name: str) -> list[Task]:
    """The tasks of a built-in family. Raises TaskError when there is none of that name."""
    if name not in FAMILIES:
        raise TaskError(f"no built-in task family {name!r}; there is {', '.join(sorted(FAMILIES))}")
    return FAMILIES[name]()


def read_tasks(path: Path) -> list[Task]:
    """Every row of a task file. Raises TaskError."""
    return [_task(path, number, row) for number, row in enumerate(read_rows(path))]


def write_tasks(path: Path, tasks: Iterable[Task]) -> None:
    """Write a task file; it replaces an older one at once."""
    beside = path.with_name(path.name + ".new")
    write_rows(beside, [task.row() for task in tasks])
    beside.replace(path)


def _task(path: Path, number: int, row: Mapping[str, Any]) -> Task:
    try:
        return Task.of(row)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise TaskError(
            f"{path}, row {number}: {type(error).__name__} {error}; a row needs `prompt` and `instance` "
            "{instance_id, verify {command}}, and may have image, workdir, setup {files, commands}, "
            "verify {files, timeout_s}"
        ) from error


def _text(prompt: Any) -> str:
    """A prompt as text; of a list of messages, their contents in order."""
    return prompt if isinstance(prompt, str) else "\n".join(str(message["content"]) for message in prompt)


def _full(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is empty: parquet cannot tell the type of an empty list."""
    return {key: value for key, value in values.items() if value not in ("", [], {})}


def _entries(files: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"path": path, "content": content} for path, content in files.items()]


def _files(part: Mapping[str, Any]) -> dict[str, str]:
    return {entry["path"]: entry["content"] for entry in part.get("files", [])}


# --- the command line --------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """`python -m trainer.tasks`: write a built-in family, or show a task file."""
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
        print(f"  verify  {task.verify.command}   (exit 0 within {task.verify.timeout_s:g} s earns 1)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
