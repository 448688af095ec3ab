"""What a command costs through the sandbox agent, next to fork + exec of the same program on this host.

How to use it
    python -m bench.agent [--count N] [--json]

    Starts the agent as PID 1 of a new pid namespace (root, or unprivileged user namespaces), runs `true`
    by turns on the host, through the agent's socket and in a session (a shell that stays), then 16 at once,
    then files and archives. Prints a table (not with --json) and, last, one JSON line: milliseconds unless
    a name says otherwise. `agent_rss_kib` is everything the agent has resident, private and shared, after
    all that; `session_rss_kib` what each of 16 open sessions adds to the agent (not its shell).

What it does not do
    No container and no HTTP: `bench.sandbox` measures those.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

from runtime_server.agent import AgentConnection, AgentListener
from runtime_server.agent.build import agent_binary

AT_ONCE = 16
FILE_BYTES = 50_000_000
Clock = Callable[[], float]


async def through_agent(agent: AgentConnection, program: str) -> None:
    await agent.exec([program], cwd=None, env={}, stdin=None, timeout_s=30, max_output=1 << 16)


def on_host(program: str) -> None:
    """posix_spawn: the kernel's fork and exec without copying this interpreter's page tables."""
    os.waitpid(os.posix_spawn(program, [program], os.environ), 0)


def quantile(sample: list[float], share: float) -> float:
    return round(sorted(sample)[min(len(sample) - 1, int(len(sample) * share))], 3)


async def timed(work: Awaitable[object], clock: Clock) -> float:
    started = clock()
    await work
    return (clock() - started) * 1000


async def by_turns(agent: AgentConnection, program: str, count: int, clock: Clock) -> dict[str, float]:
    """One on the host, one through the agent, one in a session, and so on: all meet the same weather."""
    times: dict[str, list[float]] = {"host_fork_exec": [], "agent_exec": [], "agent_session": []}
    builtin: list[float] = []
    session = await agent.open_session()
    for _ in range(count):
        started = clock()
        on_host(program)
        times["host_fork_exec"].append((clock() - started) * 1000)
        times["agent_exec"].append(await timed(through_agent(agent, program), clock))
        times["agent_session"].append(await timed(session.run(program, timeout_s=30), clock))
        builtin.append(await timed(session.run(":", timeout_s=30), clock))
    await session.close()
    result: dict[str, float] = {}
    for name, sample in times.items():
        result |= {f"{name}_p50_ms": quantile(sample, 0.5), f"{name}_p99_ms": quantile(sample, 0.99)}
    return result | {"agent_session_builtin_p50_ms": quantile(builtin, 0.5)}


async def at_once(agent: AgentConnection, program: str, count: int, clock: Clock) -> dict[str, float]:
    async def worker() -> None:
        for _ in range(count // AT_ONCE):
            await through_agent(agent, program)

    started = clock()
    await asyncio.gather(*(worker() for _ in range(AT_ONCE)))
    return {"agent_exec_per_s": round(count // AT_ONCE * AT_ONCE / (clock() - started))}


async def files(agent: AgentConnection, directory: Path, clock: Clock) -> dict[str, float]:
    path, data = str(directory / "file"), os.urandom(FILE_BYTES)
    started = clock()
    await agent.write_file(path, data)
    written = clock()
    await agent.read_file(path, FILE_BYTES)
    return {
        "write_mb_per_s": round(FILE_BYTES / 1e6 / (written - started)),
        "read_mb_per_s": round(FILE_BYTES / 1e6 / (clock() - written)),
    }


async def archives(agent: AgentConnection, directory: Path, clock: Clock) -> dict[str, float]:
    """The file of `files` packed, and packed and unpacked at once."""
    started, count = clock(), 0
    async for part in agent.pack(str(directory), 2 * FILE_BYTES):
        count += len(part)
    packed = clock()
    with tempfile.TemporaryDirectory(prefix="bench-agent-") as target:
        await agent.unpack(target, agent.pack(str(directory), 2 * FILE_BYTES), 2 * FILE_BYTES)
        copied = clock()
    return {
        "pack_mb_per_s": round(count / 1e6 / (packed - started)),
        "pack_unpack_mb_per_s": round(count / 1e6 / (copied - packed)),
    }


def resident_kib(pid: int) -> int:
    """Private and shared pages. The agent keeps others from looking, so this needs root."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except PermissionError:
        return int(Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()[0])
    wanted = ("Private_Clean", "Private_Dirty", "Shared_Clean", "Shared_Dirty")
    return sum(int(line.split()[1]) for line in lines if line.startswith(wanted))


async def with_sessions(agent: AgentConnection) -> dict[str, float]:
    before = resident_kib(agent.pid)
    sessions = [await agent.open_session() for _ in range(AT_ONCE)]
    await asyncio.gather(*(session.run("true", timeout_s=30) for session in sessions))
    after = resident_kib(agent.pid)
    await asyncio.gather(*(session.close() for session in sessions))
    return {"session_rss_kib": round((after - before) / AT_ONCE, 1)}


async def measure(agent: AgentConnection, directory: Path, count: int) -> dict[str, float]:
    program, clock = shutil.which("true") or "/bin/true", time.perf_counter
    pings = [await agent.ping() * 1000 for _ in range(count)]
    result = {"ping_p50_ms": quantile(pings, 0.5)}
    result |= await by_turns(agent, program, count, clock)
    result |= await at_once(agent, program, count, clock)
    result |= await files(agent, directory, clock)
    result |= await archives(agent, directory, clock)
    result |= await with_sessions(agent)
    return result | {
        "agent_rss_kib": resident_kib(agent.pid),
        "agent_binary_bytes": agent_binary().stat().st_size,
    }


async def with_agent(
    work: Callable[[AgentConnection], Coroutine[Any, Any, dict[str, float]]], directory: Path
) -> dict[str, float]:
    """Runs `work` beside an agent that is PID 1, and ends it."""
    listener = AgentListener(directory / "agent.sock")
    await listener.start()
    root = os.geteuid() == 0
    unshare = ["unshare", "--pid" if root else "-Urp", "--fork", "--mount-proc", "--kill-child"]
    process = await asyncio.create_subprocess_exec(*unshare, agent_binary(), str(listener.path))
    try:
        return await work(await listener.accept(None, 10))
    finally:
        await listener.close()
        process.kill()
        await process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--count", type=int, default=500, help="commands per measurement (default: 500)")
    parser.add_argument("--json", action="store_true", help="print the JSON line alone")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-agent-") as place:
        directory = Path(place)
        result = asyncio.run(with_agent(lambda agent: measure(agent, directory, options.count), directory))
    for name, value in result.items() if not options.json else ():
        print(f"{name:24} {value:>12}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
