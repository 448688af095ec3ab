"""The editor of OpenHands V0's agents (`oh_aci`): view, create, str_replace, insert, undo_edit.

What it is
    The pure part works on text (`replaced`, `inserted`, `numbered`), the class reads and writes files of
    a sandbox. A failure is an answer whose text starts with `ERROR:`.

What it does not do
    No linting, no conversion of office documents. Texts are those that agents are trained on.
"""

from __future__ import annotations

import difflib
import posixpath
import re
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from runtime_server.dialects.inside import Inside
from runtime_server.dialects.v0_files import Failed, is_binary, lines_of, refused
from runtime_server.errors import SandboxError

CONTEXT = 4
SHOWN_MAX = 16000
FILE_MAX = 10 << 20
HISTORY = 10
_CUT_FILE = (
    "<response clipped><NOTE>Due to the max output limit, only part of this file has been shown to you. "
    "You should retry this tool after you have searched inside the file with `grep -n` in order to find the "
    "line numbers of what you are looking for.</NOTE>"
)
_CUT_FOLDER = (
    "<response clipped><NOTE>Due to the max output limit, only part of this directory has been shown to you. "
    "You should use `ls -la` instead to view large directories incrementally.</NOTE>"
)
_OFFICE = (".docx", ".xlsx", ".pptx", ".pdf", ".mp3", ".wav", ".m4a", ".flac")
_REVIEW = "Review the changes and make sure they are as expected"
_COMMANDS = ("view", "create", "str_replace", "insert", "undo_edit")
_LISTED = (
    'find -L "$1" -maxdepth 2 -not \\( -path "$1/\\.*" -o -path "$1/*/\\.*" \\) | sort | '
    'while IFS= read -r p; do if [ -d "$p" ]; then echo "$p/"; else echo "$p"; fi; done'
)
_HIDDEN = "find -L \"$1\" -mindepth 1 -maxdepth 1 -name '.*' | wc -l"


class Edit(BaseModel):
    """`args` of an `edit` action, or of a `read` with `oh_aci`."""

    path: str
    command: str = "view"
    file_text: str | None = None
    old_str: str | None = None
    new_str: str | None = None
    insert_line: int | str | None = None
    view_range: Any = None


@dataclass(frozen=True)
class Edited:
    """What is said, and the file before and after."""

    output: str
    old: str = ""
    new: str = ""


def _invalid(name: str, value: object, hint: str) -> Failed:
    return Failed(f"Invalid `{name}` parameter: {value}. {hint}")


def _missing(command: str, name: str) -> Failed:
    return Failed(f"Parameter `{name}` is required for command: {command}.")


# --- text ---------------------------------------------------------------------------------------------


def numbered(text: str, what: str, first: int = 1) -> str:
    cut = text if len(text) <= SHOWN_MAX else text[:SHOWN_MAX] + _CUT_FILE
    lines = "\n".join(f"{number:6}\t{line}" for number, line in enumerate(cut.split("\n"), first))
    return f"Here's the result of running `cat -n` on {what}:\n{lines}\n"


def _range(text: str, first: int, last: int) -> str:
    return "".join(lines_of(text)[max(first - 1, 0) : max(last, 0)])


def replaced(path: str, text: str, old: str, new: str) -> Edited:
    """Raises Failed unless `old` is there exactly once; then once more without spaces around it."""
    places = [found.start() for found in re.finditer(re.escape(old), text)]
    if not places:
        old, new = old.strip(), new.strip()
        places = [found.start() for found in re.finditer(re.escape(old), text)]
    if not places:
        raise Failed(f"No replacement was performed, old_str `{old}` did not appear verbatim in {path}.")
    if len(places) > 1:
        lines = sorted({text.count("\n", 0, place) + 1 for place in places})
        raise Failed(
            f"No replacement was performed. Multiple occurrences of old_str `{old}` in lines {lines}. "
            "Please ensure it is unique."
        )
    at = places[0]
    line = text.count("\n", 0, at) + 1
    made = text[:at] + new + text[at + len(old) :]
    first = max(0, line - CONTEXT)
    snippet = _range(made, first + 1, line + CONTEXT + new.count("\n"))
    said = numbered(snippet, f"a snippet of {path}", first + 1)
    again = f"{_REVIEW}. Edit the file again if necessary."
    return Edited(f"The file {path} has been edited. {said}{again}", text, made)


def inserted(path: str, text: str, line: int, new: str) -> Edited:
    lines = lines_of(text)
    if not 0 <= line <= len(lines):
        hint = f"It should be within the range of allowed values: {[0, len(lines)]}"
        raise _invalid("insert_line", line, hint)
    pieces = new.split("\n")
    made = "".join([*lines[:line], *(f"{piece}\n" for piece in pieces), *lines[line:]])
    first = max(0, line - CONTEXT)
    snippet = _range(made, first + 1, min(len(lines) + len(pieces), line + CONTEXT + len(pieces)))
    said = numbered(snippet, "a snippet of the edited file", max(1, line - CONTEXT + 1))
    again = f"{_REVIEW} (correct indentation, no duplicate lines, etc). Edit the file again if necessary."
    return Edited(f"The file {path} has been edited. {said}{again}", text, made)


def viewed(path: str, text: str, span: Any) -> str:
    if not span:
        return numbered(text, path)
    count = len(lines_of(text))
    if not isinstance(span, list) or len(span) != 2 or not all(isinstance(n, int) for n in span):
        raise _invalid("view_range", span, "It should be a list of two integers.")
    first, last = span
    if not 1 <= first <= count:
        hint = f"Its first element `{first}` should be within the range of lines of the file: {[1, count]}."
        raise _invalid("view_range", span, hint)
    note = ""
    if last > count:
        note = f"NOTE: We only show up to {count} since there're only {count} lines in this file.\n"
    last = count if last == -1 or last > count else last
    if last < first:
        hint = f"Its second element `{last}` should be greater than or equal to the first element `{first}`."
        raise _invalid("view_range", span, hint)
    return note + numbered("\n".join(_range(text, first, last).splitlines()), path, first)


def difference(old: str, new: str, path: str) -> str:
    lines = difflib.unified_diff(old.split("\n"), new.split("\n"), fromfile=path, tofile=path, n=0)
    return "\n".join(line.rstrip() for line in lines)


# --- files --------------------------------------------------------------------------------------------


class Editor:
    """The editor of one sandbox, with what undo needs."""

    def __init__(self, inside: Inside, workdir: str) -> None:
        self.inside, self.workdir = inside, workdir
        self._history: dict[str, list[str]] = {}

    async def edit(self, action: Edit) -> Edited:
        """Never fails but with the sandbox: what was wrong is in the answer."""
        try:
            return await self._edit(action)
        except Failed as error:
            return Edited(f"ERROR:\n{error}")
        except SandboxError as error:
            failure = refused(error, action.path)
            if not isinstance(failure, Failed):
                raise
            return Edited(f"ERROR:\nRan into {failure} while trying to use {action.path}")

    async def _edit(self, action: Edit) -> Edited:
        line = _line_number(action.insert_line)
        path = posixpath.normpath(action.path) if action.path else action.path
        kind = await self._check(action.command, path)
        if action.command == "view":
            return Edited(await self._view(path, kind, action.view_range))
        if action.command == "create":
            return await self._create(path, action.file_text)
        if action.command == "str_replace":
            if action.old_str is None:
                raise _missing("str_replace", "old_str")
            if action.new_str == action.old_str:
                hint = "No replacement was performed. `new_str` and `old_str` must be different."
                raise _invalid("new_str", action.new_str, hint)
            made = replaced(path, await self._text(path), action.old_str, action.new_str or "")
            return await self._save(path, made)
        if action.command == "insert":
            if line is None:
                raise _missing("insert", "insert_line")
            if action.new_str is None:
                raise _missing("insert", "new_str")
            return await self._save(path, inserted(path, await self._text(path), line, action.new_str))
        return await self._undo(path)

    async def _check(self, command: str, path: str) -> str:
        """What is at the path. Raises Failed for what makes no sense."""
        if not path.startswith("/"):
            hint = "The path should be an absolute path, starting with `/`."
            suggested = posixpath.join(self.workdir, path)
            if path and await self.inside.kind(suggested):
                hint += f" Maybe you meant {suggested}?"
            raise _invalid("path", path, hint)
        kind = await self.inside.kind(path)
        if command == "create" and kind:
            hint = f"File already exists at: {path}. Cannot overwrite files using command `create`."
            raise _invalid("path", path, hint)
        if command != "create" and not kind:
            raise _invalid("path", path, f"The path {path} does not exist. Please provide a valid path.")
        if command != "view" and kind == "d":
            hint = f"The path {path} is a directory and only the `view` command can be used on directories."
            raise _invalid("path", path, hint)
        if command not in _COMMANDS:
            allowed = ", ".join(_COMMANDS)
            raise Failed(
                f"Unrecognized command {command}. The allowed commands for the oh_editor tool are: {allowed}"
            )
        return kind

    async def _view(self, path: str, kind: str, span: Any) -> str:
        if kind != "d":
            return viewed(path, await self._text(path), span)
        if span:
            hint = "The `view_range` parameter is not allowed when `path` points to a directory."
            raise _invalid("view_range", span, hint)
        listed = (await self.inside.shell(_LISTED, path)).stdout.data.decode(errors="replace").strip()
        listed = listed if len(listed) <= SHOWN_MAX else listed[:SHOWN_MAX] + _CUT_FOLDER
        hidden = int((await self.inside.shell(_HIDDEN, path)).stdout.data.strip() or b"0")
        said = f"Here's the files and directories up to 2 levels deep in {path}, excluding hidden items:\n"
        said += listed
        if hidden:
            said += (
                f"\n\n{hidden} hidden files/directories in this directory are excluded. "
                f"You can use 'ls -la {path}' to see them."
            )
        return said

    async def _create(self, path: str, text: str | None) -> Edited:
        if text is None:
            raise _missing("create", "file_text")
        folder = posixpath.dirname(path)
        if await self.inside.kind(folder) != "d":
            said = f"[Errno 2] No such file or directory: {path!r}"
            raise Failed(f"Ran into {said} while trying to write to {path}")
        await self._write(path, text)
        self._remember(path, text)
        return Edited(f"File created successfully at: {path}", "", text)

    async def _save(self, path: str, made: Edited) -> Edited:
        await self._write(path, made.new)
        self._remember(path, made.old)
        return made

    async def _undo(self, path: str) -> Edited:
        now = await self._text(path)
        if not self._history.get(path):
            raise Failed(f"No edit history found for {path}.")
        before = self._history[path].pop()
        await self._write(path, before)
        return Edited(f"Last edit to {path} undone successfully. {numbered(before, path)}", now, before)

    def _remember(self, path: str, text: str) -> None:
        kept = self._history.setdefault(path, [])
        kept.append(text)
        del kept[:-HISTORY]

    async def _write(self, path: str, text: str) -> None:
        await self.inside.put(path, text.encode("utf-8", "surrogateescape"))

    async def _text(self, path: str) -> str:
        """As Python reads it. Bytes that are no UTF-8 survive an edit."""
        if path.lower().endswith(_OFFICE):
            hint = f"Please use Python code to read {path}"
            raise Failed(f"Error in converting file to Markdown: not supported here. {hint}")
        data = await self.inside.get(path)
        if len(data) > FILE_MAX:
            size = f"{len(data) / 1024 / 1024:.1f}MB"
            reason = f"File is too large ({size}). Maximum allowed size is {FILE_MAX >> 20}MB."
            raise Failed(f"File validation failed for {path}: {reason}")
        if is_binary(data):
            reason = "File appears to be binary and this file type cannot be read or edited by this tool."
            raise Failed(f"File validation failed for {path}: {reason}")
        return "".join(lines_of(data.decode("utf-8", "surrogateescape")))


def _line_number(given: int | str | None) -> int | None:
    if not isinstance(given, str):
        return given
    try:
        return int(given)
    except ValueError:
        raise Failed(f"Invalid insert_line value: '{given}'. Expected an integer.") from None
