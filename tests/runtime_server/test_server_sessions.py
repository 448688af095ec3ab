"""Shells that stay, over HTTP: their state, their output, how they are interrupted and how they end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing

import httpx
import pytest
from serverkit import Server, breaking

from runtime_server.client import BoundSandbox, Client
from runtime_server.client_running import RemoteSession
from runtime_server.errors import SandboxError
from runtime_server.wire import Code, OpenSession, OutputEnd, OutputStarted, Run, Terminal

pytestmark = pytest.mark.container


@pytest.fixture
async def session(sandbox: BoundSandbox) -> AsyncIterator[RemoteSession]:
    async with sandbox.session() as session:
        yield session


async def busy(session: RemoteSession) -> None:
    """Until it runs a command."""
    deadline = time.monotonic() + 20
    while (await session.calls.session(session.sandbox, session.name)).state != "running":
        assert time.monotonic() < deadline


async def test_state_stays(session: RemoteSession) -> None:
    await session.run("cd /usr; export A=1; b=2; f() { echo f $1; }; sleep 1000 &")
    result = await session.run("pwd; sh -c 'echo $A'; echo $b; f x; jobs | wc -l; echo err >&2; (exit 7)")
    assert (result.stdout.text, result.stderr.text) == ("/usr\n1\n2\nf x\n1\n", "err\n")
    assert (result.exit_code, result.command, result.ended, result.running) == (7, 2, False, False)


async def test_several_at_once_know_nothing_of_each_other(sandbox: BoundSandbox) -> None:
    async with sandbox.session() as one, sandbox.session(OpenSession(name="other", cwd="/usr")) as two:
        results = await asyncio.gather(one.run("x=1; sleep 0.3; echo $x"), two.run("x=2; pwd; echo $x"))
        assert [r.stdout.text for r in results] == ["1\n", "/usr\n2\n"]
        names = [s.name for s in (await sandbox.client.sessions(sandbox.id)).sessions]
        assert names == ["s1", "other"]
        with pytest.raises(SandboxError) as failed:
            await sandbox.client.open_session(sandbox.id, OpenSession(name="other"))
        assert failed.value.code == Code.SESSION_EXISTS
    assert (await sandbox.client.sessions(sandbox.id)).sessions == []


async def test_a_syntax_error_is_a_result(session: RemoteSession) -> None:
    result = await session.run("if then (")
    assert result.exit_code == 2 and "syntax error" in result.stderr.text and not result.ended
    assert (await session.run("echo fine")).stdout.text == "fine\n"


async def test_exit_ends_the_session_and_says_so_afterwards(session: RemoteSession) -> None:
    result = await session.run("echo bye; exit 3")
    assert (result.stdout.text, result.exit_code, result.ended) == ("bye\n", 3, True)
    record = await session.calls.session(session.sandbox, session.name)
    assert (record.state, record.exit_code, record.commands) == ("ended", 3, 1)
    with pytest.raises(SandboxError) as failed:
        await session.run("echo")
    assert (failed.value.code, failed.value.detail) == (Code.SESSION_ENDED, {"exit_code": 3})


async def test_a_timeout_kills_the_command_and_keeps_the_session(session: RemoteSession) -> None:
    result = await session.run("x=kept; echo begun; setsid sleep 1000 & sleep 1000", timeout_s=0.5)
    assert result.timed_out and result.exit_code == 124 and result.stdout.text == "begun\n"
    assert (await session.run("echo $x; pgrep -c sleep")).stdout.text == "kept\n0\n"


async def test_what_is_left_goes_on(session: RemoteSession) -> None:
    left = await session.run("echo one; read x; echo two $x", timeout_s=0.3, on_timeout="leave", stdin=True)
    assert left.running and left.timed_out and left.stdout.text == "one\n"
    with pytest.raises(SandboxError) as failed:
        await session.run("echo")
    assert failed.value.code == Code.SESSION_BUSY
    again = await session.rest(timeout_s=0.2)
    assert again.running
    await session.send("line\n")
    rest = await session.rest(timeout_s=20)
    assert (rest.stdout.text, rest.exit_code, rest.running) == ("one\ntwo line\n", 0, False)
    assert (await session.run("echo free")).stdout.text == "free\n"


async def test_interrupting(session: RemoteSession) -> None:
    assert await session.interrupt() is None
    running = asyncio.create_task(session.run("echo begun; sleep 1000"))
    await busy(session)
    stopped = await session.interrupt()
    assert stopped is not None and stopped.exit_code == 130
    assert (await running).exit_code == 130
    stubborn = asyncio.create_task(session.run("sh -c \"trap '' INT; while :; do sleep 1; done\""))
    await busy(session)
    stopped = await session.interrupt(0.2)
    assert stopped is not None and stopped.exit_code != 0
    await stubborn
    assert (await session.run("echo usable")).stdout.text == "usable\n"


async def test_output_comes_while_it_runs_and_the_result_after_it(session: RemoteSession) -> None:
    got = []
    async with aclosing(
        session.stream("echo one; touch /tmp/go; sleep 0.3; echo two >&2; (exit 4)")
    ) as output:
        async for chunk in output:
            got.append((chunk.stream, chunk.offset, chunk.data))
            assert session.result is None
    assert got == [("stdout", 0, "one\n"), ("stderr", 0, "two\n")]
    assert session.result is not None and session.result.exit_code == 4
    assert [chunk async for chunk in session.stream("true")] == []
    assert session.result.ok and session.result.command == 2


async def test_a_dropped_stream_goes_on_where_it_was(server: Server, session: RemoteSession) -> None:
    async with Client(server.url, server.key) as client:
        client._http = transport = breaking(after=3)
        other = RemoteSession(client, session.sandbox, session.record)
        script = "for n in $(seq 12); do echo line $n; sleep 0.1; done"
        chunks = [chunk async for chunk in other.stream(script, timeout_s=30)]
    assert "".join(chunk.data for chunk in chunks) == "".join(f"line {n}\n" for n in range(1, 13))
    assert other.result is not None and other.result.ok and other.result.command == 1
    assert transport.calls > 2


async def test_hanging_up_ends_the_command_of_a_stream(server: Server, session: RemoteSession) -> None:
    url = f"{server.url}/v1/sandboxes/{session.sandbox}/sessions/{session.name}/run"
    body = Run(command="echo up; sleep 1000", stream=True).model_dump(exclude_none=True)
    async with (
        httpx.AsyncClient(timeout=20, headers={"X-API-Key": server.key}) as raw,
        raw.stream("POST", url, json=body) as response,
    ):
        assert response.headers["content-type"] == "application/x-ndjson"
        lines = response.aiter_lines()
        assert OutputStarted.model_validate_json(await anext(lines)).command == 1
        assert "up" in await anext(lines)
    assert (await session.run("pgrep -c sleep", timeout_s=10)).stdout.text == "0\n"


async def test_hanging_up_leaves_what_is_to_be_left(server: Server, session: RemoteSession) -> None:
    base = f"{server.url}/v1/sandboxes/{session.sandbox}/sessions/{session.name}"
    body = Run(command="read x; echo got $x", on_timeout="leave", stdin=True).model_dump(exclude_none=True)
    headers = {"X-API-Key": server.key}
    with pytest.raises(httpx.ReadTimeout):
        async with httpx.AsyncClient(timeout=0.5, headers=headers) as raw:
            await raw.post(f"{base}/run", json=body)
    assert (await session.calls.session(session.sandbox, session.name)).state == "running"
    await session.send(b"more\n")
    async with httpx.AsyncClient(timeout=20, headers=headers) as raw:
        said = (await raw.get(f"{base}/output?follow=true")).text.splitlines()
    assert '"data":"got more\\n"' in said[0]
    result = OutputEnd.model_validate_json(said[-1]).result
    assert result is not None and result.ok and result.command == 1


async def test_a_session_on_a_terminal(sandbox: BoundSandbox) -> None:
    async with sandbox.session(OpenSession(pty=Terminal(columns=77, rows=11))) as session:
        assert (await session.run("stty size; tty")).stdout.text.startswith("11 77\n/dev/pts/")
        await session.resize(78, 12)
        assert (await session.run("stty size")).stdout.text == "12 78\n"


async def test_what_cannot_be_done_has_a_code(sandbox: BoundSandbox, session: RemoteSession) -> None:
    calls, nobody = sandbox.client, RemoteSession(sandbox.client, sandbox.id, session.record)
    nobody.record = session.record.model_copy(update={"name": "nobody"})
    for code, call in (
        (Code.SESSION_NOT_FOUND, nobody.run("true")),
        (Code.INPUT_CLOSED, session.send("x")),
        (Code.BAD_REQUEST, session.rest()),
        (Code.FILE_NOT_FOUND, calls.open_session(sandbox.id, OpenSession(cwd="/no/such"))),
        (Code.BAD_REQUEST, calls.run(sandbox.id, "not/a-name", Run(command="true"))),
    ):
        with pytest.raises(SandboxError) as failed:
            await call
        assert failed.value.code in (code, Code.NOT_FOUND), code
    await nobody.close()
