"""The journal, the pool of warm containers and the budget of images, by themselves."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

from serverkit import until

from runtime_server.adoption import Told
from runtime_server.agent import AgentConnection
from runtime_server.agent.calls import Wire
from runtime_server.agent.frames import Hello
from runtime_server.engines import Container, Recipe
from runtime_server.engines.podman_api import Api
from runtime_server.engines.podman_images import Images
from runtime_server.journal import HISTORY_MIN, Journal
from runtime_server.pool import Pool, Warm


async def test_what_was_written_is_read_and_a_half_line_is_not(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path, list)
    await asyncio.gather(*(journal.add({"n": n}) for n in range(20)))
    journal.close()
    with path.open("ab") as file:
        file.write(b'{"n": 20')
    assert [entry["n"] for entry in Journal.read(path)] == [*range(20)]
    assert Journal.read(tmp_path / "none") == []
    assert path.stat().st_mode & 0o777 == 0o600


async def test_history_is_left_out(tmp_path: Path) -> None:
    now: dict[str, Any] = {"n": 0}
    journal = Journal(tmp_path / "journal", lambda: [now])
    for number in range(HISTORY_MIN + 10):
        now = {"n": number}
        await journal.add(now)
    found = Journal.read(tmp_path / "journal")
    assert len(found) < HISTORY_MIN and found[-1] == now
    journal.close()


def test_what_is_over_is_not_taken_over() -> None:
    lines: list[dict[str, Any]] = [
        {"birth": {"id": "s-1"}},
        {"birth": {"id": "s-2"}},
        {"box": {"id": "s-1"}, "n": 1},
        {"box": {"id": "s-1"}, "n": 2},
        {"box": {"id": "s-3"}},
        {"over": "s-3"},
        {"over": "never"},
        {"snapshot": {"id": "n-1"}},
        {"snapshot": {"id": "n-2"}},
        {"snapshot_over": "n-1"},
        {"box": "nonsense"},
        {"of": "the future"},
    ]
    told = Told(lines)
    assert {name: entry["n"] for name, entry in told.boxes.items()} == {"s-1": 2}
    assert set(told.births) == {"s-2"} and set(told.snapshots) == {"n-2"}


class _Making:
    """Counts instead of making containers."""

    def __init__(self) -> None:
        self.alive = self.room = 0

    async def make(self) -> Warm:
        self.alive += 1
        agent = AgentConnection(Wire(), 1, Hello(1, {}))
        return Warm(Container(str(self.alive), 1), agent, Path(), Recipe(name="", image="", io=Path()))

    async def drop(self, warm: Warm) -> None:
        await warm.agent.close()
        self.alive -= 1


async def test_the_pool_follows_what_is_wanted_and_what_there_is_room_for() -> None:
    making = _Making()
    making.room = 3
    pool = Pool(making.make, making.drop, lambda: making.room, 0)
    pool.start()
    pool.want({"a": 2, "b": 5, "c": 0})
    await until(lambda: len(pool.ready) == 3)
    assert pool.wanted == {"a": 2, "b": 5}
    first = pool.take(Recipe(name="", image="", io=Path()))
    assert first is not None and pool.take(Recipe(name="", image="", io=Path(), memory_mb=1)) is None
    await until(lambda: len(pool.ready) == 3)
    await pool.ready[0].agent.close()
    await until(lambda: all(not warm.agent.closed for warm in pool.ready) and len(pool.ready) == 3)
    making.room = 1
    await until(lambda: len(pool.ready) == 1)
    pool.want({})
    await until(lambda: making.alive == 1)  # the one that was taken
    await pool.stop()


async def test_the_budget_costs_the_longest_unused_its_place() -> None:
    images = Images(cast(Api, None), 100, 1.0)
    images._pulled = {"old": (60, 1.0), "held": (30, 2.0), "new": (40, 3.0), "newest": (20, 4.0)}
    images.hold("held")
    assert images.victims("newest") == ["old"]
    images._pulled["newest"] = (90, 4.0)
    assert images.victims("newest") == ["old", "new"], "what is in use and what was just pulled stay"
    images.release("held")
    assert images.victims("newest") == ["old", "held", "new"]
