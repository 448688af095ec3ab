"""Episodes of the chat format: a scripted model uses every tool, and is told what goes wrong."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from chat_kit import END, START, bytes_tokenizer

from trainer.agent import Limits
from trainer.engines import Sample, Sampling
from trainer.environments.local import LocalEnvironment
from trainer.episode import Episode, Failure, Status
from trainer.formats.chat import Chat
from trainer.formats.template import Template
from trainer.rollout import Plan, Rollouts
from trainer.tasks import Budget, Setup, Task, Verify

EVERY = ("bash", "read", "edit", "submit")
LIMITS = Limits(8, 400, 4096, 6000, 500, 1.0, 10.0, 60.0, tools=EVERY)
TASK = Task(
    "fix",
    "Make f return 2.",
    Verify('test "$(python3 -c "import a; print(a.f())")" = 2'),
    Setup({"a.py": "def f():\n    return 1\n"}),
)


def call(tool: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': tool, 'arguments': arguments})}\n</tool_call>"


class Says:
    """An engine that answers with these texts in turn, each ended by <|im_end|>."""

    version = 2

    def __init__(self, *texts: str, wait: Callable[[int], bool] = lambda turn: False) -> None:
        self.texts, self.wait = list(texts), wait
        self.prompts: list[list[int]] = []

    async def generate(self, ids: list[int], sampling: Sampling) -> Sample:
        if self.wait(len(self.prompts)):
            await asyncio.Event().wait()
        self.prompts.append(list(ids))
        said = [*self.texts[len(self.prompts) - 1].encode(), END][: sampling.max_tokens]
        return Sample(said, [-0.5] * len(said), "stop" if said[-1] == END else "length")

    async def load(self, version: int) -> None: ...

    async def probe(self, prompt: list[int]) -> float:
        return 0.0

    async def close(self) -> None: ...


async def play(engine: Says, task: Task = TASK, limits: Limits = LIMITS, style: str = "json") -> Episode:
    form = Chat(Template(bytes_tokenizer()), limits.tools, style)
    plan = Plan(retries=0, retry_pause_s=0)
    (episode,) = await Rollouts(engine, LocalEnvironment(), form, limits, plan).collect([task], 0)
    return episode


async def test_read_edit_test_and_submit_earn_the_reward() -> None:
    engine = Says(
        "<think>\nLook first.\n</think>\n\n" + call("read", path="a.py"),
        call("edit", path="a.py", old="return 1", new="return 2") + call("bash", command="cd ..; x=5"),
        call("bash", command="echo $x; basename $PWD"),
        "Done. " + call("submit"),
    )
    episode = await play(engine)
    assert (episode.reward, episode.status, episode.failure) == (1.0, Status.OK, Failure.NONE)
    assert [[use.tool for use in turn.used] for turn in episode.turns] == [
        ["read"],
        ["edit", "bash"],
        ["bash"],
        [],
    ]
    assert "     2      return 1" in episode.turns[0].observation
    assert episode.turns[2].observation == "5\ntmp\n"  # the shell stayed
    # Append-only: each prompt is the one before, what was sampled, and what was seen.
    for before, turn, after in zip(engine.prompts, episode.turns, engine.prompts[1:], strict=False):
        assert after[: turn.end] == episode.ids[: turn.end] and before == after[: turn.start]
        assert after[turn.end] == 10 and after[turn.end + 1] == START  # the template's newline is not sampled
    sampled = [i for turn in episode.turns for i in range(turn.start, turn.end)]
    assert [i for i, acted in enumerate(episode.mask) if acted] == sampled
    assert all(episode.ids[turn.end - 1] == END for turn in episode.turns)  # the stop token is the policy's
    assert episode.answer.startswith("Done.") and "<|im_end|>" not in episode.answer


async def test_malformed_calls_are_answered_and_the_episode_goes_on() -> None:
    episode = await play(
        Says(
            "I think so.",
            "<tool_call>{'name': 'bash'}</tool_call>",
            call("bash", cmd="ls"),
            call("edit", path="a.py", old="nope", new=""),
            call("submit"),
        )
    )
    says = [
        "no tool call found",
        "not valid JSON",
        "'command' as string, and it is missing",
        "old is not in a.py",
    ]
    assert all(
        text in turn.observation and turn.used[0].problem
        for text, turn in zip(says, episode.turns, strict=False)
    )
    assert episode.status is Status.OK and episode.reward == 0


async def test_fenced_blocks_from_start_to_submit() -> None:
    engine = Says(
        "Let me look.\n```bash\ncat a.py\n```",
        "```bash\nsed -i s/1/2/ a.py\n```",
        "```bash\nsubmit\n```",
    )
    episode = await play(engine, style="fenced")
    assert episode.reward == 1 and episode.turns[0].observation.startswith("def f():")


async def test_without_tools_the_first_answer_is_the_last() -> None:
    limits = Limits(8, 400, 4096, 6000, 500, 1.0, 10.0, 60.0)
    episode = await play(Says("four"), limits=limits)
    assert (len(episode.turns), episode.answer, episode.status) == (1, "four", Status.OK)


async def test_turns_that_run_out_before_submit_are_a_truncation() -> None:
    limits = Limits(2, 400, 4096, 6000, 500, 1.0, 10.0, 60.0, tools=EVERY)
    episode = await play(Says(*[call("bash", command="true")] * 2), limits=limits)
    assert (episode.status, episode.failure) == (Status.TRUNCATED, Failure.TURNS)
    cut = await play(Says("x" * 1000), limits=limits)
    assert (cut.status, cut.failure) == (Status.TRUNCATED, Failure.TOKENS)


async def test_a_task_s_own_budget_and_tools_are_tighter() -> None:
    task = Task("t", "Go.", TASK.reward, TASK.setup, tools=("bash", "submit"), budget=Budget(turns=2))
    engine = Says(call("read", path="a.py"), call("bash", command="true"))
    episode = await play(engine, task)
    assert len(episode.turns) == 2 and episode.failure is Failure.TURNS
    assert "there is no read here; there are bash, submit" in episode.turns[0].observation
    assert b'"edit"' not in bytes(i for i in engine.prompts[0] if i < 256)


# --- deadlines ---------------------------------------------------------------------------------------


def limited(**changes: Any) -> Limits:
    names: Sequence[str] = ("turn_timeout_s", "episode_timeout_s")
    times = {name: changes.pop(name, 10.0) for name in names}
    return Limits(8, 400, 4096, 6000, 500, 1.0, tools=EVERY, **times, **changes)


async def test_a_command_has_a_deadline_and_the_next_one_runs() -> None:
    slow = call("bash", command="sleep 60") + call("bash", command="echo on")
    episode = await play(Says(slow, call("submit")), limits=limited(command_timeout_s=0.3))
    first, second = episode.turns[0].used
    assert first.timed_out and not second.timed_out and "on" in episode.turns[0].observation
    assert "timed out after 0.3 s" in episode.turns[0].observation


async def test_a_turn_has_a_deadline_and_what_is_left_of_it_is_not_run() -> None:
    slow = call("bash", command="sleep 60") + call("bash", command="echo on")
    episode = await play(Says(slow, call("submit")), limits=limited(turn_timeout_s=0.3))
    first, second = episode.turns[0].used
    assert first.timed_out and "not run: the turn's 0.3 s are used up" in second.problem


async def test_an_episode_that_its_commands_used_up_is_scored() -> None:
    episode = await play(Says(*[call("bash", command="sleep 60")] * 8), limits=limited(episode_timeout_s=0.5))
    assert (episode.status, episode.failure) == (Status.TIMEOUT, Failure.COMMANDS)
    assert episode.valid and any(episode.mask)


@pytest.mark.parametrize("turn", [0, 1])
async def test_an_engine_that_is_too_slow_for_a_turn_loses_the_episode(turn: int) -> None:
    engine = Says(*[call("bash", command="true")] * 8, wait=lambda number: number == turn)
    episode = await play(engine, limits=limited(generation_timeout_s=0.3))
    assert (episode.status, episode.failure) == (Status.INFRA, Failure.OVERDUE)
    assert f"turn {turn} was not sampled within 0.3 s" in episode.error and not any(episode.mask)
