"""Root directories for containers that run already: overlays of an image's layers, snapshots of what changed.

What it is
    `Layers` keeps two helpers (`dresser.py`) inside the namespaces of the engine's service: one that gives
    containers their root directory and must answer in a millisecond, one that copies and removes.
    A writable layer is a directory of ours, so a snapshot is a copy of it (blocks are shared where the
    filesystem can), and a fork is one more overlay on that copy: no image is made, nothing is unpacked.

What it does not do
    It starts no container. Where the kernel cannot (before 5.2, no overlay of its own, SELinux labels)
    `start` says so, and sandboxes are made by Podman alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import json
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime_server.engines import AGENT, IO, dresser
from runtime_server.engines.state import State
from runtime_server.errors import BadRequest, Full, Internal, SandboxError
from runtime_server.wire import Code

START_S, DRESS_S, COPY_S = 10.0, 20.0, 600.0
LOWER_MAX = 500  # the kernel's limit of layers in one overlay
SELINUX = Path("/sys/fs/selinux/enforce")


@dataclass(frozen=True)
class Frozen:
    """A writable layer as it was: where the copy is, how big, and its digest if that was cheap to know."""

    path: Path
    size: int
    digest: str


class Helper:
    """One `dresser.py`. Requests wait their turn; it ends with this process, whose pipe it reads."""

    def __init__(self, service: int, here: Path) -> None:
        user = ["-U", "--preserve-credentials"] if os.getuid() else []
        enter = ["nsenter", *user, "-m", "-t", str(service)]
        self._command = [*enter, sys.executable, "-I", "-S", dresser.__file__, str(here)]
        self._process: Process | None = None
        self._turn = asyncio.Lock()
        self._over = False

    async def start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            *self._command, stdin=PIPE, stdout=PIPE, start_new_session=True, limit=1 << 20
        )
        await self._answer(START_S)

    async def ask(self, timeout_s: float, **request: Any) -> dict[str, Any]:
        """Internal when it fails; a helper that does not answer in time is given up.

        Who stops waiting must not leave an answer behind for the next one: the exchange goes on.
        """
        return await asyncio.shield(asyncio.ensure_future(self._exchange(timeout_s, request)))

    async def _exchange(self, timeout_s: float, request: dict[str, Any]) -> dict[str, Any]:
        async with self._turn:
            if self._over:
                raise Internal("the engine has stopped", Code.SERVER_DRAINING)
            if self._process is None or self._process.returncode is not None:
                await self.start()
            process = self._process
            assert process is not None and process.stdin is not None
            process.stdin.write(json.dumps(request).encode() + b"\n")
            return await self._answer(timeout_s)

    async def _answer(self, timeout_s: float) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None
        try:
            async with asyncio.timeout(timeout_s):
                line = await self._process.stdout.readline()
            found: dict[str, Any] = json.loads(line)
        except (TimeoutError, ValueError) as error:
            await self._kill()
            raise Internal("the helper that mounts does not answer", Code.CREATE_FAILED) from error
        return found

    async def stop(self) -> None:
        self._over = True
        await self._kill()

    async def retire(self) -> None:
        """Once what was asked before is done."""
        async with self._turn:
            await self.stop()

    async def _kill(self) -> None:
        """The next request starts another."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


MOUNTED = ("proc", "sys", "dev", "etc", "run", "tmp", "var/tmp", IO)
"""Directories of an empty root that every container mounts something on."""
MOUNTED_FILES = (AGENT, "etc/hosts", "etc/hostname", "etc/resolv.conf", "run/.containerenv")


class Links:
    """Short names of layers, the same for all helpers: the options of one mount have room for 4096 bytes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._names: dict[str, str] = {}
        self._numbers = itertools.count()
        for link in folder.iterdir():  # an earlier server's
            link.unlink()

    def name(self, path: str) -> str:
        if path not in self._names:
            name = format(next(self._numbers), "x")
            (self._folder / name).symlink_to(path)
            self._names[path] = name
        return self._names[path]

    def drop(self, path: str) -> None:
        if (name := self._names.pop(path, None)) is not None:
            (self._folder / name).unlink(missing_ok=True)


class Layers:
    """See the module's docstring. All paths are inside the server's own `State`."""

    def __init__(self, state: State, service: int, links: Links | None = None) -> None:
        self.state, self.links = state, links or Links(state.links)
        self._fast, self._slow = Helper(service, state.here), Helper(service, state.here)
        self._options = ",userxattr" if os.getuid() else ""

    async def start(self, volatile: bool) -> None:
        """Raises SandboxError or OSError where this cannot work."""
        if _labelled():
            raise BadRequest("SELinux wants labels that only Podman gives")
        self._options += ",volatile" if volatile else ""
        # crun makes what it mounts on, and fails when another one beside it is faster
        for name in (dresser.NEW, *MOUNTED):
            (self.state.blank / name.lstrip("/")).mkdir(parents=True, exist_ok=True)
        for name in MOUNTED_FILES:
            (self.state.blank / name.lstrip("/")).touch()
        self.state.blank.chmod(0o755)
        self.state.links.chmod(0o755)
        await asyncio.gather(self._fast.start(), self._slow.start())

    async def stop(self) -> None:
        await asyncio.gather(self._fast.stop(), self._slow.stop())

    async def retire(self) -> None:
        """Others are asked from now on."""
        await asyncio.gather(self._fast.retire(), self._slow.retire())

    async def dress(self, pid: int, name: str, lowers: Sequence[str], workdir: str) -> Path:
        """Give the container of this first process its root; returns its writable layer's folder."""
        folder = self.state.layers / name
        folder.mkdir(mode=0o711)
        try:
            await self._told(
                self._fast,
                DRESS_S,
                do="dress",
                pid=pid,
                links=str(self.state.links),
                lowers=[self.links.name(path) for path in lowers],
                upper=str(folder / "u"),
                work=str(folder / "w"),
                options=self._options,
                workdir=workdir,
            )
        except BaseException:  # whatever stops it, its folder must not stay
            with contextlib.suppress(SandboxError):
                await asyncio.shield(self.remove(folder))
            raise
        return folder

    async def freeze(self, folder: Path, name: str) -> Frozen:
        """Copy a writable layer. Full when there is no room for it."""
        target = self.state.frozen / name
        said = await self._told(self._slow, COPY_S, do="freeze", source=str(folder / "u"), target=str(target))
        return Frozen(target, int(said["bytes"]), str(said["digest"]))

    async def remove(self, folder: Path) -> None:
        """A writable or a frozen layer. Internal when it is still there."""
        self.links.drop(str(folder))
        if (await self._slow.ask(COPY_S, do="remove", path=str(folder))).get("left"):
            raise Internal(f"{folder} could not be removed")

    async def _told(self, helper: Helper, timeout_s: float, **request: Any) -> dict[str, Any]:
        said = await helper.ask(timeout_s, **request)
        if "error" not in said:
            return said
        if said["errno"] in (errno.ENOSPC, errno.EDQUOT):
            raise Full(f"no room left on this node's disk: {said['error']}", errno=said["errno"])
        raise Internal(str(said["error"]), Code.CREATE_FAILED)


def _labelled() -> bool:
    return SELINUX.exists() and SELINUX.read_text().strip() == "1"


def stack(graph: dict[str, Any]) -> tuple[str, ...]:
    """The layers of an image, the top one first, as Podman describes it; () where it has no overlay."""
    data = graph.get("Data") or {}
    if graph.get("Name") != "overlay" or not data.get("UpperDir"):
        return ()
    found = (data["UpperDir"], *(path for path in data.get("LowerDir", "").split(":") if path))
    return found if len(found) < LOWER_MAX else ()


def writable(graph: dict[str, Any] | None) -> Path | None:
    """The layer that a container of Podman's own making writes to; None where that is no overlay."""
    found = ((graph or {}).get("Data") or {}).get("UpperDir")
    return Path(found) if found else None
