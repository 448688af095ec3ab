"""A server that is killed and started again finds its sandboxes: real processes, real Podman."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serverkit import Server, state_of, traces, until

from runtime_server.client import Client
from runtime_server.engines import processes
from runtime_server.errors import SandboxError
from runtime_server.wire import Code, CreateSandbox, Exec

pytestmark = pytest.mark.container


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short, for sockets live below it."""
    path = Path(tempfile.mkdtemp(prefix="orc-t-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def _start(folder: Path) -> Server:
    return Server.start("--state-dir", str(folder))


def _state(folder: Path) -> list[Path]:
    return [*folder.glob("orc-*")]


async def _says(client: Client, sandbox: str, command: str) -> str:
    return (await client.exec(sandbox, Exec(command=command, timeout_s=20))).stdout.text.strip()


async def test_a_killed_server_loses_no_sandbox(folder: Path) -> None:
    first = _start(folder)
    wanted = CreateSandbox(labels={"a": "b"}, env={"WHO": "me"}, workdir="/work", ttl_s=500)
    async with first.client() as client:
        made = await client.create(wanted, key="the-key")
        other = await client.create(CreateSandbox(max_lifetime_s=1000))
        gone = await client.create()
        await client.delete(gone.id)
        assert await _says(client, made.id, "(sleep 300 &) ; echo kept > kept; renice 1 $$ >/dev/null") == ""
        await client.renew(made.id, 700)
        taken = await client.snapshot(made.id)
        await client.pause(other.id)
        await client.prefetch({made.image: 2})
    assert first.stop(signal.SIGKILL) == -signal.SIGKILL
    (state,) = _state(folder)
    second = _start(folder)
    try:
        assert _state(folder) == [state]
        async with second.client() as client:
            listed = {box.id: box for box in (await client.list()).sandboxes}
            assert set(listed) == {made.id, other.id}
            assert listed[made.id].labels == {"a": "b"} and listed[other.id].state == "paused"
            assert (
                await _says(client, made.id, "cat kept; pwd; echo $WHO; pgrep -c sleep")
                == "kept\n/work\nme\n1"
            )
            assert (await client.create(wanted, key="the-key")).id == made.id
            (fork,) = (await client.fork(made.id)).sandboxes
            assert await _says(client, fork.id, "cat kept") == "kept"
            again = await client.create(CreateSandbox(snapshot=taken.id))
            assert await _says(client, again.id, "cat /work/kept") == "kept"
            await client.resume(other.id)
            assert (await client.get(other.id)).ends_at is not None
            assert (await client.capacity()).in_use == 4
            await client.delete(made.id)
    finally:
        assert second.stop() == 0
    assert traces([state]) == []


async def test_twice_and_with_one_that_died_meanwhile(folder: Path) -> None:
    server = _start(folder)
    async with server.client() as client:
        kept, lost = await client.create(), await client.create()
        agent = int(await _says(client, lost.id, "echo 1"))
    for _ in range(2):
        (state,) = _state(folder)
        server.stop(signal.SIGKILL)
        if agent:
            conmons = [p for p in processes.naming(state.name) if b"conmon" in processes.command_line(p)]
            assert len(conmons) == 2
            agent = 0
            for pid in processes.children(conmons[:1]):
                os.kill(pid, signal.SIGKILL)
        server = _start(folder)
    async with server.client() as client:
        states = sorted((box.state, box.reason) for box in (await client.list()).sandboxes)
        assert states[-1] == ("running", "") and all(state == ("dead", Code.EVICTED) for state in states[:-1])
        alive = next(box.id for box in (await client.list()).sandboxes if box.state == "running")
        assert alive in (kept.id, lost.id) and await _says(client, alive, "echo hi") == "hi"
    folders = state_of(server.process.pid) + _state(folder)
    assert server.stop() == 0 and traces(folders) == []


async def test_a_command_that_was_under_way_is_not_run_again(folder: Path) -> None:
    server = _start(folder)
    slow = "echo run >> /runs; while [ ! -e /go ]; do sleep 0.01; done; echo done"
    async with server.client() as client, httpx.AsyncClient(timeout=30) as raw:
        made = await client.create()

        def call(server: Server, command: str, key: str) -> Coroutine[Any, Any, httpx.Response]:
            headers = {"X-API-Key": server.key, "Idempotency-Key": key}
            url = f"{server.url}/v1/sandboxes/{made.id}/exec"
            return raw.post(url, json={"command": command}, headers=headers)

        assert (await call(server, "echo run >> /short; echo short", "short")).json()["stdout"][
            "data"
        ] == "short\n"
        under_way = asyncio.create_task(call(server, slow, "slow"))
        while await _says(client, made.id, "cat /runs") != "run":
            assert not under_way.done()
        server.stop(signal.SIGKILL)
        with pytest.raises(httpx.TransportError):
            await under_way
        server = _start(folder)
        again = asyncio.create_task(call(server, slow, "slow"))
        short = await call(server, "echo run >> /short; echo short", "short")
        assert short.json()["stdout"]["data"] == "short\n"
        async with server.client() as later:
            await later.write_file(made.id, "/go", b"")
            assert (await again).json()["stdout"]["data"] == "done\n"
            assert await _says(later, made.id, "cat /runs /short") == "run\nrun"
    assert server.stop() == 0


async def test_a_promised_create_is_kept(folder: Path, tmp_path: Path) -> None:
    server = _start(folder)
    async with server.client() as client:
        room = (await client.capacity()).places
        held = [await client.create() for _ in range(2)]
        assert room > 2
        promised = await client.create(CreateSandbox(group="g", group_size=2, wait_s=0), key="k")
        assert promised.state == "queued"
    server.stop(signal.SIGKILL)
    server = _start(folder)
    try:
        async with server.client() as client:
            assert (await client.get(promised.id)).state == "queued"
            other = await client.create(CreateSandbox(group="g", group_size=2))
            while (got := await client.get(promised.id)).state != "running":
                assert got.state in ("queued", "starting")
            ids = {box.id for box in (await client.list()).sandboxes}
            assert ids == {promised.id, other.id, *(box.id for box in held)}
    finally:
        assert server.stop() == 0


@pytest.mark.slow
async def test_without_a_server_they_end_by_themselves(folder: Path) -> None:
    """What is left for the next server that starts there is only directories, and it removes them."""
    server = _start(folder)
    async with server.client() as client:
        await client.create()
    server.stop(signal.SIGKILL)
    (state,) = _state(folder)
    await until(lambda: not processes.naming(state.name), 90)
    server = _start(folder)
    async with server.client() as client:
        (dead,) = (await client.list()).sandboxes
        assert dead.reason == Code.EVICTED
        with pytest.raises(SandboxError) as said:
            await client.exec(dead.id, Exec(command="true"))
        assert said.value.code == Code.EVICTED and said.value.infrastructure
    assert server.stop() == 0 and traces([state]) == []
