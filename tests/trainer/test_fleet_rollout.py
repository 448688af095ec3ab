"""Rollouts over several servers, of which one is killed meanwhile: what it had is masked or played again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fleetkit import Servers
from rollout_kit import Bytes, Scripted

from orchestrator.schema import Config
from runtime_server.fleet import Fleet
from trainer.agent import Limits, Shell
from trainer.engines import Sampling
from trainer.environments.address import find_server
from trainer.environments.sandbox import SandboxEnvironment, connect
from trainer.episode import Episode, Status
from trainer.rollout import Plan, Rollouts
from trainer.tasks import lucky_seven

pytestmark = [pytest.mark.container, pytest.mark.timeout(180)]
LIMITS = Limits(2, 40, 16, 256, 60, 1.0, 2.0, 60.0)


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Servers]:
    with Servers(tmp_path) as made:
        made.start("1", "2")
        yield made


def killing(servers: Servers, at: int) -> Callable[[str, Sampling], str]:
    """A policy that solves the task; before its so many-th word the first server is killed."""
    said = 0

    def say(text: str, sampling: Sampling) -> str:
        nonlocal said
        said += 1
        if said == at:
            servers.kill("1")
        return "ls\n" if text == "$ " else "echo 7 > answer.txt\n"

    return say


async def play(servers: Servers, retries: int) -> list[Episode]:
    world = SandboxEnvironment.of(Config(), servers.run)
    policy = Scripted(killing(servers, 12))  # some have said their second word by then, and have sandboxes
    try:
        plan = Plan(max_parallel=8, retries=retries, retry_pause_s=0.1)
        return await Rollouts(policy, world, Shell(Bytes()), LIMITS, plan).collect(lucky_seven()[:8], 0)
    finally:
        await world.close()


async def test_what_a_killed_server_had_is_masked(servers: Servers) -> None:
    assert isinstance(connect(find_server(servers.run, {})), Fleet)
    episodes = await play(servers, retries=0)
    lost = [e for e in episodes if e.status is Status.INFRA]
    kept = [e for e in episodes if e.status is Status.OK]
    assert lost and len(kept) >= 4 and len(lost) + len(kept) == 8  # a create that broke off went elsewhere
    assert all(e.reward == 1 and any(e.mask) for e in kept)
    assert not any(any(e.mask) for e in lost) and all("unreachable" in e.error for e in lost)


async def test_what_a_killed_server_had_is_played_again_on_the_other(servers: Servers) -> None:
    episodes = await play(servers, retries=2)
    assert [(e.status, e.reward) for e in episodes] == [(Status.OK, 1.0)] * 8
    assert any(e.timings["attempts"] > 1 for e in episodes)


async def test_sandboxes_say_for_which_run_they_are(servers: Servers) -> None:
    world = SandboxEnvironment.of(Config(), servers.run)
    fleet = Fleet.of(servers.run)
    async with world.open(lucky_seven()[0]):
        (box,) = (await fleet.list()).sandboxes
        assert box.labels["run"] == servers.run.run_id and box.labels["task"]
    await fleet.close()
    await world.close()
