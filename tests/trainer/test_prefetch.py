"""What the next batch needs is told to the server while this one is learned from."""

from __future__ import annotations

import pytest
from rollout_kit import Bytes, Scripted, Server

from runtime_server.client import Client
from trainer.agent import Limits, Shell
from trainer.data import Sampler
from trainer.environments.address import Address
from trainer.environments.sandbox import SandboxEnvironment, connect
from trainer.rollout import Plan, Rollouts
from trainer.tasks import lucky_seven

LIMITS = Limits(2, 40, 16, 256, 60, 1.0, 2.0, 60.0)


def _rollouts(world: SandboxEnvironment, each: int, most: int) -> Rollouts:
    plan = Plan(rollouts_per_prompt=each, max_parallel=most)
    return Rollouts(Scripted(lambda text, sampling: "ls\n"), world, Shell(Bytes()), LIMITS, plan)


def test_a_look_ahead_takes_nothing() -> None:
    sampler = Sampler(5, seed=3)
    sampler.take(4)
    ahead = sampler.peek(7)
    assert sampler.peek(7) == ahead == sampler.take(7)


async def test_a_server_that_is_gone_is_no_matter() -> None:
    nowhere = Address("http://127.0.0.1:9", "k" * 20)
    world = SandboxEnvironment(lambda: nowhere, lambda address: Client(address.url, address.key, tries=1))
    await _rollouts(world, 2, 4).prefetch(lucky_seven()[:3])
    await world.close()


@pytest.mark.container
async def test_the_server_gets_containers_ready() -> None:
    server = Server()
    try:
        async with Client(server.address.url, server.address.key) as client:
            image = (await client.capabilities()).default_image
            world = SandboxEnvironment(lambda: server.address, connect)
            await _rollouts(world, 2, 5).prefetch(lucky_seven()[:3])
            while (room := await client.capacity()).warm_total < 5:
                assert room.warm_total <= 5
            assert room.warm == {image: 5}
            await world.close()
    finally:
        server.stop()
