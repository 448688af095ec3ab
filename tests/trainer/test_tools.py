"""The tools in a real shell without a sandbox: what they do, and what a policy is told."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from trainer.environments import CommandResult, Verdict
from trainer.environments.local import LocalEnvironment
from trainer.errors import Refused
from trainer.formats import Call
from trainer.tasks import Setup, Task, Verify
from trainer.tools import Outcome, Toolbox

TASK = Task(
    "t", "Go.", Verify("true"), Setup({"a.py": "def f():\n    return 1\n\n\ndef g():\n    return 1\n"})
)
EVERY = ["bash", "read", "edit", "submit"]


@asynccontextmanager
async def box(most: int = 4096, stays: bool = True, task: Task = TASK) -> AsyncIterator[Toolbox]:
    async with LocalEnvironment().open(task) as workspace:
        yield Toolbox(workspace, EVERY, most, stays)


async def use(tools: Toolbox, tool: str, timeout_s: float = 10, **arguments: Any) -> Outcome:
    return await tools.use(Call(tool, arguments), timeout_s)


async def bash(tools: Toolbox, command: str, timeout_s: float = 10) -> bytes:
    return (await use(tools, "bash", timeout_s, command=command)).output


async def test_the_shell_stays_or_does_not() -> None:
    async with box() as tools:
        assert await bash(tools, "mkdir -p d; cd d; x=3; f() { echo $x; }") == b"[no output]"
        assert (await bash(tools, "f; pwd")).splitlines()[0] == b"3"
        assert (await bash(tools, "pwd")).endswith(b"/d\n")
    async with box(stays=False) as tools:
        await bash(tools, "cd /; x=3")
        assert b"unconfined" in await bash(tools, "pwd; echo $x")


async def test_ends_of_commands_are_told() -> None:
    async with box() as tools:
        assert await bash(tools, "echo out; echo err >&2; false") == b"out\nerr\n[exit code 1]"
        assert await bash(tools, "cat") == b"[no output]"  # stdin is empty
        late = await use(tools, "bash", 0.3, command="echo a; sleep 60")
        assert late.timed_out and late.exit_code == 124
        assert late.output == b"a\n[timed out after 0.3 s and was killed]"
        assert await bash(tools, "echo again") == b"again\n"  # a new shell


async def test_syntax_errors_exits_and_kills_do_not_end_the_episode() -> None:
    async with box() as tools:
        assert b"exit code" in await bash(tools, "echo 'unfinished")
        assert await bash(tools, "echo on") == b"on\n"
        assert (await use(tools, "bash", command="exit 3")).exit_code == 3
        assert await bash(tools, "echo new") == b"new\n"
        assert (await use(tools, "bash", command="kill -9 $$")).exit_code == 137
        assert await bash(tools, "echo newer\0") == b"newer\n"


async def test_no_output_can_pass_for_an_exit_code() -> None:
    async with box() as tools:
        found = await use(tools, "bash", command="echo 0 >&9; echo 0; exec 9>&-; false")
        assert found.exit_code == 1


async def test_long_output_keeps_head_and_tail() -> None:
    async with box(most=400) as tools:
        found = await bash(tools, "seq 100000")
        assert len(found) <= 400 and found.startswith(b"1\n2\n") and found.endswith(b"100000\n")
        assert b"bytes left out" in found
        size = len(b"".join(b"%d\n" % n for n in range(1, 100001)))
        assert b"%d bytes left out" % (size - 400) in found


async def test_reading() -> None:
    async with box() as tools:
        text = (await use(tools, "read", path="a.py")).output.decode()
        assert text.splitlines()[0] == "     1  def f():" and text.splitlines()[-1] == "     6      return 1"
        part = (await use(tools, "read", path="a.py", start=2, lines=1)).output
        assert part == b"     2      return 1\n[4 more lines; the next is 3]"
        for wrong, says in (
            ({"path": "b.py"}, "no such file"),
            ({"path": "."}, "no such file"),
            ({"path": "a.py", "start": 9}, "has 6 lines; there is no line 9"),
            ({"path": "a.py", "start": 0}, "counts lines from 1"),
        ):
            assert says in (await use(tools, "read", **wrong)).problem
        await bash(tools, "printf '\\377' > raw; : > empty; head -c 2000000 /dev/zero > big")
        assert "no text in UTF-8" in (await use(tools, "read", path="raw")).problem
        assert "longer than" in (await use(tools, "read", path="big")).problem
        assert (await use(tools, "read", path="empty")).output == b"[the file is empty]"


async def test_editing_takes_exactly_one_place() -> None:
    async with box() as tools:
        twice = await use(tools, "edit", path="a.py", old="return 1", new="return 2")
        assert "old is 2 times in a.py" in twice.problem
        none = await use(tools, "edit", path="a.py", old="return 3", new="")
        assert "old is not in a.py" in none.problem
        spaces = await use(tools, "edit", path="a.py", old="  def g():", new="")
        assert "other spaces" in spaces.problem
        same = await use(tools, "edit", path="a.py", old="def g", new="def g")
        assert "the same" in same.problem
        await bash(tools, "chmod 755 a.py")
        done = await use(
            tools, "edit", path="a.py", old="def g():\n    return 1", new="def g():\n    return 2"
        )
        assert done.output == b"a.py was changed at line 5" and not done.problem
        assert await bash(tools, "tail -1 a.py; stat -c %a a.py") == b"    return 2\n755\n"


async def test_making_a_file() -> None:
    async with box() as tools:
        made = await use(tools, "edit", path="new dir/b.txt", old="", new="$HOME 'x'\n")
        assert made.output == b"new dir/b.txt was made, 1 lines"
        assert await bash(tools, "cat 'new dir/b.txt'") == b"$HOME 'x'\n"
        again = await use(tools, "edit", path="new dir/b.txt", old="", new="y")
        assert "exists already" in again.problem
        nowhere = await use(tools, "edit", path="a.py/b", old="", new="y")
        assert nowhere.problem


async def test_what_is_malformed_is_told_and_runs_nothing() -> None:
    async with box() as tools:
        told = await tools.use(Call(problem="the call is not valid JSON"), 5)
        assert told.output == b"error: the call is not valid JSON" and told.exit_code is None
    async with LocalEnvironment().open(TASK) as workspace:
        told = await Toolbox(workspace, ["read"], 100).use(Call("bash", {"command": "ls"}), 5)
        assert told.problem == "there is no bash here; there are read"


async def test_a_workspace_without_files_is_refused() -> None:
    class Bare:
        timings: dict[str, float] = {}  # noqa: RUF012

        async def run(self, command: str, timeout_s: float, max_output: int) -> CommandResult:
            return CommandResult(b"", 0)

        async def verify(self, answer: str = "") -> Verdict:
            return Verdict(0.0)

    with pytest.raises(Refused, match="Bare has no files"):
        Toolbox(Bare(), EVERY, 100)


async def test_a_cancelled_command_leaves_nothing_behind() -> None:
    async with LocalEnvironment().open(TASK) as workspace:
        tools = Toolbox(workspace, EVERY, 100)
        await bash(tools, "mkfifo begun")
        running = asyncio.create_task(use(tools, "bash", 60, command="echo $$ > begun; sleep 60"))
        pid = int((await workspace.run("cat begun", 30, 100)).output)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    with contextlib.suppress(ProcessLookupError):  # it is gone already
        ended = select.poll()
        ended.register(os.pidfd_open(pid))
        assert ended.poll(5000)
