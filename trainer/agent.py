"""The agent: turn by turn, sample an action, do it, let the policy see what came of it.

What it is
    `Agent.play` is the whole dialogue of one episode. It speaks token ids to the engine and bytes to
    the workspace; a `trainer.formats.Format` is what lies between. Each layer has a deadline of its own: the
    sampling of a turn, each of its commands, all of them together, and the episode.

How to use it
    agent = Agent(engine, Shell(tokenizer), Limits.of(config)).of_task(task)
    episode = agent.start(task.id, 0, task.prompt)
    first = await agent.begin(episode, seed_of_turn)             # needs no sandbox yet
    status = await agent.play(episode, workspace, seed_of_turn, first)

What it does not do
    No verification and no retries (`trainer.rollout`), no advantage, no tensors. It never encodes what
    was decoded: text is made of ids for the tools and for the log only.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self, TypeVar

from trainer.engines import Engine, Sampling
from trainer.environments import CommandResult, Workspace
from trainer.episode import Episode, Failure, Status, Turn, Used
from trainer.errors import Overdue, TaskError
from trainer.formats import Action, Format, Prompt, Tokenizer, bounded
from trainer.formats.shell import Shell
from trainer.tools import Toolbox
from trainer.watch import Watch

if TYPE_CHECKING:
    from orchestrator.schema import Config
    from trainer.tasks import Task

__all__ = ["Action", "Agent", "Format", "Limits", "Shell", "Tokenizer", "bounded"]


N = TypeVar("N", int, float)


@dataclass(frozen=True)
class Limits:
    """Bounds of one episode: lengths in tokens, times in seconds. And how its turns are sampled."""

    max_turns: int = 8
    max_tokens_per_turn: int = 512
    max_prompt_length: int = 2048
    max_response_length: int = 4096
    max_observation_bytes: int = 8192
    temperature: float = 1.0
    turn_timeout_s: float = 120.0
    episode_timeout_s: float = 1800.0
    command_timeout_s: float | None = None
    generation_timeout_s: float = 600.0
    greedy: bool = False
    tools: tuple[str, ...] = ()
    shell_stays: bool = True

    @classmethod
    def of(cls, config: Config) -> Self:
        """What a run's configuration says."""
        rollout = config.rollout
        return cls(
            rollout.max_turns,
            rollout.max_tokens_per_turn,
            rollout.max_prompt_length,
            rollout.max_response_length,
            rollout.max_observation_bytes,
            rollout.temperature,
            rollout.turn_timeout,
            rollout.episode_timeout,
            rollout.command_timeout,
            rollout.generation_timeout,
            tools=tuple(rollout.tools) if rollout.format == "chat" else (),
            shell_stays=rollout.bash == "session",
        )

    def within(self, task: Task) -> Self:
        """The tighter of these and the task's own budget; of the tools, those that the task has, too."""
        budget = task.budget
        return replace(
            self,
            max_turns=_least(self.max_turns, budget.turns),
            max_response_length=_least(self.max_response_length, budget.tokens),
            episode_timeout_s=_least(self.episode_timeout_s, budget.seconds),
            tools=tuple(name for name in self.tools if not task.tools or name in task.tools),
        )


def _least(mine: N, other: N | None) -> N:
    return mine if other is None else min(mine, other)


Spoken = tuple[Turn, Action] | None
"""A turn that was sampled and the action in it; None when there was no room for one."""


class Agent:
    """Plays episodes of one format with one engine. Holds no state between episodes."""

    def __init__(self, engine: Engine, form: Format, limits: Limits, watch: Watch | None = None) -> None:
        self.engine, self.form, self.limits = engine, form, limits
        self.watch = watch or Watch()

    def of_task(self, task: Task) -> Agent:
        """The agent under a task's own budget and tools."""
        return Agent(self.engine, self.form, self.limits.within(task), self.watch)

    def start(self, task_id: str, group: int, prompt: Prompt) -> Episode:
        """An episode that holds its prompt. Raises TaskError when that is too long."""
        ids = self.form.prompt(prompt, self.limits.tools or None)
        if len(ids) > self.limits.max_prompt_length:
            raise TaskError(
                f"task {task_id}: the prompt has {len(ids)} tokens, allowed are "
                f"{self.limits.max_prompt_length}; raise rollout.max_prompt_length or shorten it"
            )
        return Episode.start(task_id, group, ids, self.engine.version)

    async def begin(self, episode: Episode, seed: Callable[[int], int]) -> Spoken:
        """Sample the first turn, which needs no sandbox yet. Raises Overdue when the engine is too slow."""
        try:
            async with asyncio.timeout(self.limits.episode_timeout_s):
                return await self._speak(episode, seed(0))
        except TimeoutError:
            raise Overdue(f"task {episode.task_id}: the engine is too slow for the first turn") from None

    async def play(
        self, episode: Episode, workspace: Workspace, seed: Callable[[int], int], first: Spoken
    ) -> Status:
        """All turns after `first` of `begin`, and its action, under the episode's deadline.

        `seed` gives the sampling seed of a turn. Returns how the dialogue ended; the episode's `failure` says
        why. Raises Broken when the policy broke its sandbox, Lost when infrastructure did, which includes an
        engine too slow for a deadline.
        """
        try:
            async with asyncio.timeout(self.limits.episode_timeout_s):
                return await self._turns(episode, workspace, seed, first)
        except TimeoutError:
            return self._late(episode)

    def _late(self, episode: Episode) -> Status:
        """Whose fault a missed deadline is: the policy's, if its commands took most of the time."""
        commands = sum(turn.command_s for turn in episode.turns)
        if commands >= self.limits.episode_timeout_s / 2:
            episode.failure = Failure.COMMANDS
            return Status.TIMEOUT
        raise Overdue(
            f"task {episode.task_id}: {self.limits.episode_timeout_s:g} s passed by turn "
            f"{len(episode.turns)}, only {commands:.1f} s of them in its commands; the engine or the "
            "server is too slow"
        )

    async def _turns(
        self, episode: Episode, workspace: Workspace, seed: Callable[[int], int], spoken: Spoken
    ) -> Status:
        box = self._box(workspace)
        for number in range(1, self.limits.max_turns + 1):
            if spoken is None or not spoken[1].complete:
                return _cut(episode, Failure.TOKENS)
            turn, action = spoken
            sent = list(episode.ids)
            outputs = await self._act(turn, action, workspace, box)
            if action.last or number == self.limits.max_turns:
                # for the log; the policy is done
                turn.observation = b"\n".join(outputs).decode(errors="replace")
                return self._ended(episode, action)
            if not self._observe(episode, action, outputs):
                return _cut(episode, Failure.TOKENS)
            # What the policy continues must start with exactly what it was given and said before.
            assert episode.ids[: len(sent)] == sent, "the history of an episode was rewritten"
            spoken = await self._speak(episode, seed(number))
        raise AssertionError("unreachable: the last turn returns")

    def _box(self, workspace: Workspace) -> Toolbox | None:
        limits = self.limits
        if not limits.tools:
            return None
        return Toolbox(workspace, limits.tools, limits.max_observation_bytes, limits.shell_stays)

    async def _speak(self, episode: Episode, seed: int) -> Spoken:
        """One turn of the policy; None when no token is left to it. Raises Overdue."""
        room = episode.prompt_length + self.limits.max_response_length - len(episode.ids)
        if room < 1:
            return None
        start, limits = time.perf_counter(), self.limits
        most = min(room, limits.max_tokens_per_turn)
        sampling = Sampling(most, limits.temperature, self.form.stop_token_ids, seed, greedy=limits.greedy)
        try:
            async with asyncio.timeout(limits.generation_timeout_s) as deadline:
                with self.watch("generate"):
                    sample = await self.engine.generate(list(episode.ids), sampling)
        except TimeoutError:
            if not deadline.expired():  # it is the episode's
                raise
            raise Overdue(
                f"task {episode.task_id}: turn {len(episode.turns)} was not sampled within "
                f"{limits.generation_timeout_s:g} s (rollout.generation_timeout)"
            ) from None
        action = self.form.action(sample)
        episode.answer = action.answer
        spans = sample.spans or ((0, self.engine.version),)
        turn = episode.sampled(sample.ids, sample.logprobs, action.text, sample.finish_reason, spans)
        turn.generate_s = time.perf_counter() - start
        return turn, action

    async def _act(
        self, turn: Turn, action: Action, workspace: Workspace, box: Toolbox | None
    ) -> Sequence[bytes]:
        """Do what the action asks for. The time counts even when a deadline cuts it off."""
        if action.command is None and not action.calls:
            return [b""]
        start = time.perf_counter()
        try:
            with self.watch("environment"):
                if box is not None and action.calls:
                    return await self._use(turn, action, box)
                return [await self._run(turn, action.command or "", workspace)]
        finally:
            turn.command_s = time.perf_counter() - start

    async def _run(self, turn: Turn, command: str, workspace: Workspace) -> bytes:
        timeout_s = self._command_s(self.limits.turn_timeout_s)
        result = await workspace.run(command, timeout_s, max(self.limits.max_observation_bytes, 1024))
        turn.exit_code, turn.timed_out = result.exit_code, result.timed_out
        return _output(result, self.limits.max_observation_bytes, timeout_s)

    async def _use(self, turn: Turn, action: Action, box: Toolbox) -> list[bytes]:
        """The calls in their order, all within the turn's time: what has none left is not run."""
        outputs, end = list[bytes](), time.perf_counter() + self.limits.turn_timeout_s
        for call in action.calls:
            left = end - time.perf_counter()
            if left <= 0:
                problem = f"not run: the turn's {self.limits.turn_timeout_s:g} s are used up"
                call = replace(call, problem=call.problem or problem)
            found = await box.use(call, self._command_s(left))
            used = Used(call.tool, found.problem, found.exit_code, found.timed_out, found.seconds)
            turn.used.append(used)
            turn.timed_out = turn.timed_out or found.timed_out
            turn.exit_code = turn.exit_code if found.exit_code is None else found.exit_code
            outputs.append(found.output)
        return outputs

    def _command_s(self, left: float) -> float:
        return min(left, self.limits.command_timeout_s or left)

    def _observe(self, episode: Episode, action: Action, outputs: Sequence[bytes]) -> bool:
        """Append what the policy sees next. False when that leaves no room to act."""
        text, ids = self.form.reply(action, outputs, self.limits.max_observation_bytes)
        if episode.response_length + len(ids) >= self.limits.max_response_length:
            return False
        episode.observed(ids, text)
        return True

    def _ended(self, episode: Episode, action: Action) -> Status:
        if self.form.has_closing_action and not action.last:
            return _cut(episode, Failure.TURNS)
        return Status.OK


def _cut(episode: Episode, failure: Failure) -> Status:
    episode.failure = failure
    return Status.TRUNCATED


def _output(result: CommandResult, most: int, timeout_s: float) -> bytes:
    """The command's output, bounded, with a word on a timeout."""
    output = bounded(result.output, most, result.left_out)
    if not result.timed_out:
        return output
    return (output + b"\n[timed out after %g s]" % timeout_s).lstrip(b"\n")
