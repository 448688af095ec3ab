"""What clusters have in store: network filesystems, missing directories, ids that do not suffice, users' settings."""

# ruff: noqa: E501
from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from minifuse import mounted
from ordinary import Ordinary
from serverkit import Server, refused

from runtime_server import archives
from runtime_server.engines import EngineError
from runtime_server.engines.filesystems import filesystem, magic, networked
from runtime_server.engines.state import State
from runtime_server.images import DEFAULT_IMAGE, default_store, ensure

root = pytest.mark.skipif(os.getuid() != 0, reason="only root can mount, and become an ordinary user")
fuse = pytest.mark.skipif(not os.access("/dev/fuse", os.R_OK | os.W_OK), reason="needs /dev/fuse")
rootless = pytest.mark.skipif(shutil.which("newuidmap") is None, reason="needs newuidmap (Debian: uidmap)")


def test_local_disks_are_none() -> None:
    assert networked(Path("/dev/shm")) == "" and networked(Path("/")) == ""
    assert magic(Path("/dev/shm")) == 0x01021994 and magic(Path("/dev/shm/not/there")) == 0x01021994


@root
@fuse
@pytest.mark.parametrize("kind", ["sshfs", "lustrefs"])
def test_a_filesystem_that_is_served_is_refused(kind: str) -> None:
    with tempfile.TemporaryDirectory(prefix="o", dir="/tmp") as name, mounted(Path(name), kind) as folder:
        assert filesystem(folder) == networked(folder) == f"fuse.{kind}"
        assert magic(folder) == 0x65735546
        with pytest.raises(EngineError, match=rf"fuse\.{kind}.*runtime\.state_dir.*node-local"):
            State.create(name)


@root
@fuse
def test_the_server_says_what_to_do_about_it() -> None:
    with tempfile.TemporaryDirectory(prefix="o", dir="/tmp") as folder, mounted(Path(folder), "nfs"):
        done = refused("--engine", "process", "--state-dir", folder)
    assert done.returncode == 69 and "set runtime.state_dir to a node-local disk" in done.stderr


@pytest.fixture(scope="module")
def archive() -> Iterator[Path]:
    ensure(default_store())
    with tempfile.TemporaryDirectory(prefix="orc-hpc-") as folder:
        Path(folder).chmod(0o755)
        archives.save(default_store(), DEFAULT_IMAGE, Path(folder, "sandbox.tar"))
        yield Path(folder, "sandbox.tar")


def _settings(user: Ordinary) -> dict[Path, str]:
    """Settings of a user's own Podman that would break ours, if they were read."""
    folder = user.home / ".config" / "containers"
    folder.mkdir(parents=True)
    told = {
        folder
        / "containers.conf": '[engine]\nruntime = "/nowhere/runtime"\nhelper_binaries_dir = ["/nowhere"]\n',
        folder
        / "storage.conf": '[storage]\ndriver = "vfs"\ngraphroot = "/nowhere/g"\nrunroot = "/nowhere/r"\n',
        folder / "mounts.conf": f"{user.home}:/stolen\n",
    }
    for path, text in told.items():
        path.write_text(text)
    for path in [user.home / ".config", folder, *told]:
        os.chown(path, user.uid, user.uid)
    return told


@root
@rootless
@pytest.mark.container
async def test_settings_and_directories_of_the_user_mean_nothing(archive: Path) -> None:
    """Neither a configuration of theirs, nor XDG_RUNTIME_DIR of a login session that a job does not have."""
    user = Ordinary.create(archive.parent / "settings", number=1)
    told = _settings(user)
    env = {"XDG_RUNTIME_DIR": f"/run/user/{user.uid}", "DBUS_SESSION_BUS_ADDRESS": "unix:path=/nowhere/bus"}
    env |= {"CONTAINERS_CONF": "/nowhere/containers.conf", "CONTAINER_HOST": "unix:///nowhere.sock"}
    try:
        done = user.run("-m", "runtime_server.images", "ensure", "--from", str(archive))
        assert done.returncode == 0, done.stderr
        server = Server.start(user=user, env=env)
        async with server.client() as client, client.sandbox() as sandbox:
            assert (await client.capabilities()).storage_driver == "overlay"
            assert (await sandbox.exec("echo fine; ls /stolen")).stdout.text == "fine\n"
        assert server.stop() == 0
        assert {path: path.read_text() for path in told} == told
    finally:
        user.remove()


@root
@rootless
@pytest.mark.container
async def test_a_range_of_ids_that_does_not_suffice(archive: Path) -> None:
    """Files of ids beyond it become root's, and the capabilities say so."""
    user = Ordinary.create(archive.parent / "few", number=1)
    for name in ("subuid", "subgid"):
        file = user.scratch / name
        file.write_text(file.read_text().replace(":65536", ":10"))
    try:
        done = user.run("-m", "runtime_server.images", "ensure", "--from", str(archive))
        assert done.returncode == 0, done.stderr
        server = Server.start(user=user)
        async with server.client() as client, client.sandbox() as sandbox:
            notes = (await client.capabilities()).notes
            assert any("only 11 user ids" in note and "usermod --add-subuids" in note for note in notes), (
                notes
            )
            assert (
                await sandbox.exec("git --version | cut -c1-3; chown 5 /root && echo yes")
            ).stdout.text == "git\nyes\n"
        assert server.stop() == 0
    finally:
        user.remove()
