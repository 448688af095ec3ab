"""OpenHands V0's `run_ipython`: one Python interpreter of the image's own, kept for the life of the sandbox.

What it is
    The interpreter runs `DRIVER`: one JSON line in, one out. With IPython in the image it is IPython, without
    it a plain one whose last expression is shown.

What it does not do
    No images, no browser. In an image without Python there is nothing to run.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from runtime_server.agent import AgentLost, Process
from runtime_server.dialects.inside import Inside
from runtime_server.dialects.terminal import shown

SENT_MAX = 1 << 20
WINDOW = 4 << 20
QUIET = "[Code executed successfully with no output]"
DRIVER = r"""
import ast, json, os, sys, tempfile, traceback
wire, lines = os.fdopen(os.dup(1), "w"), os.fdopen(os.dup(0))
nothing = os.open(os.devnull, os.O_RDONLY); os.dup2(nothing, 0)
space = {"__name__": "__main__", "__builtins__": __builtins__}
try:
    from IPython.core.interactiveshell import InteractiveShell
    shell = InteractiveShell.instance(colors="NoColor")
except Exception:  # an image whose IPython is broken has plain Python
    shell = None
def plain(code):
    tree = ast.parse(code, "<cell>")
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "<cell>", "exec"), space)
    if last is not None:
        value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), space)
        if value is not None:
            print(repr(value))
def cell(code):
    try:
        shell.run_cell(code) if shell else plain(code)
    except KeyboardInterrupt:
        print("KeyboardInterrupt")
    except SystemExit:
        pass
    except BaseException:  # whatever the cell raised is its output
        kind, error, trace = sys.exc_info()
        traceback.print_exception(kind, error, trace.tb_next.tb_next if trace.tb_next else None)
while True:
    try:
        line = lines.readline()
    except KeyboardInterrupt:
        continue
    if not line:
        break
    asked = json.loads(line)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 1); os.dup2(file.fileno(), 2)
        try:
            if asked.get("cwd"):
                os.chdir(asked["cwd"])
        except OSError:
            pass
        try:
            cell(asked["code"])
            sys.stdout.flush(); sys.stderr.flush()
        except KeyboardInterrupt:
            pass
        size = file.seek(0, 2); file.seek(max(0, size - asked["max"]))
        text = file.read().decode("utf-8", "replace")
    wire.write(json.dumps({"number": asked["number"], "text": text, "python": sys.executable}) + "\n")
    wire.flush()
"""


class NoPython(Exception):
    """The image has no interpreter, or it ended; the message is for the agent."""


class Interpreter:
    """The interpreter of one sandbox."""

    def __init__(self, inside: Inside) -> None:
        self.inside, self.path = inside, ""
        self._process: Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._answers: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._number = 0

    async def run(self, code: str, cwd: str, timeout_s: float) -> str:
        """What the cell printed. Raises NoPython."""
        async with self.inside.box.in_use():
            await self._started()
            self._number += 1
            asked = {"code": code, "cwd": cwd, "number": self._number, "max": SENT_MAX}
            assert self._process is not None
            await self._process.write(json.dumps(asked).encode() + b"\n")
            try:
                async with asyncio.timeout(timeout_s):
                    found = await self._answer()
            except TimeoutError:
                await self._process.signal(2)
                return f"[Execution timed out ({timeout_s} seconds).]"
        self.path = str(found.get("python", ""))
        return shown(str(found.get("text", "")).encode()).rstrip() or QUIET

    async def _answer(self) -> dict[str, Any]:
        """The one to the question just asked; late ones to earlier questions are dropped."""
        while (found := await self._answers.get()) is not None:
            if found.get("number") == self._number:
                return found
        self._process = None
        raise NoPython("The Python interpreter ended; the next cell starts a new one.")

    async def _started(self) -> None:
        if self._process is not None:
            return
        done = await self.inside.shell("command -v python3 || command -v python")
        python = done.stdout.data.decode().strip().split("\n")[0]
        if not python:
            raise NoPython("There is no Python in this image: run_ipython cannot be used.")
        process = await self.inside.box.agent.spawn(
            [python, "-u", "-c", DRIVER], cwd="/", env={}, stdin=True, timeout_s=None, max_output=WINDOW
        )
        self._process, self._answers = process, asyncio.Queue()
        self._reader = asyncio.create_task(self._read(process, self._answers))

    async def _read(self, process: Process, answers: asyncio.Queue[dict[str, Any] | None]) -> None:
        rest = b""
        try:
            async for chunk in process.chunks():
                *lines, rest = (rest + chunk.data).split(b"\n")
                for line in lines:
                    _put(answers, line)
        except AgentLost:  # whoever asks next is told
            pass
        finally:
            answers.put_nowait(None)


def _put(answers: asyncio.Queue[dict[str, Any] | None], line: bytes) -> None:
    try:
        found = json.loads(line)
    except ValueError:  # something in the interpreter wrote to our wire
        return
    if isinstance(found, dict):
        answers.put_nowait(found)
