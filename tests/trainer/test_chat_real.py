"""The agent's tools in real containers of a real server: a shell that stays, files, bounds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from chat_kit import bytes_tokenizer
from rollout_kit import Server
from test_chat_agent import Says, call

from trainer.agent import Limits
from trainer.episode import Episode, Status
from trainer.formats.chat import Chat
from trainer.formats.template import Template
from trainer.rollout import Plan, Rollouts
from trainer.tasks import Setup, Task, Verify

pytestmark = [pytest.mark.container, pytest.mark.timeout(180)]
LIMITS = Limits(12, 600, 4096, 12000, 400, 1.0, 20.0, 100.0, 2.0, tools=("bash", "read", "edit", "submit"))
TASK = Task(
    "fix",
    "Make greet say hello.",
    Verify('test "$(sh greet.sh)" = hello'),
    Setup({"greet.sh": "echo goodbye\n"}, ["chmod 755 greet.sh"]),
    workdir="/tmp/task",
)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.stop()


async def play(server: Server, *texts: str) -> Episode:
    world = server.environment()
    form = Chat(Template(bytes_tokenizer()), LIMITS.tools)
    try:
        plan = Plan(retries=0)
        (episode,) = await Rollouts(Says(*texts), world, form, LIMITS, plan).collect([TASK], 0)
        return episode
    finally:
        await world.close()


async def test_every_tool_in_a_container(server: Server) -> None:
    episode = await play(
        server,
        call("read", path="greet.sh"),
        call("edit", path="greet.sh", old="goodbye", new="hello"),
        call("bash", command="cd /; x=5"),
        call("bash", command="echo $x; pwd; stat -c %a /tmp/task/greet.sh"),
        call("edit", path="deep/er/new.txt", old="", new="a\n") + call("read", path="deep/er/new.txt"),
        call("submit"),
    )
    assert (episode.reward, episode.status) == (1.0, Status.OK)
    assert episode.turns[0].observation == "     1  echo goodbye"
    assert episode.turns[3].observation == "5\n/\n755\n"  # the shell stayed, and the file's mode too
    assert "     1  a" in episode.turns[4].observation
    assert not any(use.problem for turn in episode.turns for use in turn.used)


async def test_what_goes_wrong_in_a_container_is_told(server: Server) -> None:
    episode = await play(
        server,
        call("read", path="none.txt") + call("read", path="/dev/zero") + call("read", path="/etc"),
        call("bash", command="echo before; sleep 60"),
        call("bash", command="echo after; exit 3"),
        call("bash", command="pwd; seq 100000"),
        call("edit", path="/proc/none", old="", new="x"),
        call("bash", command="echo 'open"),
        call("bash", command="kill -9 $$"),
        call("bash", command="echo still here"),
        call("submit"),
    )
    assert episode.status is Status.OK and episode.reward == 0
    assert [bool(use.problem) for use in episode.turns[0].used] == [True, True, True]
    late, exited, flood = (episode.turns[n].used[0] for n in (1, 2, 3))
    assert late.timed_out and "before" in episode.turns[1].observation
    assert exited.exit_code == 3 and flood.exit_code == 0
    shown = episode.turns[3].observation
    assert len(shown.encode()) <= 400 and shown.startswith("/tmp/task\n1\n") and shown.endswith("100000\n")
    assert "bytes left out" in shown and episode.turns[4].used[0].problem
    assert episode.turns[7].observation == "still here\n"
