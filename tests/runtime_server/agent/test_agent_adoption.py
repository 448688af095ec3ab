"""A server that is gone and comes back finds what it had started, and what it has not been told."""

from __future__ import annotations

import asyncio

import pytest
from agentkit import Sandbox

from runtime_server.agent import AgentError, AgentLost, Process, Session
from runtime_server.agent.frames import hello_from


async def come_back(sandbox: Sandbox) -> None:
    await sandbox.agent.close()
    await sandbox.reconnected()


async def whole(process: Process, offsets: tuple[int, int] | None = None) -> list[bytes]:
    streams = [b"", b""]
    async for chunk in process.chunks(offsets):
        streams[chunk.stream - 1] += chunk.data
    return streams


async def test_a_process_goes_on_and_is_followed_from_where_it_was(sandbox: Sandbox) -> None:
    process = await sandbox.agent.spawn(
        ["sh", "-c", "echo one; read x; echo two $x; echo err >&2; exit 5"], stdin=True, tag="mine"
    )
    await asyncio.wait_for(anext(aiter(process.chunks())), 10)
    await come_back(sandbox)
    with pytest.raises(AgentLost):
        await process.wait()
    (known,) = sandbox.agent.running.values()
    assert (known.number, known.kind, known.ended, known.tag) == (process.number, "process", False, "mine")
    process = await sandbox.agent.attach(process.number, (4, 0))
    await process.write(b"back\n")
    assert await whole(process) == [b"two back\n", b"err\n"]
    done = await process.wait()
    assert (done.exit_code, done.stdout.data) == (5, b"one\ntwo back\n")


async def test_results_of_what_ended_meanwhile_are_kept_until_told(sandbox: Sandbox) -> None:
    lost = asyncio.create_task(sandbox.sh("sleep 0.3; head -c 300000 /dev/zero; exit 4"))
    await sandbox.agent.ping()
    await sandbox.agent.close()
    await asyncio.wait([lost])
    await asyncio.sleep(0.6)  # nobody is connected while it ends
    await sandbox.reconnected()
    (known,) = sandbox.agent.running.values()
    assert known.kind == "exec" and known.ended
    done = await (await sandbox.agent.attach(known.number)).wait()
    assert (done.exit_code, done.stdout.total, len(done.stdout.data)) == (4, 300_000, 300_000)
    await come_back(sandbox)
    assert sandbox.agent.running == {}


async def test_a_tagged_result_outlives_its_telling_until_released(sandbox: Sandbox) -> None:
    command = ["sh", "-c", "echo result; exit 6"]
    await sandbox.agent.exec(command, cwd=None, env={}, stdin=None, timeout_s=5, max_output=10, tag="key-1")
    for _ in range(2):
        await come_back(sandbox)
        (known,) = sandbox.agent.running.values()
        assert known.tag == "key-1" and known.ended
        done = await (await sandbox.agent.attach(known.number)).wait()
        assert (done.exit_code, done.stdout.data) == (6, b"result\n")
    await sandbox.agent.release("key-1")
    with pytest.raises(AgentError, match="no such command"):
        await sandbox.agent.attach(known.number)
    await come_back(sandbox)
    assert not sandbox.agent.running


async def test_kept_results_are_bounded(sandbox: Sandbox) -> None:
    before = sandbox.memory_kib()
    for n in range(100):
        await sandbox.agent.exec(
            ["sh", "-c", f"echo {n}; head -c 1000000 /dev/zero"],
            cwd=None,
            env={},
            stdin=None,
            timeout_s=20,
            max_output=1 << 20,
            tag=f"t{n}",
        )
    assert sandbox.memory_kib() - before < 16_000
    await come_back(sandbox)
    tags = {one.tag for one in sandbox.agent.running.values()}
    assert "t99" in tags and "t0" not in tags and len(tags) <= 64


async def test_a_session_is_picked_up_with_its_state_and_its_command(sandbox: Sandbox) -> None:
    session = await sandbox.agent.open_session(tag="main")
    await session.run("cd /tmp; x=kept", timeout_s=5)
    running = asyncio.create_task(
        session.run("echo before; sleep 0.5; echo after", timeout_s=60, on_timeout="leave")
    )
    await sandbox.agent.ping()
    await sandbox.agent.close()
    with pytest.raises(AgentLost):
        await running
    await sandbox.reconnected()
    kinds = {one.kind: one for one in sandbox.agent.running.values()}
    assert kinds["session"].tag == "main" and kinds["run"].session == session.number
    adopted: Session = await sandbox.agent.attach_session(session.number)
    assert adopted.running is not None
    assert (await adopted.rest(20)).stdout.data == b"before\nafter\n"
    assert (await adopted.run('echo "$PWD $x"', timeout_s=5)).stdout.data == b"/tmp kept\n"
    await adopted.close()
    await come_back(sandbox)
    assert not [one for one in sandbox.agent.running.values() if one.kind == "session" and not one.ended]


async def test_a_command_of_a_session_that_ended_meanwhile(sandbox: Sandbox) -> None:
    session = await sandbox.agent.open_session()
    running = asyncio.create_task(session.run("sleep 0.2; echo done; false", timeout_s=60))
    await sandbox.agent.ping()
    await sandbox.agent.close()
    await asyncio.wait([running])
    await asyncio.sleep(0.5)
    await sandbox.reconnected()
    adopted = await sandbox.agent.attach_session(session.number)
    done = await adopted.rest(5)
    assert (done.exit_code, done.stdout.data) == (1, b"done\n")
    assert (await adopted.run("echo next", timeout_s=5)).stdout.data == b"next\n"


async def test_what_is_not_there_cannot_be_attached(sandbox: Sandbox) -> None:
    with pytest.raises(AgentError, match="no such command"):
        await sandbox.agent.attach(4711)
    with pytest.raises(AgentError, match="no such command"):
        await sandbox.agent.attach_session(4711)
    process = await sandbox.agent.spawn(["sleep", "60"])
    with pytest.raises(AgentError, match="already"):
        await sandbox.agent.attach(process.number)
    await process.kill()


GREETING = b"\x02\0\0\0\x0a\0\0\0\x01\0\0\0"
LIES = [
    GREETING,
    GREETING + b"\x05\0\0\0\0\0\0\0\x01\0untagged",
    GREETING + b"\x05\0\0\0\0\0\0\0\x09\0\0",
    GREETING + b"\x05\0\0\0\0\0\0\0\x00\0\0",
    GREETING + b"\x05\0\0\0\0\0\0\0\x01\0" + b"x" * 100 + b"\0",
    GREETING + b"\x05\0\0\0\0\0\0\0\x01\0\0more",
    GREETING[:8] + b"\xff\xff\xff\xff",
]


@pytest.mark.parametrize("greeting", LIES)
def test_a_lying_greeting_is_refused(greeting: bytes) -> None:
    with pytest.raises(AgentLost, match="malformed"):
        hello_from(greeting)
