"""The connection: who may connect, what breaks it, how it comes back, and what happens when it does not."""

from __future__ import annotations

import asyncio
import random
import struct
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from agentkit import Sandbox, namespace_command, running

from runtime_server.agent import AgentListener, AgentLost
from runtime_server.agent.frames import PROTOCOL, Kind, frame

HELLO = frame(Kind.HELLO, 0, struct.pack("<III", PROTOCOL, 10, 0))


async def test_ping(sandbox: Sandbox) -> None:
    assert 0 < await sandbox.agent.ping() < 1


async def test_losing_the_agent_fails_pending_calls(sandbox: Sandbox) -> None:
    pending = asyncio.create_task(sandbox.run("sleep", "60"))
    await sandbox.agent.ping()
    sandbox.process.kill()
    with pytest.raises(AgentLost):
        await asyncio.wait_for(pending, 5)
    with pytest.raises(AgentLost):
        await sandbox.run("true")
    assert sandbox.agent.closed


async def test_reconnects_and_tells_what_still_runs(sandbox: Sandbox) -> None:
    pending = asyncio.create_task(sandbox.run("sleep", "60"))
    await sandbox.agent.ping()
    await sandbox.agent.close()
    with pytest.raises(AgentLost):
        await pending
    await sandbox.reconnected()
    assert len(sandbox.agent.running) == 1
    assert await sandbox.settles("sleep 60")
    await sandbox.agent.kill_all()
    assert await sandbox.processes() == []


async def test_connection_may_break_at_any_moment(sandbox: Sandbox) -> None:
    chance = random.Random(1)
    for _ in range(40):
        calls = [asyncio.create_task(sandbox.sh("head -c 300000 /dev/zero")) for _ in range(3)]
        calls.append(asyncio.create_task(sandbox.run("cat", stdin=bytes(500_000))))
        await asyncio.wait(calls, timeout=chance.random() * 0.01)
        await sandbox.agent.close()
        await asyncio.gather(*calls, return_exceptions=True)
        await sandbox.reconnected()
    assert (await sandbox.run("echo", "alive")).stdout.data == b"alive\n"
    assert await sandbox.settles()


async def test_detached_command_still_times_out(sandbox: Sandbox) -> None:
    pending = asyncio.create_task(sandbox.run("sleep", "60", timeout_s=1))
    await sandbox.agent.ping()
    await sandbox.agent.close()
    await asyncio.wait([pending])
    await sandbox.reconnected()
    assert await sandbox.settles()


async def test_orphan_ends_itself(binary: Path) -> None:
    async with running(binary, "--orphan-timeout", "1") as sandbox:
        await sandbox.sh("setsid sleep 777 &")
        await sandbox.agent.close()
        started = time.monotonic()
        assert await asyncio.wait_for(sandbox.process.wait(), 10) == 0
        assert 0.5 < time.monotonic() - started < 5


async def test_agent_that_never_finds_a_server_ends(binary: Path, tmp_path: Path) -> None:
    line = [*namespace_command(), str(binary), "--orphan-timeout", "1", str(tmp_path / "none.sock")]
    process = await asyncio.create_subprocess_exec(*line)
    assert await asyncio.wait_for(process.wait(), 10) == 0


@pytest.mark.parametrize("options", [["x.sock"], [], ["--orphan-timeout", "0", "x"], ["--what", "1", "x"]])
async def test_wrong_command_lines(binary: Path, options: list[str]) -> None:
    process = await asyncio.create_subprocess_exec(
        str(binary), *options, stderr=asyncio.subprocess.PIPE, cwd="/"
    )
    _, said = await asyncio.wait_for(process.communicate(), 5)
    assert process.returncode == 2 and b"agent" in said


async def test_listener_takes_only_the_right_process(tmp_path: Path) -> None:
    listener = AgentListener(tmp_path / "a.sock")
    await listener.start()
    _, writer = await asyncio.open_unix_connection(str(listener.path))
    writer.write(HELLO)
    with pytest.raises(AgentLost, match="did not connect"):
        await listener.accept(1, 0.3)
    await listener.close()
    assert not listener.path.exists()
    writer.close()


async def test_socket_is_gone_once_the_agent_is_in(sandbox: Sandbox) -> None:
    assert not sandbox.listener.path.exists()


def test_path_too_long_for_a_socket() -> None:
    with pytest.raises(ValueError, match="107"):
        AgentListener(Path("/tmp") / ("x" * 120))


FORGED = {
    "too long": struct.pack("<I", 1 << 30),
    "too short": struct.pack("<IB", 1, 70),
    "unknown kind": frame(Kind.HELLO, 1),
    "unknown id": frame(Kind.DONE, 77, bytes(8)),
    "more output than asked for": frame(Kind.OUTPUT, 1, b"\1" + b"x" * 11),
    "unknown stream": frame(Kind.OUTPUT, 1, b"\3x"),
    "wrong answer": frame(Kind.DONE, 1, bytes(8)),
    "malformed result": frame(Kind.FINISHED, 1, b"x"),
    "exit code out of range": frame(Kind.FINISHED, 1, struct.pack("<IBBQQIQI", 256, 0, 0, 0, 0, 0, 0, 0)),
    "output it did not send": frame(Kind.FINISHED, 1, struct.pack("<IBBQQIQI", 0, 0, 0, 0, 9, 9, 0, 0)),
    "credit for nothing": frame(Kind.CREDIT, 1, struct.pack("<I", 1)),
    "malformed failure": frame(Kind.FAILED, 1, b"x"),
}


@pytest.mark.parametrize("name", FORGED)
async def test_server_hangs_up_on_a_forging_agent(tmp_path: Path, name: str) -> None:
    listener = AgentListener(tmp_path / "a.sock")
    await listener.start()
    reader, writer = await asyncio.open_unix_connection(str(listener.path))
    writer.write(HELLO)
    agent = await listener.accept(None, 5)
    call = asyncio.create_task(agent.exec(["x"], cwd=None, env={}, stdin=None, timeout_s=5, max_output=10))
    while not (await reader.read(1 << 16)).endswith(b"x\0"):
        pass
    writer.write(FORGED[name])
    with pytest.raises(AgentLost):
        await asyncio.wait_for(call, 5)
    assert agent.closed
    writer.close()


@pytest.mark.parametrize("greeting", [b"x" * 100, frame(Kind.DONE, 0), frame(Kind.HELLO, 0, bytes(12))])
async def test_server_ignores_a_peer_that_does_not_greet(tmp_path: Path, greeting: bytes) -> None:
    listener = AgentListener(tmp_path / "a.sock")
    await listener.start()
    _, bad = await asyncio.open_unix_connection(str(listener.path))
    bad.write(greeting)
    _, good = await asyncio.open_unix_connection(str(listener.path))
    good.write(HELLO)
    agent = await listener.accept(None, 5)
    assert agent.max_commands == 10
    await agent.close()
    bad.close()
    good.close()


GARBAGE: dict[str, Callable[[], bytes]] = {
    "too long": lambda: struct.pack("<I", 1 << 24),
    "too short": lambda: struct.pack("<I", 4) + b"xxxx",
    "unknown kind": lambda: frame(Kind.HELLO, 5),
    "second welcome": lambda: frame(Kind.WELCOME, 0, struct.pack("<I", PROTOCOL)),
    "text": lambda: b"GET / HTTP/1.1\r\n\r\n",
    "too much stdin": lambda: (
        frame(Kind.EXEC, 9, struct.pack("<BIIIIII", 1, 5000, 10, 0, 0, 2, 0) + b"\0\0sleep\x0060\0")
        + frame(Kind.DATA, 9, bytes(100_000)) * 3
    ),
}


@pytest.mark.parametrize("name", GARBAGE)
async def test_agent_hangs_up_on_garbage_and_comes_back(sandbox: Sandbox, name: str) -> None:
    sandbox.agent._wire.send(GARBAGE[name]())
    await asyncio.wait_for(sandbox.agent.wait_closed(), 5)
    await sandbox.reconnected()
    assert (await sandbox.run("echo", "alive")).stdout.data == b"alive\n"


MALFORMED = [
    (Kind.EXEC, b""),
    (Kind.EXEC, struct.pack("<BIIIIII", 0, 0, 10, 0, 0, 1, 0) + b"\0\0unterminated"),
    (Kind.EXEC, struct.pack("<BIIIIII", 0, 0, 10, 0, 0, 0xFFFFFFFF, 0) + b"\0\0x\0"),
    (Kind.EXEC, struct.pack("<BIIIIII", 0, 0, 10, 0, 0, 1, 1) + b"\0\0x\0noequals\0"),
    (Kind.EXEC, struct.pack("<BIIIIII", 0, 0, 10, 0, 0, 1, 0) + b"\0\0x\0more\0"),
    (Kind.WRITE, b"\0" * 5),
    (Kind.WRITE, b"\0" * 13 + b"/tmp/x"),
    (Kind.READ, b"\0" * 8),
    (Kind.READ, b"\0" * 8 + b"/x\0/y\0"),
]


@pytest.mark.parametrize(("kind", "payload"), MALFORMED)
async def test_malformed_requests_are_answered(sandbox: Sandbox, kind: Kind, payload: bytes) -> None:
    answer: Awaitable[object] = sandbox.agent._call(kind, payload, "forged", 0, 5)
    with pytest.raises(Exception, match="malformed"):
        await answer
    assert (await sandbox.run("echo", "alive")).stdout.data == b"alive\n"


async def test_server_that_stops_reading_costs_no_memory(sandbox: Sandbox) -> None:
    transport = sandbox.agent._wire.transport
    assert transport is not None
    transport.pause_reading()
    calls = [
        asyncio.create_task(sandbox.sh("head -c 300000 /dev/zero", timeout_s=5, max_output=1 << 16))
        for _ in range(100)
    ]
    pings = [asyncio.create_task(sandbox.agent.ping()) for _ in range(300)]
    await asyncio.sleep(1)  # the time in which memory would grow
    assert not any(one.done() for one in [*calls, *pings]) and sandbox.memory_kib() < 16_384
    transport.resume_reading()
    assert {one.stdout.total for one in await asyncio.gather(*calls)} == {300_000}
    await asyncio.gather(*pings)
