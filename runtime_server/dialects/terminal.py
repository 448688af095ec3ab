"""What a terminal shows: bytes to text. Pure.

What it is
    `plain` takes colours and other control sequences out and leaves the rest as the program wrote it;
    `shown` also lets a carriage return overwrite its line, as a person would see it. `Transcript` keeps what
    came, bounded, its head and its tail.

What it does not do
    No cursor addressing: a full-screen program is shown as the text it wrote.
"""

from __future__ import annotations

import re

KEPT = 8 << 20
_CONTROL = re.compile(
    rb"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[PX^_][^\x1b]*\x1b\\|[ -/]*[0-~])"
    rb"|[\x00\x07\x0e\x0f]"
)


_SOURCED = re.compile(rb"/proc/self/fd/\d+: (?:line )?\d+: ")
"""Where a shell's own complaints name the file that its command came in: a terminal has no such file."""


class Transcript:
    """Bytes in the order they came; of too many, the first and the last."""

    def __init__(self, kept: int = KEPT) -> None:
        self.half, self.total = kept // 2, 0
        self._head, self._tail = bytearray(), bytearray()

    def add(self, data: bytes) -> None:
        self.total += len(data)
        room = self.half - len(self._head)
        self._head += data[:room] if room > 0 else b""
        self._tail += data[room:] if room > 0 else data
        if len(self._tail) > 2 * self.half:  # not each time: cutting moves bytes
            del self._tail[: len(self._tail) - self.half]

    @property
    def data(self) -> bytes:
        tail = self._tail[-self.half :] if self.half else b""
        lost = self.total - len(self._head) - len(tail)
        return bytes(self._head) + missing(lost) + bytes(tail)


def missing(count: int) -> bytes:
    """What stands where bytes are lost."""
    return b"\n[... %d bytes left out ...]\n" % count if count > 0 else b""


def plain(data: bytes) -> str:
    """Without control sequences; bytes that are no UTF-8 as `\\xff`."""
    text = _SOURCED.sub(b"", data)
    text = _CONTROL.sub(b"", text) if b"\x1b" in data or b"\0" in data or b"\7" in data else text
    return text.replace(b"\r\n", b"\n").decode(errors="backslashreplace")


def shown(data: bytes) -> str:
    """What is on the screen in the end: overwritten lines gone, spaces at the ends of lines gone."""
    text = _CONTROL.sub(b"", _SOURCED.sub(b"", data)).decode(errors="replace")
    return "\n".join(_line(line).rstrip() for line in text.replace("\r\n", "\n").split("\n"))


def _line(text: str) -> str:
    if "\r" not in text and "\b" not in text:
        return text
    cells: list[str] = []
    at = 0
    for char in text:
        if char == "\r":
            at = 0
        elif char == "\b":
            at = max(0, at - 1)
        else:
            cells[at : at + 1] = [char]
            at += 1
    return "".join(cells)
