"""How long anything of a kind was going on, on the wall clock, when many such things overlap.

What it is
    `Watch` counts what is going on by name. Its seconds are those in which at least one was: a hundred
    episodes that wait for their sandboxes during the same second are one second.

How to use it
    with watch("generate"): ...            # in any number of coroutines at once
    seconds = watch.take()                 # since the last time; what is going on counts up to now

What it does not do
    No threads: it is for the coroutines of one event loop.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class Watch:
    """See the module's docstring."""

    def __init__(self) -> None:
        self._going: dict[str, int] = defaultdict(int)
        self._since: dict[str, float] = {}
        self._seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if not self._going[name]:
            self._since[name] = time.perf_counter()
        self._going[name] += 1
        try:
            yield
        finally:
            self._going[name] -= 1
            if not self._going[name]:
                self._seconds[name] += time.perf_counter() - self._since[name]

    def take(self) -> dict[str, float]:
        """Seconds by name since the last call of this."""
        now = time.perf_counter()
        for name, count in self._going.items():
            if count:
                self._seconds[name] += now - self._since[name]
                self._since[name] = now
        taken, self._seconds = dict(self._seconds), defaultdict(float)
        return taken
