"""What the agent holds back by itself, whatever engine started it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from agentkit import Sandbox

from runtime_server.agent import AgentListener, AgentLost

TRY = """
import ctypes, errno, os, sys
libc = ctypes.CDLL(None, use_errno=True)
failed = libc.syscall(*map(int, sys.argv[1:])) < 0
print(errno.errorcode[ctypes.get_errno()] if failed else "done")
"""


async def test_the_filter_is_on_everything(sandbox: Sandbox) -> None:
    said = await sandbox.sh(
        "grep -E 'Seccomp:|NoNewPrivs' /proc/self/status /proc/1/status | awk '{print $2}'"
    )
    assert said.stdout.data.split() == [b"1", b"2", b"1", b"2"]


@pytest.mark.parametrize(
    ("name", "numbers", "answer"),
    [
        ("unshare of a user namespace", (272, 0x10000000), "EPERM"),
        ("unshare of files", (272, 0x400), "done"),
        ("a vsock socket", (41, 40, 1, 0), "EAFNOSUPPORT"),
        ("a Unix socket", (41, 1, 1, 0), "done"),
        ("keyctl", (250, 0, -4, 1), "EPERM"),
        ("clone3", (435, 0, 0), "ENOSYS"),
        ("io_uring", (425, 1, 0), "ENOSYS"),
        ("x32", (0x40000000 + 39,), "ENOSYS"),
        ("TIOCSTI", (16, 0, 0x5412, 0), "EPERM"),
        ("another ioctl", (16, 0, 0x5401, 0), "ENOTTY"),
    ],
)
@pytest.mark.skipif(not Path("/lib64/ld-linux-x86-64.so.2").exists(), reason="numbers of x86_64")
async def test_system_calls(sandbox: Sandbox, name: str, numbers: tuple[int, ...], answer: str) -> None:
    done = await sandbox.run("python3", "-c", TRY, *map(str, numbers))
    assert done.stdout.data.decode().strip() == answer, (name, done.stderr.data)


async def test_the_path_to_the_server_may_be_taken(sandbox: Sandbox) -> None:
    """Code of a sandbox can rename the directory above the socket's, and put a listener of its own there."""
    moved = sandbox.directory.with_name(f"{sandbox.directory.name}-moved")
    sandbox.directory.rename(moved)
    sandbox.directory.mkdir()
    decoy, real = (AgentListener(folder / "agent.sock") for folder in (sandbox.directory, moved))
    try:
        await decoy.start()
        await real.start()
        await sandbox.agent.close()
        sandbox.agent = await real.accept(None, 10)
        assert await sandbox.agent.ping() > 0
        with pytest.raises(AgentLost):
            await decoy.accept(None, 0.5)
    finally:
        await decoy.close()
        await real.close()
        shutil.rmtree(sandbox.directory)
        moved.rename(sandbox.directory)
