"""When a step has enough episodes: the rules by which stragglers are left behind.

What it is
    A step needs so many episodes, and may have started more. `race` waits until it need not wait longer:
        - all of the wanted ones are done, and none of them was lost; or
        - there are as many valid ones as are wanted, with those besides, and the wanted ones that are not
          done yet had `grace_s` more to end; or
        - everything that was started is done; or
        - the step's time is up.
    What is not done then is cancelled. So a straggler holds up nobody, and where none is later than the
    grace, the step is the one that it would be without any besides, bit for bit.

What it does not do
    It knows no sandboxes and no tokens. That fast episodes are taken rather than slow ones is a bias; the
    smaller `oversample` and the longer the grace, the smaller it is.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trainer.episode import Episode


@dataclass(frozen=True)
class Rules:
    """`wanted` and `besides` are numbers of episodes, in order; times are in seconds."""

    wanted: Sequence[int]
    besides: Sequence[int] = ()
    grace_s: float = 0.0
    timeout_s: float | None = None

    def enough(self, ended: Mapping[int, Episode]) -> bool:
        """Whether no further episode could make the step better."""
        return all(number in ended and ended[number].valid for number in self.wanted)

    def may_end(self, ended: Mapping[int, Episode]) -> bool:
        """Whether the step could end without those that are not done yet."""
        return sum(episode.valid for episode in ended.values()) >= len(self.wanted)

    def filled(self, episodes: Mapping[int, Episode], ended: Mapping[int, Episode]) -> list[Episode]:
        """The wanted episodes in order; a lost or late one is replaced by a valid one from besides, of its
        own group where there is one."""
        spare = [ended[number] for number in self.besides if number in ended and ended[number].valid]
        found = []
        for number in self.wanted:
            episode = episodes[number]
            if not episode.valid and spare:
                own = next((i for i, other in enumerate(spare) if other.group == episode.group), 0)
                episode = spare.pop(own)
            found.append(episode)
        return found


async def race(
    rules: Rules, started: Mapping[int, asyncio.Task[Episode]], known: Mapping[int, Episode]
) -> dict[int, Episode]:
    """The episodes that ended in time, by number, `known` ones among them; the others have been cancelled.

    Raises what the first one raised that raised anything, after all others are cancelled and over.
    """
    ended = dict(known)
    try:
        await _wait(rules, started, ended)
    finally:
        for task in started.values():
            task.cancel()
        if left := [task for task in started.values() if not task.done()]:
            await asyncio.wait(left)
        for task in started.values():
            if task.done() and not task.cancelled():
                task.exception()  # seen, so that nobody is told twice
    return ended


async def _wait(
    rules: Rules, started: Mapping[int, asyncio.Task[Episode]], ended: dict[int, Episode]
) -> None:
    numbers = {task: number for number, task in started.items()}
    over = None if rules.timeout_s is None else time.perf_counter() + rules.timeout_s
    late: float | None = None
    pending = set(started.values())
    while pending and not rules.enough(ended):
        if rules.besides and late is None and rules.may_end(ended):
            late = time.perf_counter() + rules.grace_s
        ends = [end for end in (over, late) if end is not None]
        left = min(ends) - time.perf_counter() if ends else None
        if left is not None and left <= 0:
            return
        done, pending = await asyncio.wait(pending, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        for task in sorted(done, key=lambda task: numbers[task]):
            ended[numbers[task]] = task.result()
