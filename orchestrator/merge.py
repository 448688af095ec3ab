"""One timeline of a run: every line of every log, and every event, in one order.

What it is
    `past` puts what is written by now in order: events by their time, a line of a log by the time that it
    begins with, else behind the line before it. `Merger` gives what is new since the last look, in the order
    of arrival, which is all that can be known of lines without a time.

How to use it
    for entry in past(run): ...; merger = Merger(run); merger.news()

What it does not do
    It prints nothing and corrects no clock: nodes whose clocks differ are as far apart here.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from orchestrator import runs
from orchestrator.contract import Event, RunDirectory
from orchestrator.durable import read_bytes
from orchestrator.runs import Log

_TIME = re.compile(r"^\W{0,2}(\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:[.,]\d{1,6})?)(Z|[+-]\d\d:?\d\d)?\b")
_BEGINS = ("starting", "waiting")


@dataclass(frozen=True)
class Entry:
    """A line or an event. stream: out, err or event; attempt 0: not known."""

    at: float
    role: str
    attempt: int
    stream: str
    text: str
    file: str = ""
    data: dict[str, Any] = field(default_factory=dict)


def past(run: RunDirectory, role: str | None = None) -> list[Entry]:
    """Everything that is written by now, in order."""
    events = [event for event in run.timeline() if role in (None, event.role)]
    found = [_of_event(event) for event in events]
    starts = _starts(run.timeline())
    for log in runs.logs(run, role):
        found += _lines(log, starts)
    return sorted(found, key=lambda entry: entry.at)


def _of_event(event: Event) -> Entry:
    return Entry(event.at, event.role, event.attempt, "event", event.what, data=event.data)


def _starts(events: list[Event]) -> dict[str, list[tuple[float, int]]]:
    """When each attempt of each role began, in order."""
    found: dict[str, list[tuple[float, int]]] = {}
    for event in events:
        known = found.setdefault(event.role, [])
        if event.attempt and event.attempt not in [number for _, number in known]:
            known.append((event.at, event.attempt))
    return found


def _lines(log: Log, starts: dict[str, list[tuple[float, int]]]) -> Iterator[Entry]:
    begun = starts.get(log.role, [])
    at = begun[0][0] if begun else 0.0
    for line in read_bytes(log.path).decode(errors="replace").splitlines():
        at = max(at, time_of(line) or 0.0)
        yield Entry(at, log.role, attempt_at(begun, at), log.stream, line, log.path.name)


def attempt_at(begun: list[tuple[float, int]], at: float) -> int:
    """The attempt that ran at a time; 0 when none is known."""
    return max((number for start, number in begun if start <= at), default=0)


def time_of(line: str) -> float | None:
    """Seconds since the epoch of the time that a line begins with, as Python's logging writes it."""
    if (match := _TIME.match(line)) is None:
        return None
    zone = (match[2] or "").replace("Z", "+00:00")
    try:
        return datetime.fromisoformat(match[1].replace(",", ".").replace("T", " ") + zone).timestamp()
    except ValueError:
        return None


class Merger:
    """What is new since the last look, by arrival. The first look gives nothing: `past` has that."""

    def __init__(self, run: RunDirectory, role: str | None = None) -> None:
        self.run, self.role = run, role
        self._read: dict[Path, int] = {}
        self._seen: set[tuple[float, str, str]] = set()

    def start(self) -> list[Entry]:
        """Everything so far; whole lines only, so that none is ever printed in halves."""
        for log in runs.logs(self.run, self.role):
            self._read[log.path] = _whole(read_bytes(log.path))
        self._seen = {_key(event) for event in self.run.timeline()}
        return past(self.run, self.role)

    def news(self, whole: bool = True) -> list[Entry]:
        """New events by their time, then new lines; with `whole` an unfinished line waits for its end."""
        new = [event for event in self.run.timeline() if _key(event) not in self._seen]
        self._seen |= {_key(event) for event in new}
        entries = [_of_event(event) for event in new if self.role in (None, event.role)]
        for log in runs.logs(self.run, self.role):
            data = read_bytes(log.path)
            before, end = self._read.get(log.path, 0), _whole(data) if whole else len(data)
            self._read[log.path] = max(before, end)
            attempt = self.run.latest_attempt(log.role) if before < end else 0
            for line in data[before:end].decode(errors="replace").splitlines():
                entries.append(Entry(time.time(), log.role, attempt, log.stream, line, log.path.name))
        return entries


def _whole(data: bytes) -> int:
    return data.rfind(b"\n") + 1


def _key(event: Event) -> tuple[float, str, str]:
    return event.at, event.what, repr(event.data)
