"""Archives: what goes in and out, what is left out or refused, and that nothing is written through a link."""

from __future__ import annotations

import asyncio
import io
import os
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from agentkit import Sandbox

from runtime_server.agent import AgentError

MUCH = 1 << 30
Entry = tuple[str, bytes, str, int]  # name, type, where a link points, size


async def pieces(data: bytes, size: int = 50_000) -> AsyncIterator[bytes]:
    for at in range(0, len(data), size):
        yield data[at : at + size]


async def packed(sandbox: Sandbox, path: Path, most: int = MUCH) -> tarfile.TarFile:
    data = b"".join([part async for part in sandbox.agent.pack(str(path), most)])
    return tarfile.open(fileobj=io.BytesIO(data))


def tar(*entries: Entry, form: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for name, kind, link, size in entries:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, link, size
            archive.addfile(info, io.BytesIO(b"z" * size))
    return buffer.getvalue()


def a_tree(top: Path) -> Path:
    (top / "deep" / "er").mkdir(parents=True)
    (top / "empty").mkdir()
    (top / "deep" / "er" / "bytes").write_bytes(os.urandom(3_000_001))
    (top / "script").write_text("#!/bin/sh\n")
    (top / "script").chmod(0o755)
    (top / ("long" * 40)).write_text("long name")
    (top / "deep" / "link").symlink_to("../script")
    return top


async def test_what_goes_out_comes_in_the_same(sandbox: Sandbox) -> None:
    source = a_tree(sandbox.directory / "source")
    stream = sandbox.agent.pack(str(source), MUCH)
    target = sandbox.directory / "made" / "target"
    assert await sandbox.agent.unpack(str(target), stream, MUCH) == 7
    assert sorted(p.relative_to(target) for p in target.rglob("*")) == sorted(
        p.relative_to(source) for p in source.rglob("*")
    )
    assert (target / "deep/er/bytes").read_bytes() == (source / "deep/er/bytes").read_bytes()
    assert (target / "script").stat().st_mode & 0o7777 == 0o755
    assert (target / "deep/link").readlink() == Path("../script")
    times = [(place / "script").stat().st_mtime for place in (source, target)]
    assert int(times[0]) == int(times[1])


async def test_a_file_alone(sandbox: Sandbox) -> None:
    file = sandbox.directory / "one"
    file.write_bytes(b"content")
    archive = await packed(sandbox, file)
    assert archive.getnames() == ["one"]
    member = archive.extractfile("one")
    assert member is not None and member.read() == b"content"


async def test_left_out_when_packing(sandbox: Sandbox) -> None:
    top = a_tree(sandbox.directory / "source")
    os.mkfifo(top / "fifo")
    (top / "absolute").symlink_to("/etc/passwd")
    (top / "up").symlink_to("../outside")
    (top / "deep" / "sly").symlink_to("er/../../../outside")
    await sandbox.sh(f"cp -a /dev/null {top}/device 2>/dev/null || :")
    names = (await packed(sandbox, top)).getnames()
    assert not {"fifo", "absolute", "up", "deep/sly", "device"} & set(names) and "deep/link" in names


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
async def test_formats(sandbox: Sandbox, form: int) -> None:
    name = "d" * 90 + "/" + "f" * 90
    data = tar((name, tarfile.REGTYPE, "", 1000), ("h", tarfile.LNKTYPE, "x", 0), form=form)
    data = tar(("x", tarfile.REGTYPE, "", 5), form=form)[:1024] + data
    assert await sandbox.agent.unpack(str(sandbox.directory / "t"), pieces(data), MUCH) == 3
    assert (sandbox.directory / "t" / name).read_bytes() == b"z" * 1000
    assert (sandbox.directory / "t" / "h").read_bytes() == b"zzzzz"


REG, SYM, HARD, DIR = tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE
HOSTILE: dict[str, tuple[Entry, ...]] = {
    "absolute name": (("/tmp/x", REG, "", 1),),
    "dot dot": (("../x", REG, "", 1),),
    "dot dot inside": (("a/../../x", REG, "", 1),),
    "fifo": (("f", tarfile.FIFOTYPE, "", 0),),
    "device": (("c", tarfile.CHRTYPE, "", 0),),
    "block device": (("b", tarfile.BLKTYPE, "", 0),),
    "absolute link": (("s", SYM, "/etc", 0),),
    "link out": (("s", SYM, "../..", 0),),
    "link out by a detour": (("d/s", SYM, "a/../../../x", 0),),
    "through a link": (("t", DIR, "", 0), ("s", SYM, "t", 0), ("s/x", REG, "", 1)),
    "link under a link": (("s", SYM, ".", 0), ("s/t", SYM, "x", 0)),
    "hard link out": (("h", HARD, "/etc/passwd", 0),),
    "hard link up": (("h", HARD, "../../etc/passwd", 0),),
    "hard link to a link": (("s", SYM, "x", 0), ("h", HARD, "s", 0)),
    "hard link through a link": (("t/x", REG, "", 1), ("s", SYM, "t", 0), ("h", HARD, "s/x", 0)),
    "file over a directory": (("d", DIR, "", 0), ("d/x", REG, "", 1), ("d", REG, "", 1)),
    "too many": tuple((str(n), REG, "", 0) for n in range(60)),
    "too much": (("big", REG, "", 2_000_000),),
    "nameless": (("", REG, "", 1),),
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_refused(sandbox: Sandbox, name: str) -> None:
    target = sandbox.directory / "deep" / "target"
    before = sorted(sandbox.directory.iterdir())
    with pytest.raises(AgentError) as refused:
        await sandbox.agent.unpack(str(target), pieces(tar(*HOSTILE[name])), 1_000_000, 50)
    assert refused.value.errno > 0 and sorted(sandbox.directory.iterdir()) == sorted(
        [*before, sandbox.directory / "deep"]
    )
    assert not any(not path.resolve().is_relative_to(target) for path in target.rglob("*"))


async def test_never_through_a_link_that_was_there(sandbox: Sandbox) -> None:
    target, outside = sandbox.directory / "target", sandbox.directory / "outside"
    target.mkdir()
    outside.mkdir()
    (target / "out").symlink_to(outside)
    (target / "file").symlink_to(outside / "victim")
    with pytest.raises(AgentError):
        await sandbox.agent.unpack(str(target), pieces(tar(("out/x", REG, "", 1))), MUCH)
    await sandbox.agent.unpack(str(target), pieces(tar(("file", REG, "", 3))), MUCH)
    assert list(outside.iterdir()) == [] and (target / "file").read_bytes() == b"zzz"
    assert not (target / "file").is_symlink()


@pytest.mark.parametrize("data", [b"", b"x" * 100, os.urandom(5000), b"\x1f\x8b" + bytes(2000), bytes(511)])
async def test_no_archive(sandbox: Sandbox, data: bytes) -> None:
    with pytest.raises(AgentError) as refused:
        await sandbox.agent.unpack(str(sandbox.directory / "t"), pieces(data), MUCH)
    assert refused.value.errno == 22


async def test_cut_off_anywhere(sandbox: Sandbox) -> None:
    whole = tar(("a", REG, "", 700), ("b" * 150, REG, "", 10))
    for size in range(0, 4000, 250):
        with pytest.raises(AgentError):
            await sandbox.agent.unpack(str(sandbox.directory / "t"), pieces(whole[:size]), MUCH)


async def test_set_id_bits_are_dropped(sandbox: Sandbox) -> None:
    info = tarfile.TarInfo("tool")
    info.mode = 0o6755
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(info)
    await sandbox.agent.unpack(str(sandbox.directory / "t"), pieces(buffer.getvalue()), MUCH)
    assert (sandbox.directory / "t" / "tool").stat().st_mode & 0o7777 == 0o755


async def test_packing_has_bounds(sandbox: Sandbox) -> None:
    source = a_tree(sandbox.directory / "source")
    with pytest.raises(AgentError, match="larger"):
        await packed(sandbox, source, 10_000)
    for wrong in ("relative", "/nonexistent", "/dev/zero"):
        with pytest.raises(AgentError):
            await packed(sandbox, Path(wrong))


async def test_a_reader_that_stops_holds_up_nobody(sandbox: Sandbox) -> None:
    source = a_tree(sandbox.directory / "source")
    stream = sandbox.agent.pack(str(source), MUCH)
    assert await anext(aiter(stream))
    assert (await sandbox.run("echo", "alive")).stdout.data == b"alive\n"
    await stream.aclose()
    assert (await packed(sandbox, source)).getnames()


async def test_a_sender_that_fails_leaves_nothing_running(sandbox: Sandbox) -> None:
    async def fails() -> AsyncIterator[bytes]:
        yield tar(("a", REG, "", 700))[:600]
        raise RuntimeError("the upload broke")

    with pytest.raises(RuntimeError):
        await sandbox.agent.unpack(str(sandbox.directory / "t"), fails(), MUCH)
    assert await asyncio.wait_for(sandbox.settles(), 10)
