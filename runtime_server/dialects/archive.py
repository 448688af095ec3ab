"""Zip files in and out of a sandbox. The agent speaks tar, and unpacks it inside; here names are translated.

What it is
    `unzip` sends a zip's regular files and directories to be unpacked below a directory; `zipped` makes a
    zip of what is there.

What it does not do
    Nothing is extracted on this machine, and no link, device or absolute name of a zip is taken over.
"""

from __future__ import annotations

import asyncio
import io
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import AsyncIterator, Iterator
from typing import IO

from runtime_server.box import Box

ENTRIES_MAX = 100_000
UNPACKED_MAX = 4 << 30
CHUNK = 1 << 18


class Refused(Exception):
    """The archive is not one that is taken; the message says why."""


def _name(info: zipfile.ZipInfo) -> str:
    name = info.filename.replace("\\", "/")
    if name.startswith("/") or ".." in name.split("/") or "\0" in name:
        raise Refused(f"the archive has the name {info.filename[:200]!r}, which leads out of its directory")
    return name.strip("/")


def _member(info: zipfile.ZipInfo) -> tarfile.TarInfo | None:
    """As tar has it; None for what is skipped."""
    name, mode = _name(info), info.external_attr >> 16
    if not name:
        return None
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise Refused(f"{info.filename[:200]!r} is a link or a device: only files and directories are taken")
    member = tarfile.TarInfo(name)
    if info.is_dir():
        member.type, member.mode = tarfile.DIRTYPE, mode & 0o777 or 0o755
    else:
        member.size, member.mode = info.file_size, mode & 0o777 or 0o644
    return member


def as_tar(packed: IO[bytes]) -> Iterator[bytes]:
    """A zip as the chunks of a tar. Raises Refused."""
    try:
        with zipfile.ZipFile(packed) as archive:
            infos = archive.infolist()
            if len(infos) > ENTRIES_MAX or sum(info.file_size for info in infos) > UNPACKED_MAX:
                raise Refused(f"more than {ENTRIES_MAX} entries, or than {UNPACKED_MAX >> 20} MiB unpacked")
            for info in infos:
                yield from _entry(archive, info)
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError) as error:
        raise Refused(f"this is no zip file that can be read: {error}") from None
    yield b"\0" * 1024


def _entry(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Iterator[bytes]:
    if (member := _member(info)) is None:
        return
    yield member.tobuf(tarfile.PAX_FORMAT)
    if member.isdir():
        return
    with archive.open(info) as file:  # it checks sizes and sums
        while chunk := file.read(CHUNK):
            yield chunk
    if info.file_size % 512:
        yield b"\0" * (512 - info.file_size % 512)


async def _threaded(chunks: Iterator[bytes]) -> AsyncIterator[bytes]:
    """Decompression is work: not in the event loop."""
    while (chunk := await asyncio.to_thread(next, chunks, None)) is not None:
        yield chunk


async def unzip(box: Box, packed: IO[bytes], directory: str) -> int:
    """Unpack a zip below a directory, which is made. Refused, SandboxError."""
    async with box.in_use():
        return await box.agent.unpack(directory, _threaded(as_tar(packed)), UNPACKED_MAX, ENTRIES_MAX)


async def zipped(box: Box, path: str, max_bytes: int) -> IO[bytes]:
    """A zip of a directory (names relative to it) or of one file. The file is gone when it is closed."""
    tar = tempfile.SpooledTemporaryFile(CHUNK)  # noqa: SIM115 - closed below, or given away
    async with box.in_use():
        async for chunk in box.agent.pack(path, max_bytes):
            await asyncio.to_thread(tar.write, chunk)
    try:
        return await asyncio.to_thread(_as_zip, tar)
    finally:
        tar.close()


def _as_zip(tar: IO[bytes]) -> IO[bytes]:
    made = tempfile.SpooledTemporaryFile(CHUNK * 4)  # noqa: SIM115 - the caller's
    tar.seek(0)
    with tarfile.open(fileobj=tar) as source, zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as target:
        for member in source:
            if member.isreg() and (inside := source.extractfile(member)):
                info = zipfile.ZipInfo(member.name.removeprefix("./"))
                info.external_attr = (stat.S_IFREG | member.mode) << 16
                info.compress_type = zipfile.ZIP_DEFLATED
                with target.open(info, "w", force_zip64=True) as out:
                    while chunk := inside.read(CHUNK):
                        out.write(chunk)
    made.seek(0, io.SEEK_SET)
    return made
