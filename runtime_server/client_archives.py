"""The client's part for directories: up into a sandbox, down from it.

What it is
    `ArchiveCalls`, a base of `Client`: `upload_dir`, `download_dir`, and the tar streams they are made of.

What it does not do
    What a sandbox sends is not trusted: only regular files, directories, and symbolic links that stay inside
    are taken, nothing is written through a link, and no more than was asked for.
"""

from __future__ import annotations

import asyncio
import os
import posixpath
import tarfile
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import IO

from runtime_server import wire
from runtime_server.client_calls import CALL_S, Calls, Content, Dropped, parse
from runtime_server.errors import BadRequest, TooLarge, Unavailable
from runtime_server.wire import Code

IN_MEMORY = 8 << 20
PIECE = 1 << 18
DOWN_MAX = 1 << 30
ARCHIVE_S = 30 * CALL_S


class ArchiveCalls(Calls):
    """Tar streams of a sandbox, and directories of this machine."""

    async def unpack(self, sandbox: str, path: str, tar: Content) -> wire.Unpacked:
        """A tar into the directory `path` of the sandbox, which is made."""
        where, headers = f"/v1/sandboxes/{sandbox}/archive", {"Content-Type": "application/x-tar"}
        got = await self._send(
            "PUT",
            where,
            params={"path": path},
            content=tar,
            headers=headers,
            timeout_s=ARCHIVE_S,
            again=True,
        )
        return parse(got, wire.Unpacked)

    async def pack(
        self, sandbox: str, path: str, max_bytes: int | None = None
    ) -> AsyncGenerator[bytes, None]:
        """A tar of a directory, or a file, of the sandbox."""
        params = {"path": path} | ({} if max_bytes is None else {"max_bytes": str(max_bytes)})
        where = f"/v1/sandboxes/{sandbox}/archive"
        try:
            async with self._open("GET", where, params=params, timeout_s=2 * CALL_S) as response:
                async for data in response.aiter_bytes():
                    yield data
        except Dropped as error:
            raise Unavailable(str(error), Code.UNREACHABLE) from error

    async def upload_dir(self, sandbox: str, local: Path, remote: str) -> wire.Unpacked:
        """Everything in the directory `local`: files, directories, links; no devices, FIFOs, sockets."""
        with tempfile.SpooledTemporaryFile(IN_MEMORY) as spool:
            await asyncio.to_thread(_pack, local, spool)
            return await self.unpack(sandbox, remote, lambda: _read(spool))

    async def download_dir(self, sandbox: str, remote: str, local: Path, max_bytes: int = DOWN_MAX) -> int:
        """A directory of the sandbox into `local`, which is made; how many files. TooLarge, BadRequest."""
        with tempfile.SpooledTemporaryFile(IN_MEMORY) as spool:
            size = 0
            async with aclosing(self.pack(sandbox, remote, max_bytes)) as chunks:
                async for data in chunks:
                    if (size := size + len(data)) > max_bytes:
                        raise TooLarge(f"{remote} of {sandbox} has more than {max_bytes} bytes")
                    await asyncio.to_thread(spool.write, data)
            spool.seek(0)
            return await asyncio.to_thread(unpack_here, spool, local, max_bytes)


async def _read(spool: IO[bytes]) -> AsyncIterator[bytes]:
    spool.seek(0)
    while data := await asyncio.to_thread(spool.read, PIECE):
        yield data


def _pack(local: Path, spool: IO[bytes]) -> None:
    if not local.is_dir():
        raise BadRequest(f"{local} is no directory", Code.FILE_NOT_FOUND)
    with tarfile.open(fileobj=spool, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for child in sorted(local.iterdir()):
            tar.add(child, child.name, filter=_taken)


def _taken(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Whose files they are here means nothing there."""
    if not (member.isfile() or member.isdir() or member.issym() or member.islnk()):
        return None
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


def unpack_here(packed: IO[bytes], local: Path, max_bytes: int) -> int:
    """Links come last, when nothing can be written through them any more. BadRequest, TooLarge."""
    local.mkdir(parents=True, exist_ok=True)
    links: list[tuple[Path, str]] = []
    count = left = 0
    try:
        with tarfile.open(fileobj=packed, mode="r:") as tar:
            for member in tar:
                left += member.size
                if left > max_bytes:
                    raise TooLarge(f"the archive unpacks to more than {max_bytes} bytes")
                where = _place(local, member.name)
                if member.issym():
                    links.append((where, _inside(member)))
                elif member.isdir():
                    _folder(local, where)
                elif member.isreg():
                    count += 1
                    _file(tar, member, local, where)
                else:
                    raise _refused(member.name, "is no file, directory or symbolic link")
    except tarfile.TarError as error:
        raise BadRequest(f"the sandbox sent no tar: {error}", Code.ARCHIVE_REFUSED) from None
    for where, target in links:
        _folder(local, where.parent)
        where.unlink(missing_ok=True) if where.is_symlink() or where.is_file() else None
        where.symlink_to(target)
    return count


def _refused(name: str, why: str) -> BadRequest:
    return BadRequest(f"the archive's entry {name[:200]!r} {why}", Code.ARCHIVE_REFUSED)


def _place(local: Path, name: str) -> Path:
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or "\0" in name:
        raise _refused(name, "leads out of the directory")
    return local.joinpath(*parts)


def _inside(member: tarfile.TarInfo) -> str:
    target = posixpath.normpath(posixpath.join(posixpath.dirname(member.name), member.linkname))
    if member.linkname.startswith("/") or target == ".." or target.startswith("../"):
        raise _refused(member.name, "is a link that leads out of the directory")
    return member.linkname


def _folder(local: Path, where: Path) -> None:
    """Made, step by step, so that no step is a link."""
    at = local
    for part in where.relative_to(local).parts:
        at = at / part
        if at.is_symlink() or (at.exists() and not at.is_dir()):
            raise _refused(str(at.relative_to(local)), "would be written through a link or a file")
        at.mkdir(exist_ok=True)


def _file(tar: tarfile.TarFile, member: tarfile.TarInfo, local: Path, where: Path) -> None:
    if where == local:
        raise _refused(member.name, "has no name")
    _folder(local, where.parent)
    if where.is_symlink():
        where.unlink()
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
    source = tar.extractfile(member)
    assert source is not None
    with os.fdopen(os.open(where, flags, 0o600), "wb") as target:
        while data := source.read(PIECE):
            target.write(data)
        os.fchmod(target.fileno(), member.mode & 0o755 | 0o600)
