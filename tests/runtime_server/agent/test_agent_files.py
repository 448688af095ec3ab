"""Files: byte-exact, atomic, bounded; nothing that is no regular file is touched."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import stat
import time
from pathlib import Path

import pytest
from agentkit import Sandbox

from runtime_server.agent import AgentError


@pytest.fixture
def place(sandbox: Sandbox) -> Path:
    return sandbox.directory / "files"


async def failure(operation: object) -> AgentError:
    with pytest.raises(AgentError) as caught:
        await operation  # type: ignore[misc]
    return caught.value


async def test_round_trip_of_50_mb(sandbox: Sandbox, place: Path) -> None:
    data = os.urandom(50_000_000)
    assert await sandbox.agent.write_file(str(place / "big"), data) == len(data)
    assert (place / "big").read_bytes() == data
    assert await sandbox.agent.read_file(str(place / "big"), len(data)) == data
    assert sandbox.memory_kib() < 4096


@pytest.mark.parametrize("data", [b"", b"x", bytes(range(256)), b"\r\n\x00\xff"])
async def test_small_bytes_are_exact(sandbox: Sandbox, place: Path, data: bytes) -> None:
    path = str(place / "deep" / "er" / "ünï \n name")
    await sandbox.agent.write_file(path, data)
    assert await sandbox.agent.read_file(path, 1000) == data


async def test_mode_and_parents(sandbox: Sandbox, place: Path) -> None:
    await sandbox.agent.write_file(str(place / "a" / "run"), b"x", mode=0o750)
    assert stat.S_IMODE((place / "a" / "run").stat().st_mode) == 0o750
    error = await failure(sandbox.agent.write_file(str(place / "b" / "c"), b"x", parents=False))
    assert error.errno == errno.ENOENT and not (place / "b").exists()


async def test_symbolic_link_stays_a_link(sandbox: Sandbox, place: Path) -> None:
    await sandbox.agent.write_file(str(place / "real"), b"old")
    (place / "link").symlink_to("real")
    await sandbox.agent.write_file(str(place / "link"), b"new")
    assert (place / "link").is_symlink() and (place / "real").read_bytes() == b"new"
    (place / "dangling").symlink_to("nowhere")
    assert (await failure(sandbox.agent.write_file(str(place / "dangling"), b""))).errno == errno.ENOENT


async def test_no_half_written_file(sandbox: Sandbox, place: Path) -> None:
    await sandbox.agent.write_file(str(place / "file"), b"old")
    await failure(sandbox.agent.write_file(str(place / "file" / "below"), b"x" * 5_000_000))
    await failure(sandbox.agent.write_file("/proc/no/way", b"x" * 5_000_000))
    task = asyncio.create_task(sandbox.agent.write_file(str(place / "file"), b"x" * 200_000_000))
    done, _ = await asyncio.wait([task], timeout=0.01)
    await sandbox.agent.close()  # in the middle
    assert done or isinstance((await asyncio.gather(task, return_exceptions=True))[0], Exception)
    await sandbox.reconnected()
    check = f"for i in $(seq 300); do ls -A {place} | grep -q orchestrate || exit 0; sleep 0.01; done; exit 1"
    assert (await sandbox.sh(check)).exit_code == 0
    assert (place / "file").read_bytes() == b"old"


async def test_cancelled_write_leaves_nothing(sandbox: Sandbox, place: Path) -> None:
    place.mkdir()
    task = asyncio.create_task(sandbox.agent.write_file(str(place / "file"), b"x" * 300_000_000))
    async with asyncio.timeout(60):
        while not any(place.iterdir()):  # noqa: ASYNC110 - seen from where it is sent, it cannot end before
            await asyncio.sleep(0)
    assert [path.name for path in place.iterdir()] != ["file"]
    task.cancel()
    await asyncio.wait([task])
    gone = f'for i in $(seq 300); do [ -z "$(ls -A {place})" ] && exit 0; sleep 0.01; done; exit 1'
    assert (await sandbox.sh(gone)).exit_code == 0


async def test_what_is_no_regular_file_is_refused_at_once(sandbox: Sandbox, place: Path) -> None:
    place.mkdir()
    os.mkfifo(place / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place / "socket"))
    (place / "to-fifo").symlink_to("fifo")
    started = time.monotonic()
    for path in (place / "fifo", place / "to-fifo", place / "socket", "/dev/zero", "/dev/tty", place):
        expected = errno.EISDIR if path == place else errno.EINVAL
        assert (await failure(sandbox.agent.read_file(str(path), 100))).errno == expected
        assert (await failure(sandbox.agent.write_file(str(path), b"x"))).errno == expected
    assert time.monotonic() - started < 5
    assert stat.S_ISFIFO((place / "fifo").stat().st_mode)


async def test_errors_say_what_and_where(sandbox: Sandbox, place: Path) -> None:
    missing = await failure(sandbox.agent.read_file("/no/such", 10))
    assert missing.errno == errno.ENOENT and "/no/such" in str(missing)
    assert (await failure(sandbox.agent.read_file("relative", 10))).errno == errno.EINVAL
    assert (await failure(sandbox.agent.write_file("", b""))).errno == errno.EINVAL
    assert (await failure(sandbox.agent.write_file(f"{place}/", b""))).errno == errno.EISDIR
    assert (await failure(sandbox.agent.write_file("/" + "x/" * 3000, b""))).errno == errno.ENAMETOOLONG
    assert (await failure(sandbox.agent.write_file(f"/tmp/{'x' * 300}", b""))).errno == errno.ENAMETOOLONG


async def test_too_large_is_refused(sandbox: Sandbox, place: Path) -> None:
    await sandbox.agent.write_file(str(place / "ten"), b"x" * 10)
    assert await sandbox.agent.read_file(str(place / "ten"), 10) == b"x" * 10
    assert (await failure(sandbox.agent.read_file(str(place / "ten"), 9))).errno == errno.E2BIG


async def test_growing_file_is_bounded(sandbox: Sandbox, place: Path) -> None:
    place.mkdir()
    writer = asyncio.create_task(sandbox.sh(f"yes > {place}/growing", timeout_s=3))
    await sandbox.sh(f"until [ -s {place}/growing ]; do :; done")
    with pytest.raises(AgentError) as caught:
        while not writer.done():  # a reader that is faster than `yes` sees the end of a short file
            assert len(await sandbox.agent.read_file(str(place / "growing"), 3_000_000)) <= 3_000_000
    assert caught.value.errno == errno.E2BIG
    assert (await writer).timed_out


async def test_files_of_proc_have_no_size_but_content(sandbox: Sandbox) -> None:
    assert (await sandbox.agent.read_file("/proc/self/status", 100_000)).startswith(b"Name:\tfile\n")


async def test_many_files_at_once(sandbox: Sandbox, place: Path) -> None:
    async def one(number: int) -> None:
        data = b"%d" % number * 1000
        await sandbox.agent.write_file(str(place / str(number)), data)
        assert await sandbox.agent.read_file(str(place / str(number)), 10_000) == data

    await asyncio.gather(*(one(number) for number in range(200)))
