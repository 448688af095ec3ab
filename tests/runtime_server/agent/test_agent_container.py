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


def start(place: Path, name: str) -> int:
    """Starts the container; returns the pid of its first process on this host."""
    (place / "root").mkdir()
    mounts = [
        f"--volume={build.agent_binary()}:/.orchestrate/agent:ro",
        f"--volume={place}/io:/.orchestrate/io:ro",
    ]
    limits = ["--ulimit=nofile=1024:2048", "--ulimit=nproc=512:512", "--pids-limit=128", "--memory=128m"]
    rights = ["--cap-drop=ALL", *(f"--cap-add={one}" for one in CAPABILITIES)]
    command = ["--entrypoint=/.orchestrate/agent", "--rootfs", f"{place}/root", "/.orchestrate/io/agent.sock"]
    more = ["--security-opt=no-new-privileges", "--network=none", f"--name={name}"]
    podman("run", "--detach", *mounts, *limits, *rights, *more, *command)
    return int(json.loads(podman("inspect", name))[0]["State"]["Pid"])


@pytest.fixture
async def contained() -> AsyncIterator[tuple[str, AgentConnection, Path]]:
    if shutil.which("podman") is None or os.geteuid() != 0:
        pytest.skip("needs podman and root")
    place = Path(tempfile.mkdtemp(prefix="agent-", dir="/tmp"))
    name = place.name
    (place / "io").mkdir()
    listener = AgentListener(place / "io" / "agent.sock")
    await listener.start()
    try:
        pid = await asyncio.to_thread(start, place, name)
        yield name, await listener.accept(pid, 10), place
    finally:
        await listener.close()
        await asyncio.to_thread(podman, "rm", "--force", "--time=0", "--ignore", name)
        shutil.rmtree(place)


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
    started = time.monotonic()
    await asyncio.to_thread(podman, "stop", name)
    assert time.monotonic() - started < 5 and agent.closed
