"""Processes that run by themselves, over HTTP: followed, come back to, fed, signalled, ended."""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing

import httpx
import pytest
from serverkit import Server, breaking

from runtime_server.client import BoundSandbox, Client
from runtime_server.client_running import RemoteProcess
from runtime_server.errors import SandboxError
from runtime_server.wire import Code, Exec, OutputChunk, StartProcess, Terminal

pytestmark = pytest.mark.container


async def text_of(process: RemoteProcess, **options: object) -> str:
    return "".join([chunk.data async for chunk in process.output(**options)])  # type: ignore[arg-type]


async def test_output_comes_while_it_runs(sandbox: BoundSandbox) -> None:
    process = await sandbox.start("echo one; read line; echo two $line >&2; exit 3", stdin=True)
    async with aclosing(process.output()) as output:
        first = await anext(output)
        assert (first.stream, first.offset, first.data) == ("stdout", 0, "one\n")
        assert (await sandbox.client.process(sandbox.id, process.number)).state == "running"
        await process.write("more\n")
        second = await anext(output)
        assert (second.stream, second.data) == ("stderr", "two more\n")
        assert [chunk async for chunk in output] == []
    ended = process.record
    assert (ended.state, ended.exit_code, ended.stdout_bytes, ended.stderr_bytes) == ("ended", 3, 4, 9)
    assert await process.wait() == ended
    listed = await sandbox.client.processes(sandbox.id)
    assert [one.number for one in listed.processes] == [process.number]


async def test_every_reader_gets_everything_and_may_begin_anywhere(sandbox: BoundSandbox) -> None:
    process = await sandbox.start("cat", stdin=True)
    readers = [asyncio.create_task(text_of(process)) for _ in range(3)]
    await process.write("".join(f"{n}\n" for n in range(1000)))
    await process.write("end\n", close=True)
    whole = "".join(f"{n}\n" for n in range(1000)) + "end\n"
    assert await asyncio.gather(*readers) == [whole] * 3
    assert await text_of(process, offset="3886,0") == whole[3886:]
    assert await text_of(process, offset="3890", stream="stdout", follow=False) == whole[3890:]
    assert await text_of(process, stream="stderr") == ""


async def test_a_dropped_connection_goes_on_where_it_was(server: Server, sandbox: BoundSandbox) -> None:
    process = await sandbox.start("for n in $(seq 40); do echo line $n; read go; done", stdin=True)
    async with Client(server.url, server.key) as client:
        client._http = transport = breaking(after=4)
        got: list[OutputChunk] = []
        async for chunk in RemoteProcess(client, sandbox.id, process.record).output():
            got.append(chunk)
            await process.write("\n")
    assert "".join(chunk.data for chunk in got) == "".join(f"line {n}\n" for n in range(1, 41))
    assert transport.calls > 3
    ends = [chunk.offset + chunk.size for chunk in got]
    assert [chunk.offset for chunk in got] == [0, *ends[:-1]] and not any(c.dropped for c in got)


async def test_server_sent_events_resume_by_their_ids(server: Server, sandbox: BoundSandbox) -> None:
    process = await sandbox.start("echo one; echo two >&2; sleep 0.3; echo three")
    await process.wait()
    url = f"{server.url}/v1/sandboxes/{sandbox.id}/processes/{process.number}/output?follow=true"
    headers = {"X-API-Key": server.key, "Accept": "text/event-stream"}
    async with httpx.AsyncClient(timeout=20) as raw:
        whole = await raw.get(url, headers=headers)
        assert whole.headers["content-type"].startswith("text/event-stream")
        events = [_fields(one) for one in _frames(whole.text)]
        assert [e["event"] for e in events] == ["output", "output", "end"]
        assert events[-1]["id"] == "10,4"
        assert json.loads(events[0]["data"])["data"] == "one\nthree\n"
        rest = await raw.get(url, headers={**headers, "Last-Event-ID": "4,4"})
        assert [json.loads(e["data"]).get("data") for e in map(_fields, _frames(rest.text))] == [
            "three\n",
            None,
        ]


def _fields(frame: str) -> dict[str, str]:
    return dict(line.split(": ", 1) for line in frame.split("\n"))  # type: ignore[misc]


def _frames(text: str) -> list[str]:
    return [one for one in text.split("\n\n") if one and not one.startswith(":")]


async def test_a_character_is_never_split(sandbox: BoundSandbox) -> None:
    script = r"printf 'a\303'; read x; printf '\244b\342\202'; read x; printf '\254'; printf '\377z' >&2"
    process = await sandbox.start(script, stdin=True)
    async with aclosing(process.output()) as output:
        assert (await anext(output)).data == "a"
        await process.write("\n")
        assert (await anext(output)).data == "äb"
        await process.write("\n")
        rest = [chunk async for chunk in output]
    assert {(c.stream, c.encoding, c.raw) for c in rest} == {
        ("stdout", "utf-8", "€".encode()),
        ("stderr", "base64", b"\xffz"),
    }


async def test_a_fast_writer_does_not_wait_for_a_slow_reader(sandbox: BoundSandbox) -> None:
    process = await sandbox.start("head -c 300000000 /dev/zero | tr '\\0' x", max_output=1 << 20)
    at = dropped = 0
    async with aclosing(process.output()) as output:
        first = await anext(output)
        at = first.size
        ended = await sandbox.client.process(sandbox.id, process.number, 60)
        assert (ended.state, ended.stdout_bytes) == ("ended", 300_000_000)
        async for chunk in output:
            assert chunk.offset == at + chunk.dropped
            at, dropped = chunk.offset + chunk.size, dropped + chunk.dropped
    assert at == 300_000_000 and dropped > 200_000_000


async def test_a_terminal(sandbox: BoundSandbox) -> None:
    script = "stty size; read x; stty size; echo got $x"
    process = await sandbox.start(script, pty=Terminal(columns=90, rows=20))
    async with aclosing(process.output()) as output:
        assert (await anext(output)).data == "20 90\r\n"
        await process.resize(100, 30)
        await process.write("yes\n")
        text = "".join([chunk.data async for chunk in output])
    assert "30 100\r\n" in text and "got yes\r\n" in text


async def test_a_signal_reaches_children_that_left_the_session(sandbox: BoundSandbox) -> None:
    script = "setsid sh -c 'trap \"echo heard; exit 0\" USR1; echo ready; while :; do sleep 0.1; done'"
    process = await sandbox.start(f"trap : USR1; {script}; echo over")
    async with aclosing(process.output()) as output:
        assert (await anext(output)).data == "ready\n"
        await process.signal("SIGUSR1")
        assert "heard" in "".join([chunk.data async for chunk in output])


async def test_deleting_ends_the_whole_tree(sandbox: BoundSandbox) -> None:
    process = await sandbox.start("setsid sleep 1000 & echo up; sleep 1000")
    async with aclosing(process.output()) as output:
        await anext(output)
    await process.delete()
    await process.delete()
    assert (await sandbox.exec("pgrep -c sleep")).stdout.text == "0\n"
    with pytest.raises(SandboxError) as failed:
        await sandbox.client.process(sandbox.id, process.number)
    assert failed.value.code == Code.PROCESS_NOT_FOUND


async def test_a_time_limit(sandbox: BoundSandbox) -> None:
    process = await sandbox.start("echo begun; sleep 1000", timeout_s=0.3)
    ended = await process.wait()
    assert ended.timed_out and ended.exit_code == 124
    assert await text_of(process) == "begun\n"


async def test_what_cannot_be_done_has_a_code(sandbox: BoundSandbox) -> None:
    silent = await sandbox.start("sleep 1000")
    for code, call in (
        (Code.INPUT_CLOSED, silent.write("x")),
        (Code.FILE_NOT_FOUND, sandbox.start("true", cwd="/no/such")),
        (Code.PROCESS_NOT_FOUND, sandbox.client.process(sandbox.id, 4_000_000)),
    ):
        with pytest.raises(SandboxError) as failed:
            await call
        assert failed.value.code == code


async def test_a_sandbox_that_is_deleted_says_so_to_those_who_follow(client: Client) -> None:
    async with client.sandbox() as sandbox:
        process = await sandbox.start("echo up; sleep 1000")
        async with aclosing(process.output()) as output:
            await anext(output)
            await sandbox.delete()
            with pytest.raises(SandboxError) as failed:
                await anext(output)
    assert failed.value.code == Code.SANDBOX_NOT_FOUND


async def test_a_repeated_call_has_one_effect(server: Server, sandbox: BoundSandbox) -> None:
    base = f"{server.url}/v1/sandboxes/{sandbox.id}"
    headers = {"X-API-Key": server.key, "Idempotency-Key": f"k-{sandbox.id}"}
    body = StartProcess(command="echo x >> /tmp/starts; sleep 1000").model_dump(exclude_none=True)
    async with httpx.AsyncClient(timeout=20, headers=headers) as raw:
        answers = await asyncio.gather(*(raw.post(f"{base}/processes", json=body) for _ in range(5)))
        again = await raw.post(f"{base}/processes", json=body)
        other = await raw.post(f"{base}/processes", json={"command": "true"})
        bad = await raw.post(f"{base}/processes", json=body, headers={"Idempotency-Key": "x" * 201})
    assert {a.status_code for a in [*answers, again]} == {201}
    assert {a.json()["number"] for a in [*answers, again]} == {again.json()["number"]}
    assert (other.status_code, bad.status_code) == (400, 400)
    assert (await sandbox.exec("cat /tmp/starts")).stdout.text == "x\n"


async def test_a_command_with_a_key_outlives_a_client_that_hangs_up(
    server: Server, sandbox: BoundSandbox
) -> None:
    url, key = f"{server.url}/v1/sandboxes/{sandbox.id}/exec", {"Idempotency-Key": f"e-{sandbox.id}"}
    body = Exec(command="echo x >> /tmp/runs; sleep 1; echo done", timeout_s=30).model_dump(exclude_none=True)
    with pytest.raises(httpx.ReadTimeout):
        async with httpx.AsyncClient(timeout=0.3) as raw:
            await raw.post(url, json=body, headers={"X-API-Key": server.key, **key})
    async with httpx.AsyncClient(timeout=20) as raw:
        again = await raw.post(url, json=body, headers={"X-API-Key": server.key, **key})
    assert again.json()["stdout"]["data"] == "done\n"
    assert (await sandbox.exec("cat /tmp/runs")).stdout.text == "x\n"


async def test_a_server_that_stops_says_so_to_those_who_follow() -> None:
    stopping = Server.start()
    try:
        async with stopping.client() as client, client.sandbox() as sandbox:
            process = await sandbox.start("echo up; sleep 1000")
            async with aclosing(process.output()) as output:
                await anext(output)
                stopping.process.terminate()
                with pytest.raises(SandboxError) as failed:
                    await anext(output)
            assert failed.value.code == Code.SERVER_DRAINING and failed.value.infrastructure
            with pytest.raises(SandboxError) as failed:
                await process.write("x")
            assert failed.value.code in (Code.SERVER_DRAINING, Code.UNREACHABLE)
    finally:
        assert stopping.stop() == 0
