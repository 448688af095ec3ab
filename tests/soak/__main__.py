"""Soaks a real sandbox server: thousands of sandboxes made, used and deleted, while things are killed.

How to use it
    make soak [CYCLES=5000]      or: PYTHONPATH=tests python -m soak --cycles N [--seed S] [--at-once 4]

    A cycle makes a sandbox, runs commands in it (some in a session, some with an Idempotency-Key), looks in
    a file there how often each ran, and deletes it. Meanwhile agents, containers, monitors and Podman's
    service are killed at random; in the last two fifths also the server, which is started again and has to
    find everything that it had acknowledged. After each block of cycles everything is deleted and looked at:
    nothing may be left, and the server's open files and memory must be what they were.

    Prints the seed, a line for each block, and a JSON line last; exit code 0 says that nothing was wrong.

What it does not do
    A seed repeats what is asked and what is killed, not the instant: processes race. A command without a key
    that was under way when the server was killed may have run or not; it is counted, and never twice.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from soak.cycle import Cycle, Tally
from soak.kills import Killer
from soak.place import Place
from soak.quiet import Quiet

CYCLE_S = 240.0
CALM = 0.6  # so much of the cycles the server itself is spared, so that its memory can be judged


class Soak:
    """One run."""

    def __init__(self, options: argparse.Namespace, place: Place) -> None:
        self.options, self.place = options, place
        self.random = random.Random(options.seed)
        self.tally, self.quiet = Tally(), Quiet(place)
        self.killer = Killer(place, self.tally)

    async def run(self) -> None:
        await self.place.start()
        await self.quiet.remember()
        for first in range(0, self.options.cycles, self.options.block):
            numbers = range(first, min(first + self.options.block, self.options.cycles))
            await self._block(numbers, calm=first < CALM * self.options.cycles)
            self._say(numbers.stop)
        self.tally.problems += await self.quiet.ended()
        failed, killed = self.tally.counted["create_failed"], self.tally.killed
        most = self.options.at_once * (killed["service"] + killed["server"])
        if failed > most:  # those under way at each kill, and no more after it
            self.tally.problems.append(f"{failed} creates failed, and at most {most} were struck")

    async def _block(self, numbers: range, *, calm: bool) -> None:
        limit = asyncio.Semaphore(self.options.at_once)
        async with self.place.client() as client:
            await client.prefetch({"": self.random.choice((0, 0, 2))})

        kills: list[asyncio.Task[None]] = []

        async def one(number: int) -> None:
            async with limit:
                if number % self.options.kill_every == 0:
                    kills.append(asyncio.create_task(self.killer.one(self.random, calm=calm)))
                await self._cycle(Cycle(number, self.options.seed, self.place, self.tally))

        await asyncio.gather(*(one(number) for number in numbers))
        await asyncio.gather(*kills)
        left = await self.quiet.look(numbers.stop)
        for line in left:
            print(f"   left after cycle {numbers.stop}: {line}", flush=True)
        self.tally.problems += [f"after cycle {numbers.stop}: {line}" for line in left]

    async def _cycle(self, cycle: Cycle) -> None:
        try:
            async with asyncio.timeout(CYCLE_S):
                await cycle.go()
        except TimeoutError:
            self.tally.problems.append(f"cycle {cycle.number} hangs at: {cycle.step}")
        finally:
            self.tally.forget(cycle)

    def _say(self, number: int) -> None:
        tally, memory = self.tally, self.quiet.memory
        killed = " ".join(f"{kind} {count}" for kind, count in sorted(tally.killed.items()))
        print(
            f"{number:6} cycles  {tally.counted['exec']} commands  killed: {killed or 'nothing'}  "
            f"server {memory.rss_mib:.1f} MiB, {memory.files} files  problems {len(tally.problems)}",
            flush=True,
        )

    def report(self, seconds: float) -> dict[str, object]:
        tally, memory = self.tally, self.quiet.memory
        return {
            "soak": "sandboxes",
            "seed": self.options.seed,
            "cycles": self.options.cycles,
            "seconds": round(seconds, 1),
            "counted": dict(tally.counted),
            "killed": dict(tally.killed),
            "lost_with_a_reason": dict(tally.lost),
            "server_starts": self.place.starts,
            **memory.rows(),
            "problems": len(tally.problems),
        }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m soak", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cycles", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--at-once", type=int, default=4, help="cycles at the same time (default: 4)")
    parser.add_argument("--block", type=int, default=100, help="cycles between two looks (default: 100)")
    parser.add_argument("--kill-every", type=int, default=8, help="one kill in so many cycles (default: 8)")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("soak: told to stop"))  # taking the server along
    print(f"seed {options.seed}: {options.cycles} cycles, {options.at_once} at once", flush=True)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder, Place(Path(folder)) as place:
        soak, start = Soak(options, place), time.monotonic()
        asyncio.run(soak.run())
        report = soak.report(time.monotonic() - start)
    for line, count in Counter(soak.tally.problems).most_common(40):
        print(f"WRONG: {line}" + (f" ({count} times)" if count > 1 else ""))
    print(json.dumps(report))
    return 1 if soak.tally.problems else 0


if __name__ == "__main__":
    sys.exit(main())
