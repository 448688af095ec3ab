"""Doing a thing once: joined while it runs, said again for a while, and never kept without bound."""

from __future__ import annotations

import asyncio
from pathlib import Path

from runtime_server.dialects.common import LARGE_KEPT, Once
from runtime_server.dialects.keys import Keys, given


class Work:
    def __init__(self, answer: str = "x") -> None:
        self.done, self.answer, self.gate = 0, answer, asyncio.Event()

    async def __call__(self) -> str:
        await self.gate.wait()
        self.done += 1
        return f"{self.answer}{self.done}"


async def test_the_same_key_is_joined_and_said_again() -> None:
    once, work = Once[str](), Work()
    waiting = [asyncio.create_task(once.do("a", work)) for _ in range(3)]
    await asyncio.sleep(0)
    work.gate.set()
    assert await asyncio.gather(*waiting) == ["x1"] * 3
    assert await once.do("a", work) == "x1" and await once.do("b", work) == "x2"


async def test_whoever_leaves_ends_nothing() -> None:
    once, work = Once[str](), Work()
    leaving = asyncio.create_task(once.do("a", work))
    await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    work.gate.set()
    assert await once.do("a", work) == "x1"


async def test_results_go_with_time_and_number() -> None:
    work = Work()
    work.gate.set()
    short, few = Once[str](seconds=0.0), Once[str](kept=2)
    assert [await short.do("a", work) for _ in range(2)] == ["x1", "x2"]
    assert [await few.do(key, work) for key in "abca"] == ["x3", "x4", "x5", "x6"]


async def test_large_results_are_kept_only_while_there_is_room() -> None:
    once, work = Once[str](), Work("y" * (LARGE_KEPT // 3))
    work.gate.set()
    for number in range(50):
        await once.do(str(number), work)
    assert len(once._entries) <= 5
    assert (await once.do("49", work) or "").endswith("y50")


def test_keys_open_their_own_sandbox_and_are_made_again(tmp_path: Path) -> None:
    keys = Keys(tmp_path / "secret")
    one, other = keys.make("r-1"), keys.make("r-2")
    assert len(one) == 64 and one != other and keys.make("r-1") == one
    assert keys.opens("r-1", one) and not keys.opens("r-2", one) and not keys.opens("r-3", one)
    assert (keys.owner(one), keys.owner("x"), keys.owner(None)) == ("r-1", "", "")
    keys.forget("r-1")
    assert not keys.opens("r-1", one) and not keys.owner(one)
    assert Keys(tmp_path / "secret").make("r-2") == other and Keys().make("r-2") != other
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600


def test_the_servers_key_has_three_names() -> None:
    assert (
        given({"OPENHANDS_API_KEY": " a "}) == "a"
        and given({"SANDBOX_API_KEY": "b", "ALLHANDS_API_KEY": "c"}) == "b"
    )
    assert given({}) == ""
