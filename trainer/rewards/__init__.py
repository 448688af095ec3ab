"""Rewards: what the policy's work is worth, asked once it is done.

What it is
    `judge` decides by the kind of the task's reward:
        command     a hidden command in the policy's own sandbox; exit code 0 earns 1
        tests       pytest over hidden tests: those to mend and those to keep must all pass (`suites`)
        expected    pytest, and every test must end as expected, the R2E-Gym way (`suites`)
        python      a function of ours, outside of every sandbox, on what the sandbox gave (`functions`)

How to use it
    verdict = await judge(task, workspace, answer="what the policy said last")

Who cannot cheat
    Hidden files and commands come after the policy's last turn, when everything that it left running is
    dead. Tests run in a second sandbox, made as the first one was, that the policy never touched: only its
    work is moved there, without what configures Python or pytest (`carry`). So neither a changed interpreter,
    nor sitecustomize, nor a program that waits has a way in. What remains is that tests import the policy's
    code. Tests that must fail are strewn among them; when one does not, the work was not tested but tampered
    with, and earns 0.

What it does not do
    It opens no first sandbox and retries nothing (`trainer.rollout`). Code under test that takes pytest apart
    inside its own process and spares exactly the tests that must fail is not found out; and tests that accept
    wrong work, accept it here too.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from typing import Protocol, Self

from trainer.environments import CommandResult, Verdict
from trainer.tasks import Task

KEPT_FOR_LOG = 4096


class Place(Protocol):
    """What a judge needs of a workspace. Every call may raise Lost (infrastructure), Broken (the policy)."""

    async def run(self, command: str, timeout_s: float, max_output: int) -> CommandResult:
        """Run one command line under `sh`, in the task's directory."""

    async def kill(self) -> None:
        """End everything that runs there."""

    async def write(self, files: Mapping[str, str]) -> None:
        """Write files, by path relative to the task's directory. Raises Spoilt where that cannot be done."""

    async def read(self, path: str, limit: int) -> bytes | None:
        """A file's content, at most `limit` bytes of it; None when there is no such file."""

    async def pack(self, limit: int) -> bytes:
        """The task's directory as a tar. Raises Spoilt when it is larger than `limit` bytes, or gone."""

    async def unpack(self, tar: bytes) -> None:
        """A tar into the task's directory. Raises Spoilt when it does not fit."""

    def fresh(self) -> AbstractAsyncContextManager[Self]:
        """Another one for the same task, with its set-up done and nothing hidden."""


class Spoilt(Exception):
    """What the policy left behind cannot be judged: it is worth nothing."""


async def judge(task: Task, place: Place, answer: str = "") -> Verdict:
    """What the work in `place` is worth, with a reason where that is not 1. `answer`: what the policy said.

    Raises what the calls of `place` raise; whatever the policy did to its sandbox is a verdict instead.
    """
    from trainer.rewards import functions, suites

    judges = {"tests": suites.judged, "expected": suites.judged}
    try:
        await place.kill()  # what was left running could watch the judge come in, and change what it finds
        if task.reward.kind == "python":
            return await functions.judged(task, place, answer)
        return await judges.get(task.reward.kind, by_command)(task, place)
    except Spoilt as spoilt:
        return Verdict(0.0, str(spoilt))


async def by_command(task: Task, place: Place) -> Verdict:
    """A hidden command, beside hidden files, in the policy's own sandbox."""
    reward = task.reward
    await place.write(reward.files)
    result = await place.run(reward.command, reward.timeout_s, KEPT_FOR_LOG)
    if result.exit_code == 0 and not result.timed_out:
        return Verdict(1.0)
    return Verdict(0.0, f"the hidden test {'ran out of time' if result.timed_out else 'failed'}")
