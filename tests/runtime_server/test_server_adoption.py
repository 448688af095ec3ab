"""A server that is killed and started again finds its sandboxes: real processes, real Podman."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from serverkit import Server, spawn, state_of, traces, until

from orchestrator.contract import Env, Exit, JobStatus, ReadyFlag, Role, RunDirectory
from orchestrator.schema import Config
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


def _serve(run: RunDirectory, attempt: int, nonce: str) -> tuple[subprocess.Popen[str], dict[str, str]]:
    """As the runtime job would start it; with the environment that its sweep gets."""
    env = {
        Env.RUN_DIR.value: str(run.root),
        Env.JOB_ID.value: "17",
        Env.ATTEMPT.value: str(attempt),
        Env.NONCE.value: nonce,
    }
    return spawn("--run-dir", str(run.root), env=env), env


async def _client(run: RunDirectory, nonce: str) -> Client:
    def ready() -> bool:
        flag = run.read(run.ready_flag, ReadyFlag)
        return flag is not None and flag.nonce == nonce

    await until(ready, 60)
    return Client(run.read_text(run.runtime_url), run.read_text(run.runtime_api_key))


def _ended(run: RunDirectory, nonce: str, code: int) -> None:
    status = JobStatus(
        run_id=run.run_id,
        role=Role.RUNTIME,
        attempt=1,
        job_id="17",
        nonce=nonce,
        host="h",
        pid=1,
        phase="ended",
    )
    run.publish(run.status(Role.RUNTIME), replace(status, exit_code=code))


def _sweep(env: dict[str, str]) -> None:
    command = [sys.executable, "-m", "runtime_server", "--sweep"]
    subprocess.run(command, env={**os.environ, **env}, check=True, timeout=60, capture_output=True)


async def test_the_next_life_of_a_job_has_the_sandboxes_of_the_last(tmp_path: Path) -> None:
    """The wrapper sweeps after a server that was killed: not what the next one in this job will take over."""
    run = RunDirectory.create(tmp_path / "runs", "t")
    config = Config.model_validate({"runtime": {"host": "127.0.0.1"}})
    run.config.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    process, env = _serve(run, 1, "a" * 32)
    async with await _client(run, "a" * 32) as client:
        made = await client.create()
    folders = state_of(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    _ended(run, "a" * 32, Exit.AGAIN)
    _sweep(env)
    _sweep({})  # nor does anybody else's
    assert all(folder.exists() for folder in folders)
    process, env = _serve(run, 2, "b" * 32)
    async with await _client(run, "b" * 32) as client:
        assert await _says(client, made.id, "echo hi") == "hi"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    _ended(run, "b" * 32, Exit.SOFTWARE)
    _sweep(env)
    assert traces(folders) == []


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
