"""Waiting with a deadline, and heartbeats: a changing nonce, judged on the observer's own clock.

What it is
    The part of `orchestrator.contract` that knows time. Import it from there.

What it does not do
    No wall clock takes part, nothing is compared between hosts. Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self, TypeVar

from orchestrator.durable import read_bytes
from orchestrator.records import PeerGone, WaitTimeout

T = TypeVar("T")

MISSED_BEATS = 2.5
"""A heartbeat without a change for so many intervals stands still: one beat may fail on a filesystem that
hiccups, and the next be late by the half."""


def wait_for(
    check: Callable[[], T | None],
    what: str,
    timeout_s: float,
    alive: Callable[[], str | None] = lambda: None,
    *,
    first_s: float = 0.05,
    longest_s: float = 2.0,
    alive_every_s: float = 2.0,
) -> T:
    """Poll `check` until it returns something, with growing pauses and jitter.

    `alive` returns None while the producer may still live, or the reason why it is known dead.
    Raises WaitTimeout, or PeerGone with that reason. Nothing here reads a wall clock.
    """
    start = time.monotonic()
    pause, next_alive = first_s, start
    while True:
        if (found := check()) is not None:
            return found
        now = time.monotonic()
        if now >= next_alive:
            next_alive = now + alive_every_s
            if (reason := alive()) is not None:
                raise PeerGone(f"waited {now - start:.0f} s for {what}, but {reason}")
        if now - start >= timeout_s:
            raise WaitTimeout(f"{what} did not appear within {timeout_s:g} s")
        jitter = 0.8 + 0.4 * os.urandom(1)[0] / 255
        time.sleep(min(pause * jitter, max(0.0, timeout_s - (now - start))))
        pause = min(pause * 1.5, longest_s)


class Heartbeat:
    """Rewrites a fixed-length nonce in place every `every_s` seconds, from a daemon thread.

    Survives a filesystem that hiccups: a beat that cannot be written is a missed beat, nothing more.
    """

    def __init__(self, path: Path, every_s: float = 10.0) -> None:
        self.path, self.every_s = path, every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"heartbeat {path.parent.name}", daemon=True)

    def __enter__(self) -> Self:
        self.beat()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        while not self._stop.wait(self.every_s):
            self.beat()

    def beat(self) -> None:
        with contextlib.suppress(OSError):
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.pwrite(descriptor, os.urandom(16).hex().encode() + b"\n", 0)
            finally:
                os.close(descriptor)


class Pulse:
    """An observer of a heartbeat: remembers the last bytes and *its own* monotonic time of change."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._last, self._changed = b"", time.monotonic()

    def still_for(self) -> float:
        """Seconds, on this process's clock, since the nonce was last seen to change."""
        with contextlib.suppress(OSError):
            now = read_bytes(self.path)
            if now != self._last:
                self._last, self._changed = now, time.monotonic()
        return time.monotonic() - self._changed
