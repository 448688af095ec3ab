"""Several servers as one: who gets the next sandbox, what is lost with a server, who joins."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from fleetkit import Servers
from serverkit import until

from orchestrator.contract import ServerRecord
from runtime_server.client import Client
from runtime_server.errors import NotFound, SandboxError, Unavailable
from runtime_server.fleet import Fleet
from runtime_server.fleet_member import Member, placement
from runtime_server.wire import Code, CreateSandbox, Exec

# --- who gets it -------------------------------------------------------------------------------------


def member(name: str, places: int = 8, *images: str) -> Member:
    record = ServerRecord(
        run_id="r",
        name=name,
        attempt=1,
        job_id="",
        nonce=name,
        host="h",
        pid=1,
        url="http://h:1",
        places=places,
    )
    made = Member(record, Client(record.url, "k"))
    made.images |= {*images}
    return made


def best(members: list[Member], image: str | None) -> str:
    return min(members, key=lambda each: each.score(image)).record.name


def test_the_image_first_until_its_server_is_half_full() -> None:
    a, b = member("a", 8, "x"), member("b")
    assert {best([a, b], "x") for _ in range(20)} == {"a"} and best([a, b], None) in "ab"
    for number in range(5):
        a.took(f"s{number}", "x")
    assert best([a, b], "x") == "b" == best([a, b], None)
    a.released("s0")
    a.released("s1")
    assert best([a, b], "x") == "a"


def test_a_larger_server_gets_more() -> None:
    shares = placement([member("small", 4), member("large", 12)], {"x": 0, "y": 16})
    counted = {each.record.name: share.get("y", 0) for each, share in shares.items()}
    assert counted == {"small": 4, "large": 12}
    assert sum("x" in share for share in shares.values()) == 1  # only to be fetched, by one
    assert placement([], {"x": 1}) == {}


def test_a_create_under_way_counts() -> None:
    a, b = member("a"), member("b")
    with a.expecting():
        assert {best([a, b], None) for _ in range(20)} == {"b"}
    assert {best([a, b], None) for _ in range(50)} == {"a", "b"}


async def test_a_run_without_servers_says_so(tmp_path: Path) -> None:
    async with Fleet("run-1", lambda: [], lambda: "key") as fleet:
        with pytest.raises(Unavailable, match="no server has registered") as caught:
            await fleet.create()
        assert caught.value.infrastructure and await fleet.life() is None


# --- real ones ---------------------------------------------------------------------------------------


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Servers]:
    with Servers(tmp_path) as made:
        made.start("1", "2")
        yield made


@pytest.fixture
async def fleet(servers: Servers) -> AsyncIterator[Fleet]:
    async with Fleet.of(servers.run, look_s=0.1) as made:
        yield made


async def spread(fleet: Fleet, count: int) -> Counter[str]:
    """Make so many sandboxes; how many came to each server."""
    made = await asyncio.gather(*(fleet.create() for _ in range(count)))
    return Counter([(await fleet.client_of(box.id)).url for box in made])


@pytest.mark.container
async def test_one_of_two_servers_is_killed_and_another_joins(servers: Servers, fleet: Fleet) -> None:
    first, second = servers.record("1"), servers.record("2")
    assert first is not None and second is not None
    assert await spread(fleet, 6) == {first.url: 3, second.url: 3}
    assert len((await fleet.list()).sandboxes) == 6
    assert (await fleet.capabilities()).max_sandboxes == 16
    before = await fleet.life()

    boxes = (await fleet.list()).sandboxes
    there = [box.id for box in boxes if (await fleet.client_of(box.id)).url == first.url]
    here = next(box.id for box in boxes if box.id not in there)
    running = asyncio.create_task(fleet.exec(there[0], Exec(command="sleep 60")))
    await asyncio.sleep(0.2)  # on its way; whether the server has it yet makes no difference
    servers.kill("1")
    with pytest.raises(SandboxError) as lost:
        await running
    assert lost.value.code == Code.UNREACHABLE and lost.value.infrastructure
    assert (await fleet.exec(here, Exec(command="echo on"))).stdout.text == "on\n"
    assert await spread(fleet, 2) == {second.url: 2}
    assert await fleet.life() not in (before, None)
    with pytest.raises(Unavailable):
        await fleet.delete(there[0])

    servers.start("3")
    third = servers.record("3")
    assert third is not None
    await fleet.look()
    assert await spread(fleet, 3) == {third.url: 3}  # it has the most room
    async with fleet.sandbox() as box:
        await box.write_file("a.txt", b"1")
        assert (await fleet.read_file(box.id, "a.txt")) == b"1"
    with pytest.raises(NotFound):
        await fleet.get(box.id)


@pytest.mark.container
async def test_a_group_a_fork_and_a_prefetch(servers: Servers, fleet: Fleet) -> None:
    request = CreateSandbox(group="g", group_size=4)
    made = await asyncio.gather(*(fleet.create(request) for _ in range(4)))
    assert len({(await fleet.client_of(box.id)).url for box in made}) == 1
    source = made[0].id
    await fleet.exec(source, Exec(command="echo 7 > /root/kept"))
    forked = await fleet.fork(source, 2)
    for box in forked.sandboxes:
        assert (await fleet.exec(box.id, Exec(command="cat /root/kept"))).stdout.text == "7\n"
    await fleet.prefetch({made[0].image: 4})


@pytest.mark.container
async def test_only_health_is_believed(servers: Servers, fleet: Fleet) -> None:
    """A record is a hint: one that names another's address is no server."""
    first, second = servers.record("1"), servers.record("2")
    assert first is not None and second is not None
    servers.run.publish(servers.run.server("2"), dataclasses.replace(first, name="2", nonce="another"))
    assert await spread(fleet, 2) == {first.url: 2}
    servers.run.publish(servers.run.server("2"), second)
    await fleet.look()
    assert (await spread(fleet, 4))[second.url] >= 2
    assert servers.stop("2") == 0
    assert servers.run.read(servers.run.server("2"), ServerRecord) is None
    await fleet.look()
    assert [each.record.name for each in fleet.up] == ["1"]
    await until(lambda: not [m for m in fleet.members.values() if m.record.name == "2" and m.up])
