"""What could not be removed at first is removed later; what is over is not remembered for ever."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from runtime_server import wire
from runtime_server.births import KEYS_KEPT, Birth, Births
from runtime_server.errors import Internal
from runtime_server.places import Places
from runtime_server.removal import remove

BOX: Any = SimpleNamespace(id="s-1", container="c", io=Path("/io"))


class Stubborn:
    """An engine whose service is away for some calls."""

    def __init__(self, failures: int) -> None:
        self.failures, self.killed, self.removed = failures, 0, 0

    async def kill(self, _: object) -> None:
        self.killed += 1

    async def remove(self, _: object, __: Path) -> None:
        if self.failures:
            self.failures -= 1
            raise Internal("Podman does not answer")
        self.removed += 1


async def test_removed_as_soon_as_it_can_be(caplog: pytest.LogCaptureFixture) -> None:
    engine: Any = Stubborn(2)
    assert await remove(engine, BOX, asyncio.Semaphore(1), (0.001, 0.001, 0.001))
    assert (engine.killed, engine.removed) == (2, 1)
    assert "s-1 is not removed yet: Podman does not answer" in caplog.text


async def test_given_up_in_the_end_and_said(caplog: pytest.LogCaptureFixture) -> None:
    engine: Any = Stubborn(9)
    assert not await remove(engine, BOX, asyncio.Semaphore(1), (0.001,))
    assert "could not be removed" in caplog.text


async def test_keys_of_what_is_over_are_forgotten_those_of_the_living_never() -> None:
    births, ticket = Births(), Places(1).seat()
    for number in range(4 * KEYS_KEPT):
        birth = Birth(wire.CreateSandbox(), "image", ticket, key=f"key-{number}")
        birth.task = asyncio.get_running_loop().create_future()
        birth.task.set_result(SimpleNamespace(reason="" if number % 100 == 0 else "deleted"))  # type: ignore[arg-type]
        births.remember(birth)
    living = [f"key-{number}" for number in range(0, 4 * KEYS_KEPT, 100)]
    assert all(births.known(key, wire.CreateSandbox()) for key in living)
    assert births.known(f"key-{4 * KEYS_KEPT - 1}", wire.CreateSandbox()) is not None
    assert len(births._keys) < 2 * KEYS_KEPT
