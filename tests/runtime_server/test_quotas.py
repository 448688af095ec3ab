"""How many sandboxes a run may have on a server that serves several."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from serverkit import KEY, run_server

from orchestrator.schema import Runtime
from runtime_server.client import Client
from runtime_server.errors import BadRequest, Unavailable
from runtime_server.quotas import Quotas
from runtime_server.wire import Code, CreateSandbox


async def test_without_a_number_everybody_passes() -> None:
    quotas = Quotas(0, Counter)
    async with quotas.admitted({}, 0, 1000):
        pass


async def test_each_run_waits_for_its_own_in_order() -> None:
    held: Counter[str] = Counter()
    quotas = Quotas(2, lambda: held)
    order: list[str] = []

    async def come(run: str, name: str, timeout_s: float = 10) -> None:
        async with quotas.admitted({"run": run}, timeout_s):
            held[run] += 1
            order.append(name)

    await asyncio.gather(come("a", "a1"), come("a", "a2"), come("b", "b1"))
    waiting = [asyncio.create_task(come("a", name)) for name in ("a3", "a4")]
    await come("b", "b2")  # nobody of another run is held up
    with pytest.raises(Unavailable, match="max_per_run") as late:
        await come("a", "never", 0.01)
    assert late.value.code == Code.QUOTA and late.value.infrastructure
    assert order == ["a1", "a2", "b1", "b2"]
    held["a"] -= 1
    quotas.changed()
    await asyncio.wait({waiting[0]})
    assert order[-1] == "a3" and not waiting[1].done()
    waiting[1].cancel()
    held["a"] -= 1
    quotas.changed()
    await asyncio.gather(*waiting, return_exceptions=True)
    await come("a", "a5")
    assert order[-1] == "a5"


async def test_one_that_is_admitted_and_not_there_yet_counts() -> None:
    quotas = Quotas(1, Counter)
    async with quotas.admitted({"run": "a"}, 1):
        with pytest.raises(Unavailable):
            async with quotas.admitted({"run": "a"}, 0.01):
                raise AssertionError
    async with quotas.admitted({"run": "a"}, 0):
        pass
    with pytest.raises(BadRequest, match="can never be"):
        async with quotas.admitted({}, 1, 2):
            raise AssertionError


@pytest.mark.container
async def test_a_server_that_serves_two_runs() -> None:
    config = Runtime(host="127.0.0.1", max_parallel_sandboxes=4, max_per_run=1)
    mine, theirs = ({"run": name} for name in ("mine", "theirs"))
    with run_server(config) as (url, boxes):
        async with Client(url, KEY) as client:
            first = await client.create(CreateSandbox(labels=mine))
            with pytest.raises(Unavailable) as late:
                await client.create(CreateSandbox(labels=mine, queue_timeout_s=0.1))
            assert late.value.code == Code.QUOTA
            await client.create(CreateSandbox(labels=theirs))
            next_one = asyncio.create_task(client.create(CreateSandbox(labels=mine)))
            await client.delete(first.id)
            assert (await next_one).state == "running"
            assert boxes.runs() == {"mine": 1, "theirs": 1}
