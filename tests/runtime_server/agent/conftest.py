"""What tests of the agent share; `agentkit` is how they speak to it."""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from agentkit import Sandbox, running

from runtime_server.agent import build


@pytest.fixture(scope="session")
def binary() -> Path:
    return build.agent_binary()


@pytest.fixture(scope="session")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of the compiled hostile.c, where every user may run it."""
    output = tmp_path_factory.mktemp("hostile") / "hostile"
    compiler = list(build.compilers(build.host_arch()))[-1]  # the system's, where there is one: it is quicker
    source = Path(__file__).with_name("hostile.c")
    subprocess.run([*compiler, "-O1", "-static", "-pthread", "-o", output, source], check=True, timeout=100)
    return str(output)


@pytest.fixture
async def sandbox(binary: Path) -> AsyncIterator[Sandbox]:
    async with running(binary) as one:
        yield one
