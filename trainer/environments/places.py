"""Workspaces as a judge needs them: files in and out, processes ended, and a fresh one beside.

What it is
    `SandboxPlace` and `LocalPlace` give `trainer.rewards` what it asks of a `Place`. What the policy did to
    its files is `Spoilt`, and so worth nothing; what infrastructure did is `Lost`, as everywhere.

How to use it
    verdict = await judge(task, SandboxPlace(workspace), answer)

What it does not do
    It judges nothing. `LocalPlace` has no sandbox around it, like everything of `environments.local`.
"""

from __future__ import annotations

import asyncio
import io
import os
import tarfile
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self, cast

from runtime_server.errors import SandboxError
from runtime_server.wire import Code
from trainer.environments import CommandResult
from trainer.rewards import Spoilt
from trainer.tasks import Task

if TYPE_CHECKING:
    from trainer.environments.local import LocalWorkspace
    from trainer.environments.workspace import SandboxWorkspace

CALL_S = 120.0
NOBODY = 65534
_SPOILT = {
    Code.BAD_REQUEST,
    Code.TOO_LARGE,
    Code.FILE_ERROR,
    Code.FILE_NOT_FOUND,
    Code.ARCHIVE_REFUSED,
}
"""What a policy can bring about: a folder where a file must go, a directory that it removed, a full disk."""


def unhidden(task: Task) -> Task:
    """The same task for a judge: nothing of its image is hidden from that one."""
    return replace(task, setup=replace(task.setup, hidden=[]))


class Archives(Protocol):
    """The part of `runtime_server.client.Client` that moves directories."""

    async def read_file(self, sandbox: str, path: str) -> bytes: ...

    def pack(self, sandbox: str, path: str, max_bytes: int | None = None) -> AsyncGenerator[bytes, None]: ...

    async def unpack(self, sandbox: str, path: str, tar: bytes) -> object: ...


class SandboxPlace:
    """One sandbox of the runtime server."""

    def __init__(self, workspace: SandboxWorkspace) -> None:
        self._workspace, self._sandbox = workspace, workspace.sandbox

    async def run(self, command: str, timeout_s: float, max_output: int) -> CommandResult:
        return await self._workspace.run(command, timeout_s, max_output)

    async def kill(self) -> None:
        with self._spoilt():
            async with asyncio.timeout(CALL_S):
                await self._workspace.client.kill(self._sandbox.id)

    async def write(self, files: Mapping[str, str]) -> None:
        with self._spoilt():
            await self._workspace._write(files)

    async def read(self, path: str, limit: int) -> bytes | None:
        with self._spoilt():
            try:
                async with asyncio.timeout(CALL_S):
                    content = await (await self._archives()).read_file(self._sandbox.id, self._at(path))
            except SandboxError as error:
                if error.code in (Code.FILE_NOT_FOUND, Code.FILE_ERROR):
                    return None
                raise
        return content[:limit]

    async def pack(self, limit: int) -> bytes:
        packed = bytearray()
        with self._spoilt():
            async with asyncio.timeout(CALL_S):
                archives = await self._archives()
                async with aclosing(archives.pack(self._sandbox.id, self._at(""), limit)) as pieces:
                    async for piece in pieces:
                        packed += piece
        return bytes(packed)

    async def unpack(self, tar: bytes) -> None:
        with self._spoilt():
            async with asyncio.timeout(CALL_S):
                await (await self._archives()).unpack(self._sandbox.id, self._at(""), tar)

    @asynccontextmanager
    async def fresh(self) -> AsyncIterator[Self]:
        async with self._workspace.again(unhidden(self._workspace.task)) as other:
            yield type(self)(cast("SandboxWorkspace", other))

    async def _archives(self) -> Archives:
        return cast("Archives", await self._workspace._running())

    def _at(self, path: str) -> str:
        return self._workspace._at(path) or "."

    @contextmanager
    def _spoilt(self) -> Iterator[None]:
        from trainer.environments.workspace import blame

        with blame("hidden test", policy=True):
            try:
                yield
            except SandboxError as error:
                if error.code in _SPOILT:
                    raise Spoilt(f"the hidden test could not be run: {error}") from error
                raise


class LocalPlace:
    """A directory of this machine."""

    def __init__(self, workspace: LocalWorkspace) -> None:
        self._workspace, self._folder = workspace, workspace.folder

    async def run(self, command: str, timeout_s: float, max_output: int) -> CommandResult:
        return await self._workspace.run(command, timeout_s, max_output)

    async def kill(self) -> None:
        """The shell that stays; of a single command nothing is left."""
        await self._workspace.close()

    async def write(self, files: Mapping[str, str]) -> None:
        with _spoilt():
            for name, content in files.items():
                path = self._at(name)
                self._folder_for(path)
                path.write_text(content)
                _hand_over(path)

    async def read(self, path: str, limit: int) -> bytes | None:
        try:
            file = self._at(path)
            if not file.is_file():  # nor a pipe, at which reading would wait
                return None
            with file.open("rb") as opened:
                return opened.read(limit)
        except (OSError, Spoilt):
            return None

    async def pack(self, limit: int) -> bytes:
        packed = io.BytesIO()
        with _spoilt(), tarfile.open(fileobj=packed, mode="w") as tar:
            for path in sorted(self._folder.rglob("*")):
                if path.is_file() and not path.is_symlink():
                    tar.add(path, str(path.relative_to(self._folder)))
                if packed.tell() > limit:
                    raise Spoilt(f"the work is larger than {limit} bytes")
        return packed.getvalue()

    async def unpack(self, tar: bytes) -> None:
        with _spoilt(), tarfile.open(fileobj=io.BytesIO(tar), mode="r:") as packed:
            for member in packed:
                path = self._at(member.name)
                self._folder_for(path)
                content = packed.extractfile(member)
                path.write_bytes(content.read() if content else b"")
                path.chmod(member.mode)
                _hand_over(path)

    @asynccontextmanager
    async def fresh(self) -> AsyncIterator[Self]:
        async with self._workspace.again(unhidden(self._workspace.task)) as other:
            yield type(self)(cast("LocalWorkspace", other))

    def _at(self, name: str) -> Path:
        path = (self._folder / name).resolve()
        if not path.is_relative_to(self._folder.resolve()):
            raise Spoilt(f"{name} leads out of the working directory")
        return path

    def _folder_for(self, path: Path) -> None:
        missing = [folder for folder in path.parents if not folder.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        for folder in missing:
            _hand_over(folder)


@contextmanager
def _spoilt() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Spoilt(f"the hidden test could not be brought in: {error}") from error


def _hand_over(path: Path) -> None:
    if os.geteuid() == 0:
        os.chown(path, NOBODY, NOBODY)
