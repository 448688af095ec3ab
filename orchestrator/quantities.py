"""Sizes and durations as people write them, kept as integers: "4G" → 4096 MiB, "1-12:00:00" → 129600 s.

What it does not do
    No I/O; functions and `Annotated` types only. Each error says what is allowed.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from orchestrator.typed import Limits, Read

_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*$", re.IGNORECASE)
_MIB = {"K": 1 / 1024, "": 1, "M": 1, "G": 1024, "T": 1024 * 1024}
_CLOCK = re.compile(r"^(?:(\d+)-)?(\d+)(?::(\d{1,2}))?(?::(\d{1,2}))?$")
_UNITS = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(s|m|min|h|d)\s*$", re.IGNORECASE)
_SECONDS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


def parse_mebibytes(value: Any) -> int:
    """MiB from "512M", "4G", "1.5GiB" or a bare number of MiB. Raises ValueError."""
    match = _SIZE.match(str(value))
    if match is None or isinstance(value, bool):
        raise ValueError(f"{value!r} is no size; write a number of MiB, or one with K, M, G or T, like 4G")
    size = float(match[1]) * _MIB[match[2].upper()]
    if size < 1:
        raise ValueError(f"{value!r} is less than one MiB")
    return int(size)


def parse_seconds(value: Any) -> int:
    """Seconds from "HH:MM:SS", "D-HH:MM:SS", "MM:SS", "90m", "2h", or a bare number of seconds."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    text = str(value).strip()
    if match := _UNITS.match(text):
        return int(float(match[1]) * _SECONDS[match[2].lower()])
    if text.isdigit():
        return int(text)
    match = _CLOCK.match(text)
    if match is None:
        raise ValueError(
            f"{value!r} is no duration; write seconds, or 90s, 45m, 2h, or [days-]hours:minutes:seconds"
        )
    days, first, second, third = (int(g) if g else 0 for g in match.groups())
    if match[4] is not None or match[1] is not None:  # H:M:S, D-H, D-H:M, D-H:M:S
        return ((days * 24 + first) * 60 + second) * 60 + third
    return first * 60 + second  # M:S


def clock(seconds: int) -> str:
    """Seconds as Slurm writes them: "1-12:00:00" or "02:00:00"."""
    days, rest = divmod(int(seconds), 86400)
    text = f"{rest // 3600:02d}:{rest % 3600 // 60:02d}:{rest % 60:02d}"
    return f"{days}-{text}" if days else text


Mebibytes = Annotated[int, Read(parse_mebibytes), Limits(gt=0)]
Seconds = Annotated[int, Read(parse_seconds), Limits(gt=0)]
