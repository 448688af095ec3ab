"""Sandboxes in numbers: a real server, and next to it `podman` by hand and SWE-ReX's own server.

How to run it
    python -m bench.sandbox [--json] [--quick] [--held 500] [--only commands,creates,…]

What it measures, in milliseconds unless the name says otherwise
    commands  forkexec         fork and exec of `true` on this machine, bare: the floor of every command
              exec             `true` through HTTP: client → server → agent → fork, exec, wait
              session          the same program in a shell that stays; session_builtin: the shell's own `true`
              podman_exec, swerex_execute, swerex_session (its `run_in_session`): the same program
    creates   create           POST /v1/sandboxes until the sandbox answers; create_warm with containers that
                               wait, as after a prefetch; podman_run: `podman run -d` until it returns;
                               swerex_create: until SWE-ReX's server answers in its container
              fork8            eight sandboxes from one prepared state; fork8_warm with containers that wait
              creates_per_s    sandboxes made, used for one command and deleted, 4 at a time
    crowd     exec_per_s_64    commands in 64 sandboxes at once, each asked again as soon as it answered, by a
                               client that only sends prepared bytes; exec_p99_64_flood is their latency
              exec_p99_64_busy the same sandboxes, with a pause of 0.25 to 0.75 s after each command
    held      held             sandboxes alive at once; server_rss_mib (the server), service_rss_mib (Podman's
                               API service), agent_rss_kib, and exec_p99_held of one command at a time then

    What is compared takes turns in one run, so that a busy machine is unfair to none.

What it does not do
    It needs the default image (`python -m runtime_server.images ensure`), and takes one that is there. Rows
    of SWE-ReX are left out where it cannot run (`sandbox_peers.py` says when).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
from pathlib import Path

from bench.parts import add_only, only
from bench.sandbox_kit import Served, serving
from bench.sandbox_peers import podman, quiet
from bench.sandbox_rows import CROWD, FORKS, Rows, commands, creates, crowd, forks, held, lives

PARTS = ("commands", "creates", "crowd", "held")
SPARE = 32


async def measure(served: Served, parts: list[str], number: int, scale: int) -> Rows:
    """`scale` multiplies the repetitions."""
    rows: Rows = {}
    async with served.client() as client, podman() as by_hand:
        if "commands" in parts:
            rows |= await commands(client, by_hand, 60 * scale)
        if "creates" in parts:
            rows |= await creates(client, by_hand, 5 * scale)
            rows |= await forks(client, 2 * scale)
            rows |= await lives(client, 20 * scale)
        if "crowd" in parts:
            rows |= await crowd(served, client, 2.0 * scale)
        if "held" in parts:
            rows |= await held(served, client, number, 100 * scale)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.sandbox", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--json", action="store_true", help="only the JSON line")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--held", type=int, default=500, help="sandboxes alive at once (default: 500)")
    add_only(parser, PARTS)
    options = parser.parse_args()
    parts = only(parser, options.only, PARTS)
    places = max(options.held, CROWD, FORKS) + SPARE
    with tempfile.TemporaryDirectory(prefix="bench-sandbox-") as base, quiet():
        load = os.getloadavg()[0]
        with serving(Path(base), max_parallel_sandboxes=places) as served:
            rows = asyncio.run(measure(served, parts, options.held, 1 if options.quick else 5))
    rows["load_before"] = round(load, 2)
    for name, value in rows.items() if not options.json else ():
        print(f"{name:24} {value:10.2f}")
    print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
