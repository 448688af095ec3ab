"""Processes and sessions of a server that was killed: the next one finds them, and what they wrote."""

from __future__ import annotations

import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path

import pytest
from serverkit import Server

from runtime_server.client import BoundSandbox
from runtime_server.client_running import RemoteProcess, RemoteSession
from runtime_server.wire import OpenSession

pytestmark = pytest.mark.container


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short, for sockets live below it."""
    path = Path(tempfile.mkdtemp(prefix="orc-t-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


async def test_what_ran_is_found_again(folder: Path) -> None:
    first = Server.start("--state-dir", str(folder))
    try:
        async with first.client() as client:
            sandbox = BoundSandbox(client, await client.create())
            process = await sandbox.start("echo one; read line; echo two $line", stdin=True)
            ended = await sandbox.start("echo short; exit 4")
            await ended.wait()
            async with aclosing(process.output()) as output:
                assert (await anext(output)).data == "one\n"
            opened = await client.open_session(sandbox.id, OpenSession(name="kept"))
            session = RemoteSession(client, sandbox.id, opened)
            await session.run("cd /usr; x=still")
            left = await session.run("echo a; sleep 3; echo b", timeout_s=0.2, on_timeout="leave")
            assert left.running
    finally:
        first.stop(signal.SIGKILL)
    second = Server.start("--state-dir", str(folder))
    try:
        async with second.client() as client:
            listed = {one.number: one for one in (await client.processes(sandbox.id)).processes}
            assert listed[process.number].state == "running"
            assert listed[ended.number].exit_code == 4
            found = RemoteProcess(client, sandbox.id, listed[process.number])
            async with aclosing(found.output("4,0")) as output:
                await found.write("more\n")
                assert "".join([chunk.data async for chunk in output]) == "two more\n"
            assert (await found.wait()).exit_code == 0
            session = RemoteSession(client, sandbox.id, await client.session(sandbox.id, "kept"))
            rest = await session.rest(20)
            assert (rest.stdout.text, rest.running) == ("a\nb\n", False)
            assert (await session.run("pwd; echo $x")).stdout.text == "/usr\nstill\n"
            await client.delete(sandbox.id)
    finally:
        assert second.stop() == 0
