"""The agent as PID 1 of a real container whose file system is empty: it needs nothing of the image."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from runtime_server.agent import AgentConnection, AgentError, AgentListener, build

pytestmark = pytest.mark.container

CAPABILITIES = ("CHOWN", "DAC_OVERRIDE", "FOWNER", "SETUID", "SETGID", "KILL")


def podman(*arguments: str) -> str:
    """With runc: crun refuses hybrid cgroups."""
    line = ["podman", "--runtime", "runc", "--cgroup-manager", "cgroupfs", *arguments]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def start(place: Path, name: str, *options: str) -> int:
    """Starts the container; returns the pid of its first process on this host."""
    (place / "root").mkdir(exist_ok=True)
    mounts = [
        f"--volume={build.agent_binary()}:/.orchestrate/agent:ro",
        f"--volume={place}/io:/.orchestrate/io:ro",
    ]
    limits = ["--ulimit=nofile=1024:2048", "--ulimit=nproc=512:512", "--pids-limit=128", "--memory=128m"]
    rights = ["--cap-drop=ALL", *(f"--cap-add={one}" for one in CAPABILITIES)]
    command = ["--entrypoint=/.orchestrate/agent", "--rootfs", f"{place}/root", "/.orchestrate/io/agent.sock"]
    more = ["--security-opt=no-new-privileges", "--network=none", f"--name={name}"]
    podman("run", "--detach", *mounts, *limits, *rights, *more, *options, *command)
    return int(json.loads(podman("inspect", name))[0]["State"]["Pid"])


@asynccontextmanager
async def container(
    *options: str, programs: bool = False
) -> AsyncIterator[tuple[str, AgentConnection, Path]]:
    if shutil.which("podman") is None or os.geteuid() != 0:
        pytest.skip("needs podman and root")
    place = Path(tempfile.mkdtemp(prefix="agent-", dir="/tmp"))
    place.chmod(0o755)
    name = place.name
    (place / "io").mkdir()
    if programs:
        install_busybox(place / "root")
    listener = AgentListener(place / "io" / "agent.sock")
    await listener.start()
    try:
        pid = await asyncio.to_thread(start, place, name, *options)
        yield name, await listener.accept(pid, 10), place
    finally:
        await listener.close()
        await asyncio.to_thread(podman, "rm", "--force", "--time=0", "--ignore", name)
        shutil.rmtree(place)


def install_busybox(root: Path) -> None:
    """What Alpine has in place of a distribution's programs: one static file."""
    busybox = shutil.which("busybox")
    if (
        busybox is None
        or b"statically linked"
        not in subprocess.run(["file", "-L", busybox], capture_output=True, check=False).stdout
    ):
        pytest.skip("needs a static busybox (Debian: busybox-static) and `file`")
    (root / "bin").mkdir(parents=True)
    (root / "tmp").mkdir()
    (root / "tmp").chmod(0o1777)
    shutil.copy2(busybox, root / "bin" / "busybox")
    for name in ("sh", "sleep", "id", "cat", "ps", "setsid", "stty", "head"):
        (root / "bin" / name).symlink_to("busybox")


@pytest.fixture
async def contained() -> AsyncIterator[tuple[str, AgentConnection, Path]]:
    async with container() as one:
        yield one


async def test_works_in_an_empty_container(contained: tuple[str, AgentConnection, Path]) -> None:
    name, agent, place = contained
    missing = await agent.exec(["sh"], cwd=None, env={}, stdin=None, timeout_s=5, max_output=1000)
    assert missing.exit_code == 127
    await agent.write_file("/data/hello", b"bytes \xff")
    assert (place / "root" / "data" / "hello").read_bytes() == b"bytes \xff"
    program = build.agent_binary().read_bytes()  # a static program that is at hand
    await agent.write_file("/bin/tool", program, mode=0o755)
    ran = await agent.exec(["/bin/tool"], cwd="/data", env={}, stdin=None, timeout_s=5, max_output=1000)
    assert ran.exit_code == 2 and b"usage" in ran.stderr.data
    with pytest.raises(AgentError):
        await agent.read_file("/dev/zero", 10)
    with pytest.raises(AgentError, match="no such shell"):
        await agent.open_session()
    packed = b"".join([part async for part in agent.pack("/data", 1 << 20)])
    assert packed.startswith(b"hello\0")
    started = time.monotonic()
    await asyncio.to_thread(podman, "stop", name)
    assert time.monotonic() - started < 5 and agent.closed


@pytest.mark.parametrize("user", ["0:0", "1234:1234"])
async def test_busybox_as_root_and_as_another_user(user: str) -> None:
    async with container(f"--user={user}", programs=True) as (_, agent, _place):
        session = await agent.open_session(cwd="/tmp")
        await session.run("x=kept; sleep 777 & cd /", timeout_s=10)
        done = await session.run('echo "$x $PWD $(id -u)"', timeout_s=10)
        assert done.stdout.data.decode() == f"kept / {user.split(':')[0]}\n"
        done = await session.run("setsid sleep 778 & sleep 779; echo next", timeout_s=0.5)
        assert done.timed_out and done.stdout.data == b""
        running = asyncio.create_task(session.run("sleep 780; echo next", timeout_s=20, on_timeout="leave"))
        await agent.ping()
        told = await session.interrupt()
        assert told is not None and told.exit_code == 130 and (await running) == told
        left = (await session.run("ps -o args | cat", timeout_s=10)).stdout.data
        assert b"sleep 777" in left and b"sleep 778" not in left and b"sleep 779" not in left
        terminal = await agent.open_session(pty=(80, 24))
        assert (await terminal.run("stty size", timeout_s=10)).stdout.data == b"24 80\n"
        process = await agent.spawn(["cat"], stdin=True)
        await process.write(b"through")
        await process.close_stdin()
        assert (await process.wait()).stdout.data == b"through"
        await session.close()
        await terminal.close()
