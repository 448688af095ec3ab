"""Who gets a place when: order, groups, positions, estimates."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from runtime_server.errors import BadRequest, Unavailable
from runtime_server.places import Places, Ticket
from runtime_server.wire import Code


async def _take(places: Places, timeout_s: float = 5.0) -> None:
    await places.wait(places.enter(), timeout_s)


def _seated(tickets: list[Ticket]) -> list[bool]:
    return [not ticket.waiting for ticket in tickets]


async def test_places_are_given_in_order() -> None:
    places = Places(1)
    await _take(places)
    order: list[int] = []

    async def wait(number: int) -> None:
        await _take(places)
        order.append(number)

    tasks = [asyncio.create_task(wait(n)) for n in range(3)]
    await asyncio.sleep(0)
    assert places.waiting == 3
    for _ in range(3):
        places.give()
    await asyncio.gather(*tasks)
    assert order == [0, 1, 2] and places.waiting == 0 and places.free == 0


async def test_a_place_is_not_lost_with_one_who_leaves() -> None:
    places = Places(1)
    await _take(places)
    leaving = asyncio.create_task(_take(places))
    await asyncio.sleep(0)
    places.give()
    leaving.cancel()  # in the same instant in which it got its turn
    await asyncio.gather(leaving, return_exceptions=True)
    await _take(places, 0.1)


async def test_waiting_for_a_place_has_a_limit_and_can_be_closed() -> None:
    places = Places(1)
    await _take(places)
    with pytest.raises(Unavailable) as late:
        await _take(places, 0.01)
    assert late.value.code == Code.QUEUE_TIMEOUT and places.waiting == 0
    waiting = asyncio.create_task(_take(places))
    await asyncio.sleep(0)
    places.close(Unavailable("over", Code.SERVER_DRAINING))
    with pytest.raises(Unavailable, match="over"):
        await waiting
    with pytest.raises(Unavailable, match="over"):
        await _take(places)


async def test_a_group_comes_in_together_or_not_at_all() -> None:
    places = Places(4)
    held = [places.enter() for _ in range(2)]
    assert _seated(held) == [True, True]
    group = [places.enter(1, "g", 3) for _ in range(2)]
    single = places.enter()
    assert _seated(group) == [False, False] and not single.waiting, "an incomplete group holds nobody up"
    group.append(places.enter(1, "g", 3))
    later = places.enter()
    assert places.free == 1 and later.waiting, "who comes later waits behind the group: it does not starve"
    places.give()
    assert _seated(group) == [False] * 3 and later.waiting
    places.give()
    assert _seated(group) == [True] * 3 and later.waiting and places.free == 0
    places.give()
    assert not later.waiting


async def test_a_member_that_leaves_leaves_room_for_another() -> None:
    places = Places(2)
    first = places.enter(1, "g", 2)
    places.leave(first)
    assert places.waiting == 0 and places.free == 2
    group = [places.enter(1, "g", 2), places.enter(1, "g", 2)]
    assert _seated(group) == [True, True]


@pytest.mark.parametrize(
    "ask",
    [lambda p: p.enter(3), lambda p: p.enter(1, "g", 3), lambda p: (p.enter(1, "g"), p.enter(1, "g", 9))],
)
async def test_what_can_never_be_is_refused(ask: Callable[[Places], object]) -> None:
    with pytest.raises(BadRequest):
        ask(Places(2))


async def test_several_places_for_one() -> None:
    places = Places(3)
    three, one = places.enter(3), places.enter()
    assert not three.waiting and one.waiting
    places.leave(three)
    assert not one.waiting and places.free == 2


async def test_position_and_estimate_come_from_how_long_places_were_held() -> None:
    places = Places(2)
    for _ in range(2):
        await _take(places)
    unknown = places.queue(places.enter())
    assert unknown is not None and (unknown.position, unknown.eta_s) == (1, None)
    places.give(held_s=10.0)
    first, second = places.enter(), places.enter()
    told = [places.queue(first), places.queue(second)]
    assert [(queue.position, queue.eta_s) for queue in told if queue] == [(1, 5.0), (2, 10.0)]
    places.give(held_s=10.0)
    assert places.queue(first) is None
