"""Directories into a sandbox and out of it, over HTTP; and archives that were made to do harm."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from serverkit import Server

from runtime_server.client import BoundSandbox
from runtime_server.client_archives import unpack_here
from runtime_server.errors import SandboxError, TooLarge
from runtime_server.wire import Code

container = pytest.mark.container


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "", size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size, info.mode = kind, target, size, 0o644
    return info


def tar_of(*members: tarfile.TarInfo, fill: bytes = b"x") -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for one in members:
            tar.addfile(one, io.BytesIO(fill * one.size) if one.isreg() else None)
    return packed.getvalue()


HOSTILE = {
    "parent": [member("../out", size=1)],
    "parent inside": [member("a/../../out", size=1)],
    "absolute": [member("/tmp/out", size=1)],
    "link out": [member("link", tarfile.SYMTYPE, "/tmp"), member("link/out", size=1)],
    "link up": [member("d/link", tarfile.SYMTYPE, "../../..")],
    "hard link out": [member("hard", tarfile.LNKTYPE, "/etc/passwd")],
    "hard link up": [member("hard", tarfile.LNKTYPE, "../../etc/passwd")],
    "device": [member("dev", tarfile.CHRTYPE)],
    "fifo": [member("fifo", tarfile.FIFOTYPE)],
}


def tree(root: Path) -> dict[str, bytes | str | None]:
    return {
        str(path.relative_to(root)): str(path.readlink())
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in root.rglob("*")
    }


@container
async def test_a_directory_goes_in_and_comes_back(sandbox: BoundSandbox, tmp_path: Path) -> None:
    local = tmp_path / "local"
    (local / "deep/er").mkdir(parents=True)
    (local / "deep/er/data.bin").write_bytes(os.urandom(3_000_000))
    (local / "empty").touch()
    (local / "run.sh").write_text("#!/bin/sh\necho ran\n")
    (local / "run.sh").chmod(0o755)
    (local / "link").symlink_to("deep/er")
    os.mkfifo(local / "fifo")
    unpacked = await sandbox.upload_dir(local, "/work/in")
    assert (unpacked.path, unpacked.entries) == ("/work/in", 6)
    assert (await sandbox.exec("./run.sh; ls link", cwd="/work/in")).stdout.text == "ran\ndata.bin\n"
    (local / "fifo").unlink()
    back = tmp_path / "back"
    assert await sandbox.download_dir("/work/in", back) == 3
    assert tree(back) == tree(local)
    assert (back / "run.sh").stat().st_mode & 0o777 == 0o755


@container
@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_archive_is_refused(sandbox: BoundSandbox, name: str) -> None:
    with pytest.raises(SandboxError) as failed:
        await sandbox.client.unpack(sandbox.id, "/work/in", tar_of(*HOSTILE[name]))
    assert (failed.value.code, failed.value.status) == (Code.ARCHIVE_REFUSED, 400)
    outside = "ls -A /tmp; find / -xdev -name out; find /work/in ! -type d ! -type l"
    assert (await sandbox.exec(outside)).stdout.text == ""


@container
@pytest.mark.parametrize("data", [b"no tar at all" * 100, tar_of(member("a", size=9999))[:3000]])
async def test_what_is_no_archive_is_refused(sandbox: BoundSandbox, data: bytes) -> None:
    with pytest.raises(SandboxError) as failed:
        await sandbox.client.unpack(sandbox.id, "in", data)
    assert failed.value.code == Code.ARCHIVE_REFUSED


@container
async def test_nothing_is_written_through_a_link(sandbox: BoundSandbox) -> None:
    await sandbox.exec("mkdir -p /work/in; ln -s /tmp /work/in/link")
    with pytest.raises(SandboxError):
        await sandbox.client.unpack(sandbox.id, "/work/in", tar_of(member("link/out", size=1)))
    assert (await sandbox.exec("ls -A /tmp")).stdout.text == ""


@container
async def test_devices_and_links_out_do_not_come_down(sandbox: BoundSandbox, tmp_path: Path) -> None:
    await sandbox.exec("mkdir d; ln -s /etc/passwd d/out; mkfifo d/fifo; echo x > d/x; ln -s x d/in")
    await sandbox.download_dir("d", tmp_path / "d")
    assert tree(tmp_path / "d") == {"x": b"x\n", "in": "x"}


@container
async def test_a_download_has_a_limit_and_a_missing_directory_a_code(
    sandbox: BoundSandbox, tmp_path: Path
) -> None:
    await sandbox.exec("mkdir d; head -c 3000000 /dev/zero > d/big")
    with pytest.raises(SandboxError):
        await sandbox.download_dir("d", tmp_path / "d", max_bytes=1_000_000)
    assert not (tmp_path / "d").exists()
    with pytest.raises(SandboxError) as failed:
        await sandbox.download_dir("/no/such", tmp_path / "d")
    assert failed.value.code == Code.FILE_NOT_FOUND


@container
async def test_a_body_that_breaks_off_is_refused(server: Server, sandbox: BoundSandbox) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield tar_of(member("a", size=100_000))[:50_000]
        raise ConnectionError("the test hangs up")

    url = f"{server.url}/v1/sandboxes/{sandbox.id}/archive"
    with pytest.raises(ConnectionError):
        async with httpx.AsyncClient() as raw:
            await raw.put(url, params={"path": "in"}, content=broken(), headers={"X-API-Key": server.key})
    assert (await sandbox.exec("echo usable")).stdout.text == "usable\n"


@pytest.mark.parametrize("name", [name for name in HOSTILE if name != "parent inside"])
def test_a_hostile_archive_from_a_sandbox_writes_nothing_outside(tmp_path: Path, name: str) -> None:
    inside = tmp_path / "inside"
    with pytest.raises(SandboxError) as failed:
        unpack_here(io.BytesIO(tar_of(*HOSTILE[name])), inside, 1 << 20)
    assert failed.value.code == Code.ARCHIVE_REFUSED
    assert [path.name for path in tmp_path.iterdir()] == ["inside"] and not Path("/tmp/out").exists()


def test_links_of_this_machine_are_not_followed(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    (inside / "link").symlink_to(outside)
    with pytest.raises(SandboxError):
        unpack_here(io.BytesIO(tar_of(member("link/out", size=1))), inside, 1 << 20)
    unpack_here(io.BytesIO(tar_of(member("link", size=1))), inside, 1 << 20)
    assert (inside / "link").read_bytes() == b"x" and not any(outside.iterdir())


def test_a_link_of_the_archive_is_made_last(tmp_path: Path) -> None:
    data = tar_of(member("d", tarfile.SYMTYPE, "e"), member("e/x", size=1), member("e/y", size=1))
    assert unpack_here(io.BytesIO(data), tmp_path, 1 << 20) == 2
    assert (tmp_path / "d" / "x").read_bytes() == b"x"


def test_an_archive_that_unpacks_to_too_much(tmp_path: Path) -> None:
    with pytest.raises(TooLarge):
        unpack_here(io.BytesIO(tar_of(member("a", size=2000))), tmp_path, 1000)
