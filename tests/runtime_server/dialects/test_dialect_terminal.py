"""What a terminal shows of bytes, and what is kept of too many."""

from __future__ import annotations

import pytest

from runtime_server.dialects.terminal import Transcript, plain, shown


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"a\r\nb\n", "a\nb\n"),
        (b"\x1b[1;31mred\x1b[0m \x1b]0;title\x07end", "red end"),
        (b"\xff\xfe", "\\xff\\xfe"),
        ("ä€".encode(), "ä€"),
        (b"bash: /proc/self/fd/240: line 12: nope: command not found", "bash: nope: command not found"),
        (b"\x1b(B\x1b[?2004hx", "x"),
    ],
)
def test_plain_leaves_what_the_program_wrote(data: bytes, text: str) -> None:
    assert plain(data) == text


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"10%\r20%\r100%\nend  \n", "100%\nend\n"),
        (b"abcdef\rxy", "xycdef"),
        (b"abc\b\bX", "aXc"),
        (b"a\r\nb", "a\nb"),
    ],
)
def test_shown_is_what_is_left_on_the_screen(data: bytes, text: str) -> None:
    assert shown(data) == text


def test_of_too_much_the_first_and_the_last_are_kept() -> None:
    kept = Transcript(1000)
    for number in range(10_000):
        kept.add(b"%04d\n" % number)
    assert kept.total == 50_000
    assert kept.data.startswith(b"0000\n0001\n") and kept.data.endswith(b"9999\n")
    assert b"[... 49000 bytes left out ...]" in kept.data and len(kept.data) < 1100
    small = Transcript(1000)
    small.add(b"x" * 700)
    assert small.data == b"x" * 700
