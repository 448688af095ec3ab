"""What `orchestrate doctor` says: one line per thing that was checked, with the remedy.

What it does not do
    It checks nothing. Standard library only: probes on compute nodes use it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

LEVELS = ("ok", "warn", "fail")


@dataclass(frozen=True)
class Check:
    """One line: what was looked at, how it is, and, when it is not ok, what to do about it."""

    name: str
    level: str
    text: str
    remedy: str = ""

    def as_dict(self) -> dict[str, str]:
        return asdict(self)

    @classmethod
    def of(cls, data: dict[str, Any]) -> Check:
        return cls(*(str(data.get(name, "")) for name in ("name", "level", "text", "remedy")))


def ok(name: str, text: str) -> Check:
    return Check(name, "ok", text)


def warn(name: str, text: str, remedy: str = "") -> Check:
    return Check(name, "warn", text, remedy)


def fail(name: str, text: str, remedy: str = "") -> Check:
    return Check(name, "fail", text, remedy)
