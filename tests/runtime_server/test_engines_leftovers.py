"""What engines must not leave, or get wrong, where a disk is full or a server was killed at a bad moment."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from runtime_server.engines import monitors, processes
from runtime_server.engines.layers import Layers
from runtime_server.engines.state import State
from runtime_server.errors import Full
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


@contextmanager
def monitor(state: State, identity: str) -> Iterator[subprocess.Popen[bytes]]:
    """A program of this name that sleeps, as a monitor does most of the time."""
    command = ["conmon", "-c", "import time; time.sleep(600)", identity, state.token]
    with subprocess.Popen(command, executable=sys.executable) as process:
        try:
            yield process
        finally:
            process.kill()


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
