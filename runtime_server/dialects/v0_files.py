"""OpenHands V0's `read` and `write` actions: whole files or ranges of lines.

What it does not do
    No editing (`v0_editor.py`). Failures are the texts of `openhands/runtime/action_execution_server.py`.
"""

from __future__ import annotations

from pydantic import BaseModel

from runtime_server.dialects.inside import Inside, join
from runtime_server.errors import NotFound, SandboxError

BINARY = "ERROR_BINARY_FILE"
_LOOKED_AT = 1024


class Failed(Exception):
    """An `error` observation; its text."""


class Read(BaseModel):
    path: str
    start: int = 0
    end: int = -1
    impl_source: str = "default"
    view_range: list[int] | None = None


class Write(BaseModel):
    path: str
    content: str = ""
    start: int = 0
    end: int = -1


def is_binary(data: bytes) -> bool:
    """From the first bytes: a NUL, or control characters and bytes that are no text in quantity."""
    head = data[:_LOOKED_AT]
    if not head or head.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        return False
    if b"\0" in head:
        return True
    try:
        head.decode()
        return False
    except UnicodeDecodeError as error:
        if error.start >= len(head) - 3 and len(data) > len(head):  # a character cut in two
            return False
    odd = sum(byte < 9 or 13 < byte < 32 or byte > 126 for byte in head)
    return odd / len(head) > 0.3


def lines_of(text: str) -> list[str]:
    """As Python reads a file: `\\r\\n` is `\\n`."""
    return (
        text.replace("\r\n", "\n").replace("\r", "\n").splitlines(keepends=True)
        if "\r" in text
        else _split(text)
    )


def _split(text: str) -> list[str]:
    parts = text.split("\n")
    return [f"{part}\n" for part in parts[:-1]] + ([parts[-1]] if parts[-1] else [])


def some(lines: list[str], start: int, end: int) -> list[str]:
    """Which lines the real server gives for a range."""
    count = len(lines)
    start = min(max(start, 0), count)
    if end == -1:
        return lines[start:]
    end = min(max(end, 0), count)
    begin = max(0, min(start, count - 2))
    return lines[begin : max(begin + 1, end)]


def merged(content: str, old: list[str] | None, start: int, end: int) -> str:
    """Every piece between newlines ends with one. `old`: the lines there are; None for a new file."""
    new = [f"{piece}\n" for piece in content.split("\n")]
    if old is None:
        return "".join(new)
    return "".join([*(old[:start] if start else []), *new, *(old[end:] if end != -1 else [])])


async def read(inside: Inside, action: Read, cwd: str) -> str:
    """Raises Failed."""
    path = join(cwd, action.path)
    data = await _content(inside, path, cwd)
    if is_binary(data):
        raise Failed(BINARY)
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise Failed(f"File could not be decoded as utf-8: {path}.") from None
    return "".join(some(lines_of(text), action.start, action.end))


async def write(inside: Inside, action: Write, cwd: str) -> None:
    """Raises Failed."""
    path = join(cwd, action.path)
    old: list[str] | None = None
    kind = await inside.kind(path)
    if kind == "d":
        raise Failed(f"Path is a directory: {path}. You can only write to files")
    if kind:
        try:
            old = lines_of((await inside.get(path)).decode())
        except UnicodeDecodeError:
            raise Failed(f"File could not be decoded as utf-8: {path}") from None
    text = merged(action.content, old, action.start, action.end)
    try:
        await inside.put(path, text.encode("utf-8", "backslashreplace"), 0o664)
    except SandboxError as error:
        raise refused(error, path) from None


async def _content(inside: Inside, path: str, cwd: str) -> bytes:
    try:
        return await inside.get(path)
    except NotFound:
        raise Failed(f"File not found: {path}. Your current working directory is {cwd}.") from None
    except SandboxError as error:
        if error.detail.get("errno") == 21 or (error.status == 400 and await inside.kind(path) == "d"):
            raise Failed(f"Path is a directory: {path}. You can only read files") from None
        raise refused(error, path) from None


def refused(error: SandboxError, path: str) -> Exception:
    """A mistake of the caller becomes an observation; the end of the sandbox stays what it is."""
    if error.status in (400, 404, 413):
        return Failed(f"{error}" if path in str(error) else f"{path}: {error}")
    return error
