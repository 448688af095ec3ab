"""What engines must not leave, or get wrong, where a disk is full or a server was killed at a bad moment."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from runtime_server.engines import leftovers, monitors, processes
from runtime_server.engines.layers import Layers
from runtime_server.engines.podman_api import Api
from runtime_server.engines.state import State
from runtime_server.errors import Full, Internal
from runtime_server.wire import Code

root = pytest.mark.skipif(os.getuid() != 0, reason="mounts something")


@pytest.fixture
def state() -> Iterator[State]:
    """In a short path, as sockets need it."""
    with tempfile.TemporaryDirectory(prefix="orc-t-") as folder:
        made = State.create(folder)
        yield made
        made.remove()


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@root
@pytest.mark.container
async def test_a_snapshot_for_which_there_is_no_room(state: State) -> None:
    layer = state.layers / "one"
    (layer / "u").mkdir(parents=True)
    (layer / "u" / "large").write_bytes(bytes(2 << 20))
    with small_disk(state.frozen):
        layers = Layers(state, os.getpid())
        await layers.start(volatile=False)
        try:
            with pytest.raises(Full) as failed:
                await layers.freeze(layer, "copy")
            assert (failed.value.code, failed.value.status) == (Code.DISK_FULL, 507)
            assert [*state.frozen.iterdir()] == []
        finally:
            await layers.stop()


async def test_a_call_that_finds_no_service_leaves_no_socket_to_the_garbage_collector(state: State) -> None:
    async def revive() -> bool:
        return False

    api = Api(2, revive)
    api.connect(state.socket)
    gc.collect()
    gc.disable()
    try:
        before = len([*Path("/proc/self/fd").iterdir()])
        for _ in range(8):
            with pytest.raises(Internal, match="Podman does not answer"):
                await api.json("GET", "/containers/json")
        assert len([*Path("/proc/self/fd").iterdir()]) == before
    finally:
        gc.enable()
        api.close()


@contextmanager
def monitor(state: State, identity: str) -> Iterator[subprocess.Popen[bytes]]:
    """A program of this name that sleeps, as a monitor does most of the time."""
    command = ["conmon", "-c", "import time; time.sleep(600)", identity, state.token]
    with subprocess.Popen(command, executable=sys.executable) as process:
        try:
            yield process
        finally:
            process.kill()


async def test_a_runtime_that_made_a_container_nobody_knows_is_ended_with_it(state: State) -> None:
    mine, lost = "a1" * 32, "b2" * 32
    folders = [state.oci, *(top / "overlay-containers" for top in (state.runroot, state.graphroot))]
    for folder in folders:
        for name in (mine, lost):
            (folder / name / "userdata").mkdir(parents=True)

    async def known() -> set[str]:
        return {mine}

    with monitor(state, mine) as kept, monitor(state, lost) as ended:
        while len(monitors.running(state)) < 2:  # until both have their new names
            assert ended.poll() is None
        await leftovers.end_unknown(state, known)
        assert ended.wait(10) == -9 and kept.poll() is None
        assert monitors.running(state) == {kept.pid: mine}
    assert [path.name for folder in folders for path in folder.iterdir()] == [mine] * 3


async def test_where_nobody_can_say_what_is_known_nothing_is_ended(state: State) -> None:
    async def known() -> set[str]:
        raise Internal("Podman does not answer", Code.CREATE_FAILED)

    with monitor(state, "c3" * 32) as kept:
        while not monitors.running(state):
            assert kept.poll() is None
        await leftovers.end_unknown(state, known)
        assert kept.poll() is None


def test_monitors_of_containers_that_nobody_has_end_and_leave_no_word(state: State) -> None:
    exits = state.tmp / "exits"
    exits.mkdir(parents=True)
    for name in ("kept", "lost", "gone"):
        (exits / name).write_text("137")
    with monitor(state, "kept") as kept, monitor(state, "lost") as lost:
        while len(processes.naming(state.token)) < 2:  # until both have their new names
            assert lost.poll() is None
        monitors.end_others(state, {"kept"})
        assert lost.wait(10) == -9 and kept.poll() is None
    assert [file.name for file in exits.iterdir()] == ["kept"]
    monitors.forget_end(state, "kept")
    monitors.forget_end(state, "kept")
    assert not any(exits.iterdir())
