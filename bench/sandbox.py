"""Sandboxes in numbers: a real server, a real Podman, and `podman` by hand next to it in the same run.

How to run it
    python -m bench.sandbox [--json] [--quick]

What it measures
    exec_*            a command (`true`) through HTTP: httpx client → server → agent → fork, exec, wait
    exec_per_s        the same, 32 at a time in 4 sandboxes
    create_cold_*     POST /v1/sandboxes until the sandbox answers, one at a time
    create_per_s      sandboxes made, used for one command and deleted, at full load, removal included
    podman_*          `podman exec` and `podman run --rm` of the same command, image, store and settings

What it does not do
    It needs the default image (`python -m runtime_server.images ensure`), and takes one that is there.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from orchestrator.schema import Runtime
from runtime_server.client import Client
from runtime_server.engines import namespace
from runtime_server.engines.service import find_programs
from runtime_server.engines.state import State
from runtime_server.image_store import default_store
from runtime_server.wire import CreateSandbox, Exec

IMAGE = Runtime().sandbox.image
PARALLEL = 4
TRUE = Exec(command=["true"], timeout_s=30)


def quantile(values: Sequence[float], share: float) -> float:
    """In milliseconds."""
    ordered = sorted(values)
    return round(1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))], 2)


async def timed(work: Callable[[], Awaitable[object]], times: int) -> list[float]:
    """Seconds of each of `times` calls, one after the other."""
    took = []
    for _ in range(times):
        start = time.perf_counter()
        await work()
        took.append(time.perf_counter() - start)
    return took


async def per_second(work: Callable[[int], Awaitable[object]], times: int, at_once: int) -> float:
    limit = asyncio.Semaphore(at_once)

    async def one(number: int) -> None:
        async with limit:
            await work(number)

    start = time.perf_counter()
    await asyncio.gather(*(one(number) for number in range(times)))
    return round(times / (time.perf_counter() - start), 1)


async def measure_server(url: str, key: str, scale: int) -> dict[str, float]:
    async with Client(url, key) as client:
        made = [await client.create() for _ in range(4)]
        first = made[0].id
        await timed(lambda: client.exec(first, TRUE), 20)
        alone = await timed(lambda: client.exec(first, TRUE), 50 * scale)
        rate = await per_second(lambda n: client.exec(made[n % 4].id, TRUE), 200 * scale, 32)
        cold = await timed(client.create, 2 * scale)
        for box in (await client.list()).sandboxes:
            await client.delete(box.id)

        async def whole_life(_: int) -> None:
            async with client.sandbox(CreateSandbox()) as box:
                await box.exec(["true"])

        return {
            "exec_p50_ms": quantile(alone, 0.5),
            "exec_p99_ms": quantile(alone, 0.99),
            "exec_per_s": rate,
            "create_cold_p50_ms": quantile(cold, 0.5),
            "create_cold_p90_ms": quantile(cold, 0.9),
            "create_per_s": await per_second(whole_life, 10 * scale, PARALLEL),
        }


def with_server(scale: int) -> dict[str, float]:
    command = [sys.executable, "-m", "runtime_server"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        said = dict(
            line.split(":", 1) for line in (server.stdout.readline(), server.stdout.readline()) if line
        )
        if "key" not in said:
            raise SystemExit("the server did not start; what it said is above")
        key = Path(said["key"].strip()).read_text().strip()
        return asyncio.run(measure_server(said["url"].strip(), key, scale))
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=60)


def podman_times(podman: Sequence[str], command: Sequence[str], times: int) -> list[float]:
    took = []
    for _ in range(times):
        start = time.perf_counter()
        # no pipes: the monitor of a container that goes on would hold them open
        nowhere = subprocess.DEVNULL
        subprocess.run([*podman, *command], check=True, stdout=nowhere, stderr=nowhere, timeout=60)
        took.append(time.perf_counter() - start)
    return took


def podman_command(state: State) -> list[str]:
    """Podman as one would run it by hand, with everything it writes in directories of its own."""
    storage = ["--root", str(state.graphroot), "--runroot", str(state.runroot), "--tmpdir", str(state.tmp)]
    store = ["--storage-driver", "overlay", "--storage-opt", f"additionalimagestore={default_store()}"]
    engine = ["--cgroup-manager", "cgroupfs", "--events-backend", "file", "--runtime", find_programs()[0]]
    return ["podman", *storage, *store, *engine]


def measure_podman(podman: Sequence[str], times: int) -> dict[str, float]:
    limits = ["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=4096:4096"]
    run = ["run", "--network", "none", *limits]
    podman_times(podman, [*run, "-d", "--name", "bench", IMAGE, "sleep", "600"], 1)
    try:
        execs = podman_times(podman, ["exec", "bench", "true"], times)
        runs = podman_times(podman, [*run, "--rm", IMAGE, "true"], times)
    finally:
        podman_times(podman, ["rm", "-f", "-t", "0", "bench"], 1)
    return {"podman_exec_p50_ms": quantile(execs, 0.5), "podman_run_p50_ms": quantile(runs, 0.5)}


def with_podman(times: int) -> dict[str, float]:
    """In a child process with a mount namespace of its own, so that no mount of it can stay."""
    state = State.create()
    try:
        child = [sys.executable, "-m", "bench.sandbox", "--times", str(times), "--podman-only"]
        command = [*namespace.entry().prefix, *child, json.dumps(podman_command(state))]
        environment = {**os.environ, "XDG_RUNTIME_DIR": str(state.xdg)}
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, timeout=300)
        return {name: float(value) for name, value in json.loads(done.stdout).items()}
    finally:
        state.remove()


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.sandbox", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--json", action="store_true", help="only the JSON line")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--podman-only", help=argparse.SUPPRESS)
    parser.add_argument("--times", type=int, default=20, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.podman_only:
        print(json.dumps(measure_podman(json.loads(options.podman_only), options.times)))
        return 0
    numbers = with_server(2 if options.quick else 10) | with_podman(5 if options.quick else 20)
    if not options.json:
        for name, value in numbers.items():
            print(f"{name:24} {value:10.2f}")
    print(json.dumps(numbers))
    return 0


if __name__ == "__main__":
    sys.exit(main())
