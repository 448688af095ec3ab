"""What tests of the server share: one server per module, and for each test a client and a sandbox of it.

A module with a `server` of its own gets clients and sandboxes of that one.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
from serverkit import Server

from runtime_server.client import BoundSandbox, Client


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    running = Server.start()
    yield running
    assert running.stop() == 0


@pytest.fixture
async def client(server: Server) -> AsyncIterator[Client]:
    async with server.client() as client:
        yield client


@pytest.fixture
async def sandbox(client: Client) -> AsyncIterator[BoundSandbox]:
    async with client.sandbox() as sandbox:
        yield sandbox
