"""What others kill beneath a server: monitors of containers, Podman's service. Nothing of it may stay."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
from serverkit import Server, state_of, until

from runtime_server.client import Client
from runtime_server.engines import processes
from runtime_server.engines.ownership import bases
from runtime_server.engines.state import State
from runtime_server.errors import SandboxError
from runtime_server.wire import Exec

pytestmark = pytest.mark.container


@pytest.fixture
def state(server: Server) -> State:
    """Its directories: run-time state, and storage."""
    (root,) = [path for path in state_of(server.process.pid) if (path / "podman.sock").exists()]
    return State(root, bases()[1] / root.name)


def _conmons(state: State) -> list[int]:
    return sorted(set(processes.naming(state.token)) - set(processes.services(state.token)))


def _left(state: State) -> list[str]:
    """Of containers: directories, runtime state, cgroups, layers, words of monitors."""
    folders = [state.io, state.oci, state.layers, state.tmp / "exits"]
    cgroups = [path for top in processes.cgroups_of(state.cgroup) for path in top.glob("libpod-*")]
    return [str(path) for folder in folders for path in folder.iterdir()] + [*map(str, cgroups)]


async def test_a_sandbox_whose_monitor_was_killed_works_and_goes_as_a_whole(
    client: Client, state: State
) -> None:
    box = await client.create()
    (conmon,) = _conmons(state)
    (agent,) = processes.children([conmon])
    os.kill(conmon, signal.SIGKILL)
    processes.gone(conmon, 10)
    async with asyncio.timeout(60):
        assert (await client.get(box.id)).state == "running"
        await client.delete(box.id)
        assert not processes.started(agent)
        await until(lambda: not _left(state))


async def test_creates_and_deletes_outlive_the_service(client: Client, state: State) -> None:
    """They go on with the next one, all of them; a create that cannot leaves nothing behind."""
    made = [await client.create() for _ in range(3)]
    for _ in range(2):
        work = [asyncio.create_task(client.create()) for _ in range(6)]
        work += [asyncio.create_task(client.get(made[0].id))]
        gone = [asyncio.create_task(client.delete(box.id)) for box in made]
        await until(lambda: len(_conmons(state)) > 3)
        for pid in processes.services(state.token):
            processes.send(pid)
        done = await asyncio.gather(*work, return_exceptions=True)
        await asyncio.gather(*gone)
        assert all(isinstance(one, SandboxError) for one in done if isinstance(one, BaseException))
        made = [one for one in (await client.list()).sandboxes if one.state == "running"]
    for box in made:
        await client.delete(box.id)
    await until(lambda: not _left(state), 90)


async def test_cgroups_that_a_killed_services_runtime_made_late_go(client: Client, state: State) -> None:
    late = [top / "libpod-0123" for top in processes.cgroups_of(state.cgroup)]
    for folder in late:
        folder.mkdir()
    for pid in processes.services(state.token):
        processes.send(pid)
    box = await client.create()
    await until(lambda: not any(folder.exists() for folder in late), 60)
    assert (await client.exec(box.id, Exec(command="echo here"))).stdout.text == "here\n"


async def test_a_layer_that_a_killed_service_wrote_down_for_nobody_goes(client: Client, state: State) -> None:
    box, layer = await client.create(), "ab" * 32
    for pid in processes.services(state.token):
        processes.send(pid)
        processes.gone(pid, 10)
    records = state.graphroot / "overlay-layers" / "layers.json"
    written = json.loads(records.read_bytes())
    records.write_text(json.dumps([{"id": layer, "created": "2026-11-22T00:52:50.3Z"}, *written]))
    (state.graphroot / "overlay" / layer / "diff").mkdir(parents=True)
    other = await client.create()
    assert not (state.graphroot / "overlay" / layer).exists() and layer not in records.read_text()
    for one in (box, other):
        assert (await client.exec(one.id, Exec(command="echo here"))).stdout.text == "here\n"


async def test_the_dead_that_were_deleted_do_not_come_back() -> None:
    folder = Path(tempfile.mkdtemp(prefix="orc-t-"))
    server = Server.start("--state-dir", str(folder))
    (root,) = folder.glob("orc-*")
    async with server.client() as client:
        gone, kept = await client.create(), await client.create()
        for agent in processes.children(_conmons(State(root, root))):
            os.kill(agent, signal.SIGKILL)
        async with asyncio.timeout(30):
            while {one.state for one in (await client.list()).sandboxes} != {"dead"}:
                await client.health()
        await client.delete(gone.id)
    server.stop(signal.SIGKILL)
    server = Server.start("--state-dir", str(folder))
    try:
        async with server.client() as client:
            assert [one.id for one in (await client.list()).sandboxes] == [kept.id]
    finally:
        assert server.stop() == 0
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("promised", [0, 1])
async def test_creates_under_way_when_the_server_was_killed_leave_nothing(promised: int) -> None:
    folder = Path(tempfile.mkdtemp(prefix="orc-t-"))
    server = Server.start("--state-dir", str(folder))
    (root,) = folder.glob("orc-*")
    state = State(root, root)
    async with server.client() as client:
        for _ in range(promised):
            await client.create()
        work = [asyncio.create_task(client.create()) for _ in range(4)]
        await until(lambda: len(_conmons(state)) > promised)
        server.stop(signal.SIGKILL)
        for one in work:
            one.cancel()
        await asyncio.gather(*work, return_exceptions=True)
    server = Server.start("--state-dir", str(folder))
    try:
        async with server.client() as client:
            found = [one.state for one in (await client.list()).sandboxes]
            assert "dead" not in found and promised <= len(found) <= promised + 4
            assert [path.name for path in folder.glob("orc-*")] == [root.name]
            folders = (state.io, state.oci, state.layers)
            await until(lambda: [len([*path.iterdir()]) for path in folders] == [len(found)] * 3)
    finally:
        assert server.stop() == 0
        shutil.rmtree(folder, ignore_errors=True)
