"""The engines that run on this machine, one server each, and a fresh sandbox for every attempt."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from ordinary import Ordinary
from serverkit import Server, state_of, traces

from runtime_server import archives
from runtime_server.images import DEFAULT_IMAGE, default_store, ensure

from .kit import Field, World

ROOT = os.getuid() == 0


async def _neighbour(server: Server) -> str:
    async with server.client() as client:
        made = await client.create()
        await client.renew(made.id, 86_400)
        return made.id


@contextmanager
def _as_root() -> Iterator[Server]:
    ensure(default_store())
    yield from _run(Server.start())


@contextmanager
def _as_user() -> Iterator[Server]:
    """Rootless, in the account of somebody who is nobody on this machine."""
    ensure(default_store())
    with tempfile.TemporaryDirectory(prefix="orc-escape-") as folder:
        Path(folder).chmod(0o755)
        archive = Path(folder, "sandbox.tar")
        archives.save(default_store(), DEFAULT_IMAGE, archive)
        user = Ordinary.create(Path(folder, "user"), number=1)
        try:
            done = user.run("-m", "runtime_server.images", "ensure", "--from", str(archive))
            assert done.returncode == 0, done.stderr
            yield from _run(Server.start(user=user))
            assert user.processes() == {}
        finally:
            user.remove()


def _run(server: Server) -> Iterator[Server]:
    """Whatever was tried, the server ends as it should and leaves nothing."""
    folders = state_of(server.process.pid)
    yield server
    assert server.stop() == 0
    assert traces(folders) == []


@contextmanager
def _as_nothing() -> Iterator[Server]:
    """The engine that is no sandbox."""
    yield from _run(Server.start("--engine", "process"))


ENGINES: dict[str, Callable[[], AbstractContextManager[Server]]] = {
    "podman, root": _as_root,
    "podman, ordinary user": _as_user,
    "process": _as_nothing,
}
LACKING = {
    "podman, root": "" if ROOT else "needs root",
    "process": "",
    "podman, ordinary user": "" if ROOT and shutil.which("newuidmap") else "needs root, and newuidmap",
}


@pytest.fixture(scope="session", params=list(ENGINES))
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    if LACKING[request.param]:
        pytest.skip(LACKING[request.param])
    with ENGINES[request.param]() as server:
        yield World(request.param, server, asyncio.run(_neighbour(server)))


@pytest.fixture
async def field(world: World) -> AsyncIterator[Field]:
    async with world.server.client() as client, client.sandbox() as bad:
        yield Field(world, client, bad)
