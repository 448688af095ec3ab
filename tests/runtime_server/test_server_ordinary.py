"""The server as an ordinary user: rootless Podman, images from an archive, limits without cgroups."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from ordinary import Ordinary
from serverkit import Server, state_of, traces, until

from runtime_server import archives
from runtime_server.client import BoundSandbox, Client
from runtime_server.engines import processes
from runtime_server.errors import SandboxError
from runtime_server.images import DEFAULT_IMAGE, default_store, ensure
from runtime_server.wire import Code, CreateSandbox, Exec, Limits

pytestmark = [
    pytest.mark.container,
    pytest.mark.skipif(
        os.getuid() != 0 or shutil.which("newuidmap") is None,
        reason="only root can become an ordinary user, and newuidmap must be there (Debian: uidmap)",
    ),
]


@pytest.fixture(scope="module")
def archive() -> Iterator[Path]:
    """The default image as a file for everybody; nobody but root reads pytest's own directories."""
    ensure(default_store())
    with tempfile.TemporaryDirectory(prefix="orc-test-") as folder:
        Path(folder).chmod(0o755)
        archives.save(default_store(), DEFAULT_IMAGE, Path(folder, "sandbox.tar"))
        yield Path(folder, "sandbox.tar")


@pytest.fixture(scope="module")
def user(archive: Path) -> Iterator[Ordinary]:
    """One whose store was filled from the archive."""
    ordinary = Ordinary.create(archive.parent / "user")
    try:
        done = ordinary.run("-m", "runtime_server.images", "ensure", "--from", str(archive))
        assert done.returncode == 0 and "loading" in done.stdout, done.stderr
        yield ordinary
    finally:
        ordinary.remove()


@pytest.fixture(scope="module")
def server(user: Ordinary) -> Iterator[Server]:
    running = Server.start(user=user)
    folders = state_of(running.process.pid)
    yield running
    assert running.stop() == 0
    assert traces(folders) == [] and user.processes() == {}


async def _says(sandbox: BoundSandbox, command: str) -> str:
    return (await sandbox.exec(command)).stdout.text.strip()


async def test_what_holds_is_declared(client: Client) -> None:
    told = await client.capabilities()
    assert told.rootless and told.storage_driver == "overlay"
    assert {name for name, holds in told.enforced.items() if not holds} == {"cpus"}
    assert any("watched" in note for note in told.notes)


async def test_commands_and_files(sandbox: BoundSandbox) -> None:
    assert await _says(sandbox, "id -u; cat /proc/self/uid_map | wc -l") == "0\n2"
    await sandbox.write_file("/srv/a/b", b"\0data")
    assert await sandbox.read_file("/srv/a/b") == b"\0data"
    owned = await _says(sandbox, "chown -R 1000:2000 /srv/a && rm /bin/ls && stat -c %u:%g /srv/a/b")
    assert owned == "1000:2000"


async def test_there_is_no_network(sandbox: BoundSandbox) -> None:
    assert await _says(sandbox, "tail -n +3 /proc/net/dev | grep -vc lo:") == "0"
    assert "unreachable" in await _says(
        sandbox, "python3 -c 'import socket; socket.create_connection((\"1.1.1.1\", 53), 5)' 2>&1"
    )


async def test_a_whole_tree_is_killed(client: Client, sandbox: BoundSandbox, user: Ordinary) -> None:
    before = len(user.processes())
    tree = "setsid sh -c 'trap \"\" TERM; sleep 301 & sleep 301' & (sleep 301 &) ; sleep 301"
    running = asyncio.create_task(sandbox.exec(tree, timeout_s=60))
    await until(lambda: len(user.processes()) >= before + 5)
    await client.kill(sandbox.id)
    assert (await running).signal == signal.SIGKILL
    await until(lambda: len(user.processes()) == before)


async def test_memory_is_bounded(client: Client) -> None:
    async with client.sandbox(CreateSandbox(limits=Limits(memory_mb=64))) as sandbox:
        result = await sandbox.exec(["python3", "-c", "import time; a = bytearray(1 << 29); time.sleep(50)"])
        assert result.oom and result.signal == signal.SIGKILL
        assert await _says(sandbox, "echo alive") == "alive"


async def test_shared_pages_count_once(client: Client) -> None:
    async with client.sandbox(CreateSandbox(limits=Limits(memory_mb=96))) as sandbox:
        forks = "import os, time\na = b'x' * (40 << 20)\nfor _ in 'abc': os.fork() or time.sleep(2) or exit()"
        result = await sandbox.exec(["python3", "-c", f"{forks}\ntime.sleep(2)"])
        assert result.exit_code == 0 and not result.oom


async def test_memory_without_a_process_counts(client: Client) -> None:
    async with client.sandbox(CreateSandbox(limits=Limits(memory_mb=64))) as sandbox:
        hog = "import os, time\nf = os.memfd_create('x')\nos.write(f, bytes(99 << 20))\ntime.sleep(50)"
        assert (await sandbox.exec(["python3", "-c", hog])).oom


async def test_a_sandbox_that_does_not_stop_eating_is_ended(client: Client) -> None:
    async with client.sandbox(CreateSandbox(limits=Limits(memory_mb=64))) as sandbox:
        eaters = "while :; do python3 -c 'a = bytearray(1 << 28); input()' </dev/zero & sleep .05; done"
        with pytest.raises(SandboxError) as failed:
            await sandbox.exec(eaters, timeout_s=60)
        assert failed.value.code == Code.OOM


async def test_a_fork_bomb_takes_only_its_sandbox(client: Client, sandbox: BoundSandbox) -> None:
    async with client.sandbox(CreateSandbox(limits=Limits(pids=64))) as bad:
        bomb = "import os\nwhile True:\n try: os.fork()\n except OSError: pass"
        going_off = asyncio.create_task(bad.exec(["python3", "-c", bomb], timeout_s=3))
        while not going_off.done():
            assert await _says(sandbox, "echo fine") == "fine"
        assert (await going_off).timed_out
        assert await _says(bad, "echo fine") == "fine"


async def test_the_limit_of_processes_is_each_sandboxs_own(client: Client) -> None:
    """Together they have many times what one may have."""

    async def one() -> str:
        async with client.sandbox(CreateSandbox(limits=Limits(pids=16))) as box:
            result = await box.exec("for n in 1 2 3 4 5; do sleep 30 & done; echo $(cat /proc/self/comm)")
            return result.stdout.text + result.stderr.text

    assert set(await asyncio.gather(*(one() for _ in range(12)))) == {"cat\n"}


async def test_a_fork_bomb_of_many_users_is_bounded_too(client: Client) -> None:
    """By the kernel, where the limit of the sandbox's user namespace covers all its users; else by a look."""
    each = "for n in range(1, 500): time.sleep(.005), os.fork() or (os.setuid(n), time.sleep(50))"
    async with client.sandbox(CreateSandbox(limits=Limits(pids=64))) as bad:
        try:
            result = await bad.exec(["python3", "-c", f"import os, time\n{each}"], timeout_s=60)
            while "BlockingIOError" not in result.stderr.text:  # a look may come after the last fork
                await bad.exec("sleep 1")
        except SandboxError as ended:
            assert ended.code == Code.SANDBOX_DIED


async def test_delete_leaves_nothing(client: Client, server: Server, user: Ordinary) -> None:
    before = set(user.processes())
    made = await client.create()
    await client.exec(made.id, Exec(command="chown 5:5 /root; (setsid sleep 300 &); touch /tmp/x"))
    folders = state_of(server.process.pid)
    assert _layers(folders) and set(user.processes()) != before
    await client.delete(made.id)
    await until(lambda: set(user.processes()) <= before and not _layers(folders) and not _io(folders))
    mounts = Path(f"/proc/{server.process.pid}/mountinfo").read_text()
    assert not any(folder.name in mounts for folder in folders)


def _layers(folders: list[Path]) -> list[Path]:
    return [path for folder in folders for path in [*folder.glob("g/overlay/*/diff"), *folder.glob("l/*")]]


def _io(folders: list[Path]) -> list[Path]:
    return [path for folder in folders for path in folder.glob("io/*")]


async def test_forks_and_pauses(client: Client, server: Server) -> None:
    image = (await client.capabilities()).default_image
    await client.prefetch({image: 2})
    while (await client.capacity()).warm_total < 2:
        assert server.process.poll() is None
    source = await client.create(CreateSandbox(workdir="/w"))
    prepare = (
        "echo one > a; chown 5:6 a; rm -r /usr/games; (i=0; while :; do i=$((i+1)); echo $i > /n; done) &"
    )
    await client.exec(source.id, Exec(command=prepare))
    await client.pause(source.id)
    forked = (await client.fork(source.id, 2)).sandboxes
    await client.resume(source.id)
    for box in forked:
        done = await client.exec(box.id, Exec(command="cat a; stat -c %u:%g a; ls /usr/games; id -u"))
        assert done.stdout.text == "one\n5:6\n0\n" and "No such file" in done.stderr.text
    await client.prefetch({})
    for box in (source, *forked):
        await client.delete(box.id)
    await until(lambda: not _layers(state_of(server.process.pid)))


async def test_a_killed_server_loses_no_sandbox(user: Ordinary) -> None:
    folder = Path(tempfile.mkdtemp(prefix="o-"))
    os.chown(folder, user.uid, user.uid)
    first = Server.start("--state-dir", str(folder), user=user)
    async with first.client() as client:
        made = await client.create()
        await client.exec(made.id, Exec(command="(sleep 300 &) ; echo kept > /kept; chown 5:5 /kept"))
    assert first.stop(signal.SIGKILL) == -signal.SIGKILL
    second = Server.start("--state-dir", str(folder), user=user)
    async with second.client() as client:
        done = await client.exec(made.id, Exec(command="cat /kept; pgrep -c sleep"))
        assert done.stdout.text == "kept\n1\n"
        (fork,) = (await client.fork(made.id)).sandboxes
        done = await client.exec(fork.id, Exec(command="cat /kept"))
        assert done.stdout.text == "kept\n"
    folders = [*folder.glob("orc-*")]
    assert len(folders) == 1 and second.stop() == 0
    assert traces(folders) == []
    folder.rmdir()


async def test_what_a_killed_server_left_is_swept(user: Ordinary) -> None:
    server = Server.start(user=user)
    folders = state_of(server.process.pid)
    async with server.client() as client:
        made = await client.create()
        await client.exec(made.id, Exec(command="mkdir /x && chown 5:5 /x && chmod 700 /x"))
    assert server.stop(signal.SIGKILL) == -signal.SIGKILL
    assert traces(folders)
    done = user.run("-m", "runtime_server", "--sweep")
    assert done.returncode == 0 and all(str(folder) in done.stdout for folder in folders)
    assert traces(folders) == []


async def test_a_user_without_subordinate_ids(archive: Path) -> None:
    user = Ordinary.create(archive.parent / "single", number=1, ids=False)
    try:
        done = user.run("-m", "runtime_server.images", "ensure", "--from", str(archive))
        assert done.returncode == 0, done.stderr
        server = Server.start(user=user)
        async with server.client() as client, client.sandbox() as sandbox:
            told = await client.capabilities()
            assert any("usermod --add-subuids" in note for note in told.notes)
            assert await _says(sandbox, "git --version | cut -c1-3; chown 5 /root || echo no") == "git\nno"
        assert server.stop() == 0
    finally:
        user.remove()


def test_a_root_filesystem_is_an_image_too(user: Ordinary, archive: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "x").write_text("x")
    with tarfile.open(archive.parent / "Small.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "bin", "bin")
    done = user.run("-m", "runtime_server.images", "ensure", "--from", str(archive.parent / "Small.tar.gz"))
    assert done.returncode == 0, done.stderr
    assert "localhost/orchestrate/small:latest" in user.run("-m", "runtime_server.images", "list").stdout


def test_an_archive_that_is_not_there(user: Ordinary) -> None:
    done = user.run("-m", "runtime_server.images", "ensure", "--from", "/nowhere/a.tar")
    assert (
        done.returncode == 1 and "/nowhere/a.tar" in done.stderr and "runtime.image_archives" in done.stderr
    )


def test_nothing_stays_in_shared_memory(user: Ordinary) -> None:
    assert not [path for path in Path("/dev/shm").glob("libpod*") if path.stat().st_uid == user.uid]
    assert not [pid for pid in user.processes() if "pause" in processes.command_line(pid).decode()]
