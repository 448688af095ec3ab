"""Processes that are followed while they run: output as it comes, stdin, terminals, signals, bounds."""

from __future__ import annotations

import asyncio
import signal

import pytest
from agentkit import Sandbox

from runtime_server.agent import AgentError, Chunk, Process


async def next_chunk(process: Process, offsets: tuple[int, int] = (0, 0)) -> Chunk:
    chunks = process.chunks(offsets)
    try:
        return await asyncio.wait_for(anext(chunks), 10)
    finally:
        await chunks.aclose()


async def text_of(process: Process) -> bytes:
    return b"".join([chunk.data async for chunk in process.chunks() if chunk.stream == 1])


async def test_output_comes_while_it_runs(sandbox: Sandbox) -> None:
    process = await sandbox.agent.spawn(
        ["sh", "-c", "echo first; read _; echo second >&2; exit 3"], stdin=True
    )
    assert await next_chunk(process) == Chunk(1, 0, b"first\n") and not process.ended
    await process.write(b"\n")
    assert [chunk async for chunk in process.chunks((6, 0))] == [Chunk(2, 0, b"second\n")]
    done = await process.wait()
    assert (done.exit_code, done.stdout.data, done.stderr.data) == (3, b"first\n", b"second\n")


async def test_any_number_of_readers_from_any_offset(sandbox: Sandbox) -> None:
    process = await sandbox.agent.spawn(["sh", "-c", "head -c 400000 /dev/zero; echo end"])
    whole, late = await asyncio.gather(text_of(process), anext(aiter(process.chunks((400_000, 0)))))
    assert len(whole) == 400_004 and late == Chunk(1, 400_000, b"end\n")


async def test_a_flood_is_bounded_and_keeps_head_and_tail(sandbox: Sandbox) -> None:
    script = "echo start; head -c 50000000 /dev/zero; echo end"
    process = await sandbox.agent.spawn(["sh", "-c", script], max_output=100_000)
    chunks = [chunk async for chunk in process.chunks()]
    done = await process.wait()
    assert done.stdout.total == 50_000_010 and len(done.stdout.data) <= 100_000
    assert done.stdout.data.startswith(b"start\n") and done.stdout.data.endswith(b"\0end\n")
    ends = [chunk.offset + len(chunk.data) for chunk in chunks]
    assert all(at <= chunk.offset for at, chunk in zip([0, *ends], chunks, strict=False))
    assert ends[-1] == done.stdout.total and sandbox.memory_kib() < 4096


async def test_nobody_has_to_read(sandbox: Sandbox) -> None:
    process = await sandbox.agent.spawn(["sh", "-c", "head -c 5000000 /dev/zero; echo x >&2"])
    done = await asyncio.wait_for(process.wait(), 20)
    assert done.stdout.total == 5_000_000 and done.stderr.data == b"x\n"


async def test_stdin_flows_at_the_speed_of_the_reader(sandbox: Sandbox) -> None:
    process = await sandbox.agent.spawn(["sh", "-c", "read go; wc -c"], stdin=True)
    writing = asyncio.create_task(process.write(b"go\n" + bytes(1_000_000)))
    await asyncio.wait_for(writing, 10)
    await process.close_stdin()
    assert (await process.wait()).stdout.data.strip() == b"1000000"


async def test_writing_to_what_takes_no_input(sandbox: Sandbox) -> None:
    deaf = await sandbox.agent.spawn(["sleep", "60"])
    with pytest.raises(AgentError, match="no more input"):
        await deaf.write(b"x")
    closed = await sandbox.agent.spawn(["sh", "-c", "exec <&-; sleep 60"], stdin=True)
    with pytest.raises(AgentError, match="no more input"):
        for _ in range(1000):
            await closed.write(bytes(1000))
            await sandbox.agent.ping()
    await deaf.kill()
    await closed.kill()


async def test_terminal(sandbox: Sandbox) -> None:
    script = "test -t 0 && test -t 1 && test -t 2 && stty size; cat; stty size"
    process = await sandbox.agent.spawn(["sh", "-c", script], pty=(100, 40))
    assert (await next_chunk(process)).data == b"40 100\r\n"
    await process.resize(80, 24)
    await process.write(b"typed\n")
    await process.close_stdin()
    done = await asyncio.wait_for(process.wait(), 10)
    assert done.exit_code == 0
    assert done.stdout.data == b"40 100\r\ntyped\r\ntyped\r\n24 80\r\n"


async def test_control_c_on_a_terminal(sandbox: Sandbox) -> None:
    process = await sandbox.agent.spawn(["sh", "-c", "echo ready; exec sleep 60"], pty=(80, 24))
    await next_chunk(process)
    await process.write(b"\x03")
    assert (await asyncio.wait_for(process.wait(), 10)).signal == signal.SIGINT


async def test_signals_reach_the_whole_tree(sandbox: Sandbox) -> None:
    script = "setsid sh -c 'trap \"echo child; exit\" USR1; echo up; while :; do sleep 0.02; done' & "
    process = await sandbox.agent.spawn(["sh", "-c", script + "trap 'echo root' USR1; wait; wait"])
    assert (await next_chunk(process)).data == b"up\n"
    await process.signal(signal.SIGUSR1)
    done = await asyncio.wait_for(process.wait(), 10)
    assert sorted(done.stdout.data.split()) == [b"child", b"root", b"up"]


async def test_kill_ends_setsid_children_too(sandbox: Sandbox) -> None:
    process = await sandbox.agent.spawn(["sh", "-c", "setsid sleep 777 & echo up; sleep 777"])
    await next_chunk(process)
    await process.kill()
    done = await process.wait()
    assert done.killed and done.exit_code == 137 and await sandbox.processes() == []


async def test_a_time_limit_is_kept(sandbox: Sandbox) -> None:
    process = await sandbox.agent.spawn(["sh", "-c", "echo x; setsid sleep 777 & sleep 777"], timeout_s=0.3)
    done = await asyncio.wait_for(process.wait(), 10)
    assert done.timed_out and done.stdout.data == b"x\n" and await sandbox.processes() == []


async def test_what_cannot_start(sandbox: Sandbox) -> None:
    with pytest.raises(AgentError, match="working directory"):
        await sandbox.agent.spawn(["true"], cwd="/nonexistent")
    missing = await sandbox.agent.spawn(["/no/such/program"])
    assert (await missing.wait()).exit_code == 127


async def test_many_at_once(sandbox: Sandbox) -> None:
    many = [await sandbox.agent.spawn(["sh", "-c", f"echo {n}; cat"], stdin=True) for n in range(50)]
    for process in many:
        await process.close_stdin()
    results = await asyncio.gather(*(process.wait() for process in many))
    assert [int(one.stdout.data) for one in results] == list(range(50))
