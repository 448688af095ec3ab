"""The turn loop and the shell format, with an engine that follows a script and a real shell."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from rollout_kit import Bytes, Scripted

from trainer.agent import Agent, Limits, Shell, bounded
from trainer.engines import Sample, Sampling
from trainer.environments import CommandResult, Verdict
from trainer.environments.local import LocalEnvironment
from trainer.episode import Episode, Status
from trainer.errors import Broken, Overdue, TaskError
from trainer.tasks import Setup, Task, Verify

LIMITS = Limits(2, 28, 16, 128, 40, 1.0, 5.0, 30.0)
TASK = Task("t", "$ ", Verify('test "$(cat answer.txt)" = 7'), Setup({"hint.txt": "It is seven.\n"}))


def then(*lines: str) -> Callable[[str, Sampling], str]:
    """A script: the n-th turn says the n-th line."""
    left = iter(lines)
    return lambda text, sampling: next(left)


async def play(engine: Scripted, limits: Limits = LIMITS, task: Task = TASK) -> tuple[Episode, Status]:
    agent = Agent(engine, Shell(Bytes()), limits)
    episode = agent.start(task.id, 0, task.prompt)
    async with LocalEnvironment().open(task) as workspace:
        first = await agent.begin(episode, lambda turn: turn)
        return episode, await agent.play(episode, workspace, lambda turn: turn, first)


async def test_ids_are_prompt_sample_observation_sample() -> None:
    episode, status = await play(Scripted(then("cat hint.txt\n", "echo 7 > answer.txt\n")))
    assert bytes(episode.ids).decode() == "$ cat hint.txt\nIt is seven.\n$ echo 7 > answer.txt\n"
    assert episode.mask == [0] * 2 + [1] * 13 + [0] * 15 + [1] * 20
    assert status is Status.OK and episode.weight_version == 3
    assert [t.exit_code for t in episode.turns] == [0, 0]


async def test_each_prompt_starts_with_the_last_one_and_its_sample() -> None:
    """Whatever bytes a policy says, also such that text would not survive: ids are only appended."""
    draw = random.Random(1)
    engine = Scripted(lambda text, sampling: "".join(chr(draw.randrange(1, 127)) for _ in range(12)) + "\n")
    said: list[list[int]] = []
    agent = Agent(engine, Shell(Bytes()), Limits(6, 40, 16, 2000, 64, 1.0, 5.0, 30.0))
    episode = agent.start("t", 0, "$ ")

    class Echo:
        timings: dict[str, float] = {}  # noqa: RUF012

        async def run(self, command: str, timeout_s: float, max_output: int) -> CommandResult:
            said.append(list(episode.ids))
            return CommandResult(b"\xff\xfe ok", 0)

        async def verify(self, answer: str = "") -> Verdict:
            return Verdict(0.0)

    first = await agent.begin(episode, lambda turn: turn)
    await agent.play(episode, Echo(), lambda turn: turn, first)
    assert len(engine.prompts) == 6
    for before, after in zip(said, engine.prompts[1:], strict=False):
        assert after[: len(before)] == before
    assert engine.prompts[-1] == episode.ids[: len(engine.prompts[-1])]


async def test_a_sample_cut_off_ends_the_episode_truncated_and_runs_nothing(tmp_path: Path) -> None:
    episode, status = await play(Scripted(then("echo 7 > answer.txt" + " " * 30)))
    assert status is Status.TRUNCATED
    assert len(episode.turns) == 1 and episode.turns[0].exit_code is None
    assert episode.action_tokens == 28


async def test_no_room_for_another_turn_is_truncated_without_the_observation() -> None:
    limits = Limits(4, 28, 16, 20, 40, 1.0, 5.0, 30.0)
    episode, status = await play(Scripted(then("cat hint.txt\n", "ls\n")), limits)
    assert status is Status.TRUNCATED
    assert episode.response_length == 13 and episode.mask[-1] == 1


async def test_the_last_turn_may_use_only_what_is_left() -> None:
    asked: list[int] = []

    def say(text: str, sampling: Sampling) -> str:
        asked.append(sampling.max_tokens)
        return "true\n"

    await play(Scripted(say), Limits(9, 28, 16, 20, 40, 1.0, 5.0, 30.0))
    assert asked == [20, 13, 6]


async def test_exit_ends_the_episode() -> None:
    episode, status = await play(Scripted(then("exit\n")))
    assert status is Status.OK and len(episode.turns) == 1


async def test_reading_stdin_does_not_hang_and_a_timeout_is_an_observation() -> None:
    limits = Limits(3, 28, 16, 128, 60, 1.0, 0.3, 30.0)
    episode, status = await play(Scripted(then("cat\n", "echo a; sleep 60\n", "true\n")), limits)
    assert status is Status.OK
    assert [t.timed_out for t in episode.turns] == [False, True, False]
    assert episode.turns[1].observation == "a\n\n[timed out after 0.3 s]\n$ "


async def test_a_deadline_used_up_by_commands_is_the_policys_else_not() -> None:
    limits = Limits(9, 28, 16, 512, 60, 1.0, 5.0, 0.5)
    _, status = await play(Scripted(lambda *_: "sleep 9\n"), limits)
    assert status is Status.TIMEOUT

    class Slow(Scripted):
        """Answers so many turns, then never again."""

        left = 1

        async def generate(self, ids: list[int], sampling: Sampling) -> Sample:
            self.left -= 1
            if self.left < 0:
                await asyncio.Event().wait()
            return await super().generate(ids, sampling)

    with pytest.raises(Overdue, match=r"by turn 1, only 0\.0 s of them in its commands"):
        await play(Slow(then("true\n")), limits)
    mute = Slow(then())
    mute.left = 0
    with pytest.raises(Overdue, match="too slow for the first turn"):
        await play(mute, limits)


async def test_a_policy_that_removes_its_own_directory_broke_it() -> None:
    with pytest.raises(Broken):
        await play(Scripted(then('rm -rf "$PWD"\n', "ls\n")), Limits(3, 28, 16, 128, 40, 1.0, 5.0, 30.0))


async def test_nul_bytes_do_not_reach_the_shell() -> None:
    episode, _ = await play(Scripted(then("echo\0 hi\n", "true\n")))
    assert episode.turns[0].observation == "hi\n$ "


def test_too_long_a_prompt_is_refused() -> None:
    with pytest.raises(TaskError, match="has 22 tokens, allowed are 16"):
        Agent(Scripted(then()), Shell(Bytes()), LIMITS).start("t", 0, "x" * 20 + "$ ")


def test_end_of_sequence_ends_the_episode() -> None:
    action = Shell(Bytes()).action(Sample([108, 115, 256], [0.0] * 3, "stop"))
    assert (action.command, action.last, action.complete) == ("ls", True, True)


def test_a_task_that_is_no_prompt_gets_one() -> None:
    assert Bytes().decode(Shell(Bytes()).prompt("Fix it.")) == "Fix it.\n$ "


def test_observations_are_bounded_and_end_in_the_prompt() -> None:
    text, ids = Shell(Bytes()).observation(b"x" * 100, 10)
    assert text == "x" * 10 + "\n$ " and ids == list(text.encode())
    assert Shell(Bytes()).observation(b"", 10)[0] == "$ "


def test_long_limits_keep_head_and_tail() -> None:
    cut = bounded(b"a" * 500 + b"b" * 500, 400)
    assert (
        len(cut) <= 400 and cut.startswith(b"aaa") and cut.endswith(b"bbb") and b"600 bytes left out" in cut
    )
