"""The rows of the sandbox benchmark, by what has to exist while they are measured.

What it is
    `commands`   one command at a time: here, bare, by `podman exec`, in SWE-ReX's server
    `creates`    one sandbox at a time, likewise; forks; whole lives at full load
    `crowd`      64 sandboxes at once
    `held`       as many as were asked for, and what the server takes up for them

What it does not do
    It starts no server and prints nothing: `sandbox.py` does.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from typing import TYPE_CHECKING

from bench.agent import on_host, resident_kib
from bench.sandbox_kit import Line, Served, Way, by_turns, per_second, quantile, took
from bench.sandbox_peers import Podman, has_rex, rex, true_program
from runtime_server import wire
from runtime_server.client import Client
from runtime_server.client_running import RemoteSession

if TYPE_CHECKING:
    from swerex.runtime.remote import RemoteRuntime

TRUE = wire.Exec(command=["true"], timeout_s=30)
COLD = wire.CreateSandbox(limits=wire.Limits(pids=500))  # other limits than those that wait warm
AT_ONCE, CROWD, FORKS, WARM = 4, 64, 8, 2
TRAIN = 10  # commands in a row, as those of an episode are
THINK_S = (0.25, 0.75)  # between the commands of a busy sandbox: an agent's model speaks
Rows = dict[str, float]


# --- one command at a time ------------------------------------------------------------------------------


async def commands(client: Client, podman: Podman, rounds: int) -> Rows:
    """A round has every quick way as a train of commands, every sixth the slow ones too, once."""
    box = await client.create()
    opened = await client.open_session(box.id, wire.OpenSession())
    session = RemoteSession(client, box.id, opened)
    by_hand = await podman.run("sleep", "86400")
    ways = {
        "forkexec": Way(bare, times=TRAIN),
        "exec": Way(lambda: client.exec(box.id, TRUE), times=TRAIN),
        "session": Way(lambda: session.run(true_program(), timeout_s=30), times=TRAIN),
        "session_builtin": Way(lambda: session.run("true", timeout_s=30), times=TRAIN),
        "podman_exec": Way(lambda: podman("exec", by_hand, "true"), every=6),
    }
    theirs = await rex(podman) if has_rex() else None
    found = await by_turns(ways | (await _rex_ways(theirs) if theirs else {}), rounds)
    await client.delete(box.id)
    await podman.clear()
    rows = {f"{name}_p50_ms": quantile(values, 0.5) for name, values in found.items()}
    return rows | {"exec_p99_ms": quantile(found["exec"], 0.99)}


async def _rex_ways(theirs: RemoteRuntime) -> dict[str, Way]:
    from swerex.runtime.abstract import BashAction, Command, CreateBashSessionRequest

    await theirs.create_session(CreateBashSessionRequest())
    action, command = BashAction(command=true_program(), timeout=30), Command(command=["true"], timeout=30)
    return {
        "swerex_execute": Way(lambda: theirs.execute(command), times=TRAIN),
        "swerex_session": Way(lambda: theirs.run_in_session(action), every=6),
    }


async def bare() -> None:
    on_host(true_program())


# --- one sandbox at a time ------------------------------------------------------------------------------


async def creates(client: Client, podman: Podman, rounds: int) -> Rows:
    """Nothing is deleted in between: removals would be paid by whoever comes next."""
    await client.prefetch({"": WARM})

    async def idle() -> None:
        await _until_warm(client, WARM)

    ways = {
        "create_warm": Way(client.create, before=idle),
        "create": Way(lambda: client.create(COLD), before=idle),
        "podman_run": Way(lambda: podman.run("sleep", "86400"), before=idle),
    }
    theirs = {"swerex_create": Way(lambda: rex(podman), every=5, before=idle)} if has_rex() else {}
    found = await by_turns(ways | theirs, rounds)
    await client.prefetch({})
    await delete_all(client)
    await podman.clear()
    rows = {f"{name}_p50_ms": quantile(values, 0.5) for name, values in found.items()}
    return rows | {"create_p90_ms": quantile(found["create"], 0.9)}


async def lives(client: Client, times: int) -> Rows:
    """Made, used for one command and deleted, removal included."""

    async def whole(_: int) -> None:
        async with client.sandbox(COLD) as box:
            await box.exec(["true"])

    return {"creates_per_s": await per_second(whole, times, AT_ONCE)}


async def forks(client: Client, rounds: int) -> Rows:
    """Eight from one prepared state, until all of them run; also with containers that wait warm for them."""
    source = await client.create()
    prepare = "mkdir /prepared && cd /prepared && for i in $(seq 200); do echo $i > file-$i; done"
    await client.exec(source.id, wire.Exec(command=prepare, timeout_s=60))
    found: dict[str, list[float]] = {"fork8_ms": [], "fork8_warm_ms": []}
    for turn in range(2 * rounds):
        warm = FORKS if turn % 2 else 0
        await client.prefetch({"": warm})
        await _until_warm(client, warm)
        found["fork8_warm_ms" if warm else "fork8_ms"].append(
            await took(lambda: client.fork(source.id, FORKS))
        )
        await client.prefetch({})
        await delete_all(client, but=source.id)
    await client.delete(source.id)
    return {name: quantile(values, 0.5) for name, values in found.items()}


async def _until_warm(client: Client, number: int) -> None:
    while (await client.capacity()).warm_total != number:  # noqa: ASYNC110 - another process knows
        await asyncio.sleep(0.01)


async def delete_all(client: Client, but: str = "") -> None:
    boxes = [box.id for box in (await client.list()).sandboxes if box.id != but]
    await per_second(lambda n: client.delete(boxes[n]), len(boxes), AT_ONCE)
    for one in await client.snapshots():
        await client.delete_snapshot(one.id)


# --- many sandboxes -------------------------------------------------------------------------------------


async def crowd(served: Served, client: Client, seconds: float) -> Rows:
    """64 sandboxes: first as fast as they can, then as agents would use them, with pauses for thought."""
    ids = await fill(client, CROWD)
    body = TRUE.model_dump_json(exclude_none=True).encode()
    lines = [await Line.to_exec(served, one, body) for one in ids]
    flood = await _flood(lines, seconds)
    for line in lines:
        line.close()
    times = await asyncio.gather(*(_thinking(client, one, seconds) for one in ids))
    every = [value for one in times for value in one]
    rows = {"exec_p50_64_busy_ms": quantile(every, 0.5), "exec_p99_64_busy_ms": quantile(every, 0.99)}
    await delete_all(client)
    return flood | rows


async def _flood(lines: list[Line], seconds: float) -> Rows:
    times: list[float] = []
    until = time.perf_counter() + seconds

    async def work(line: Line) -> None:
        while time.perf_counter() < until:
            times.append(await took(line.ask))

    whole = await took(lambda: asyncio.gather(*map(work, lines)))
    return {"exec_per_s_64": round(len(times) / whole, 1), "exec_p99_64_flood_ms": quantile(times, 0.99)}


async def _thinking(client: Client, sandbox: str, seconds: float) -> list[float]:
    times: list[float] = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        await asyncio.sleep(random.uniform(*THINK_S))
        times.append(await took(lambda: client.exec(sandbox, TRUE)))
    return times


async def fill(client: Client, number: int) -> list[str]:
    """So many sandboxes more, made as many at a time as the server makes them."""
    ids: list[str] = []

    async def one(_: int) -> None:
        ids.append((await client.create()).id)

    await per_second(one, number, AT_ONCE)
    return ids


async def held(served: Served, client: Client, number: int, execs: int) -> Rows:
    """`held` is how many of them answered when all were there."""
    ids = await fill(client, number)
    done = await _answers(client, ids)
    rows: Rows = {"held": done, "server_rss_mib": served.rss_mib, "service_rss_mib": served.service_rss_mib}
    times = [await took(lambda: client.exec(random.choice(ids), TRUE)) for _ in range(execs)]
    agents = served.agents()
    rows["agent_rss_kib"] = round(statistics.median(map(resident_kib, agents[:: len(agents) // 16 or 1])))
    rows |= {"exec_p50_held_ms": quantile(times, 0.5), "exec_p99_held_ms": quantile(times, 0.99)}
    await delete_all(client)
    return rows


async def _answers(client: Client, ids: list[str]) -> int:
    good: list[bool] = []

    async def one(number: int) -> None:
        good.append((await client.exec(ids[number], TRUE)).ok)

    await per_second(one, len(ids), AT_ONCE)
    return sum(good)
