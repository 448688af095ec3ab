"""Tools: what an agent's calls do in its workspace, and what the policy is told of it.

What it is
    A `Toolbox` serves one episode: `bash` (one shell that stays, or one for each command), `read`, `edit`.
    Whatever a policy asks for, it gets an answer in words; only a workspace that is lost or broken raises.

How to use it
    box = Toolbox(workspace, ["bash", "read"], most=8192); outcome = await box.use(call, timeout_s=60)

What it does not do
    It reads no samples (`trainer.formats.calls`), judges nothing, and knows no tokens. `submit` is no work:
    the agent ends the episode.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.environments import CommandResult, Equipped, Workspace
from trainer.errors import NoFile, Refused
from trainer.formats import Call, bounded

FILE_BYTES = 1 << 20
"""Longest file that is read or edited."""
LINES = 400
"""Lines that `read` shows when it is not told how many."""
KEPT = 4
"""Commands keep so many times of what is shown, so that what is cut out is cut out once, in the middle."""


@dataclass(frozen=True)
class Outcome:
    """What the policy is told, and what the log says beside it."""

    output: bytes
    exit_code: int | None = None
    timed_out: bool = False
    problem: str = ""
    seconds: float = 0.0


class Toolbox:
    """The tools of one episode. `most` bounds what is shown of one call, in bytes."""

    def __init__(self, workspace: Workspace, names: Sequence[str], most: int, stays: bool = True) -> None:
        """`stays`: bash keeps its directory and variables. Raises Refused for a workspace without files."""
        if not isinstance(workspace, Equipped):
            raise Refused(
                f"{type(workspace).__name__} has no files and no shell that stays, which tools need"
            )
        self._workspace: Equipped = workspace
        self._names, self._most, self._stays = list(names), most, stays

    async def use(self, call: Call, timeout_s: float) -> Outcome:
        """Do what is asked, within `timeout_s` seconds where it is a command. Raises Lost, Broken."""
        start = time.perf_counter()
        found = await self._used(call, timeout_s)
        return Outcome(
            found.output, found.exit_code, found.timed_out, found.problem, time.perf_counter() - start
        )

    async def _used(self, call: Call, timeout_s: float) -> Outcome:
        if call.problem or call.tool not in self._names:
            return _wrong(call.problem or f"there is no {call.tool} here; there are {', '.join(self._names)}")
        if call.tool == "bash":
            return await self._bash(str(call.arguments["command"]), timeout_s)
        try:
            if call.tool == "read":
                return await self._read(**call.arguments)
            return await self._edit(**call.arguments)
        except NoFile as error:
            return _wrong(str(error))

    # --- bash ---

    async def _bash(self, command: str, timeout_s: float) -> Outcome:
        command = command.replace("\0", "")  # no command line can carry them
        run = self._workspace.say if self._stays else self._workspace.run
        result = await run(command, timeout_s, max(KEPT * self._most, 1024))
        return Outcome(said(result, self._most, timeout_s), result.exit_code, result.timed_out)

    # --- files ---

    async def _read(self, path: str, start: int = 1, lines: int = LINES) -> Outcome:
        if start < 1 or lines < 1:
            return _wrong(f"read counts lines from 1; start is {start}, lines is {lines}")
        every = (await self._text(path)).splitlines()
        if start > max(len(every), 1):
            return _wrong(f"{path} has {len(every)} lines; there is no line {start}")
        shown = [f"{number:>6}  {line}" for number, line in enumerate(every, 1)][
            start - 1 : start - 1 + lines
        ]
        left = len(every) - (start - 1 + len(shown))
        more = [f"[{left} more lines; the next is {start + len(shown)}]"] if left > 0 else []
        text = "\n".join([*shown, *more]) or "[the file is empty]"
        return Outcome(bounded(text.encode(), self._most))

    async def _edit(self, path: str, old: str, new: str) -> Outcome:
        if not old:
            return await self._make(path, new)
        text = await self._text(path)
        if (count := text.count(old)) != 1:
            return _wrong(f"nothing was changed: {_places(path, text, old, count)}")
        if old == new:
            return _wrong("nothing was changed: old and new are the same")
        await self._workspace.write(path, text.replace(old, new).encode())
        line = text[: text.index(old)].count("\n") + 1
        return Outcome(f"{path} was changed at line {line}".encode())

    async def _make(self, path: str, text: str) -> Outcome:
        try:
            await self._workspace.read(path, FILE_BYTES)
        except NoFile:
            await self._workspace.write(path, text.encode())
            return Outcome(f"{path} was made, {len(text.splitlines())} lines".encode())
        return _wrong(f"nothing was changed: {path} exists already; say in old what of it is to be replaced")

    async def _text(self, path: str) -> str:
        data = await self._workspace.read(path, FILE_BYTES)
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise NoFile(f"{path} is no text in UTF-8; look at it with a command") from None


def said(result: CommandResult, most: int, timeout_s: float) -> bytes:
    """A command's output in words: bounded, with what must be known of how it ended."""
    output = bounded(result.output, most, result.left_out)
    if result.timed_out:
        end = b"[timed out after %g s and was killed]" % timeout_s
    elif result.exit_code:
        end = b"[exit code %d]" % result.exit_code
    else:
        return output or b"[no output]"
    return output + (b"" if output.endswith(b"\n") or not output else b"\n") + end


def _places(path: str, text: str, old: str, count: int) -> str:
    """Why a piece of text is not there exactly once."""
    if count > 1:
        return f"old is {count} times in {path}; say more of what is around the one that you mean"
    if old.strip() and old.strip() in text:
        return f"old is in {path} only with other spaces or line ends around it; they must be the same"
    return f"old is not in {path}; it must be there exactly, to the last space"


def _wrong(problem: str) -> Outcome:
    return Outcome(f"error: {problem}".encode(), problem=problem)
