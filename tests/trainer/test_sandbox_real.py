"""Episodes in real containers of a real server: success, sabotage, and a server that is killed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
from rollout_kit import Bytes, Scripted, Server

from trainer.agent import Limits, Shell
from trainer.engines import Sampling
from trainer.environments.address import Address
from trainer.environments.sandbox import SandboxEnvironment, connect
from trainer.episode import Episode, Status
from trainer.errors import Lost, Refused
from trainer.rollout import Plan, Rollouts
from trainer.tasks import lucky_seven

pytestmark = [pytest.mark.container, pytest.mark.timeout(180)]
LIMITS = Limits(2, 40, 16, 256, 60, 1.0, 2.0, 60.0)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.stop()


def then(*lines: str) -> Callable[[str, Sampling], str]:
    left = iter(lines)
    return lambda text, sampling: next(left)


async def play(server: Server, say: Callable[[str, Sampling], str], episodes: int = 1) -> list[Episode]:
    world = server.environment()
    try:
        plan = Plan(max_parallel=4, retries=0)
        return await Rollouts(Scripted(say), world, Shell(Bytes()), LIMITS, plan).collect(
            lucky_seven()[:episodes], 0
        )
    finally:
        await world.close()


async def test_episodes_side_by_side_each_in_its_own_sandbox(server: Server) -> None:
    def say(text: str, sampling: Sampling) -> str:
        return "ls; hostname > mine.txt\n" if text == "$ " else "echo 7 > answer.txt\n"

    episodes = await play(server, say, 6)
    assert all(e.status is Status.OK and e.reward == 1 for e in episodes)
    assert {e.turns[0].observation for e in episodes} == {"hint.txt\nnotes.txt\n$ "}


@pytest.mark.parametrize(
    ("lines", "reward"),
    [
        (("rm -rf /tmp/task\n", "ls\n"), 0),
        (("kill -9 -1\n", "echo 7 > answer.txt\n"), 1),  # its sandbox survives that
        (("cat\n", "yes\n"), 0),
        (("mkdir answer.txt\n", "sleep 60\n"), 0),
    ],
)
async def test_sabotage_is_scored(server: Server, lines: tuple[str, ...], reward: float) -> None:
    (episode,) = await play(server, then(*lines))
    assert episode.valid and episode.reward == reward and any(episode.mask)


async def test_a_wrong_key_is_refused_at_once(server: Server) -> None:
    world = SandboxEnvironment(lambda: Address(server.address.url, "wrong"), connect)
    with pytest.raises(Refused, match="unauthorized"):
        await world.wait_ready(30)
    await world.close()


async def test_a_server_killed_between_two_turns_masks_the_episode() -> None:
    server = Server()

    def say(text: str, sampling: Sampling) -> str:
        if text != "$ ":
            server.process.kill()
            server.process.wait(10)
        return "ls\n"

    (episode,) = await play(server, say)
    assert episode.status is Status.INFRA and not any(episode.mask)
    assert "unreachable" in episode.error
    with pytest.raises(Lost):
        await server.environment().wait_ready(0)
    assert server.process.stdout is not None
    server.process.stdout.close()
    subprocess.run([sys.executable, "-m", "runtime_server", "--sweep"], check=True, timeout=90)  # noqa: ASYNC221
