"""The agent: turn by turn, sample a command, run it, let the policy see what came of it.

What it is
    `Agent.play` is the whole dialogue of one episode. It speaks token ids to the engine and bytes to
    the workspace; a `Format` is what lies between: how a task becomes the first ids, where an action
    ends, and how an observation becomes ids. `Shell` is the format of small models that know no chat
    template; formats with tool calls fit the same protocol.

How to use it
    agent = Agent(engine, Shell(tokenizer), Limits.of(config))
    first = await agent.begin(episode, seed_of_turn)             # needs no sandbox yet
    status = await agent.play(episode, workspace, seed_of_turn, first)

What it does not do
    No verification and no retries (`trainer.rollout`), no advantage, no tensors. It never encodes what
    was decoded: text is made of ids for the shell and for the log only.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self

from trainer.engines import Engine, Sample, Sampling
from trainer.environments import CommandResult, Workspace
from trainer.episode import Episode, Status, Turn
from trainer.errors import Overdue, TaskError

if TYPE_CHECKING:
    from orchestrator.schema import Config


class Tokenizer(Protocol):
    """Text to ids and back. `encode` must not turn text into special tokens."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True)
class Action:
    """What a sample means, and how it reads. `command` None: nothing to run. `last`: the policy ends
    the episode here."""

    text: str
    command: str | None = None
    last: bool = False
    complete: bool = True  # False: the tokens ran out before the action ended


class Format(Protocol):
    """How an agent's dialogue is written in tokens."""

    stop_token_ids: tuple[int, ...]
    has_closing_action: bool
    """True when a policy is expected to end its episode itself; running out of turns is then a truncation."""

    def prompt(self, text: str) -> list[int]:
        """The ids that an episode starts with."""

    def action(self, sample: Sample) -> Action:
        """What the policy wants."""

    def observation(self, output: bytes, limit: int) -> tuple[str, list[int]]:
        """A command's output as the policy sees it, up to where it acts again: text, and its ids."""


class Shell:
    """A plain shell session: "$ " asks, one line answers, the output follows, "$ " asks again.

    The newline ends the action and belongs to the policy; the output and the next "$ " are observed.
    """

    PROMPT = "$ "
    has_closing_action = False

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises TaskError when a newline is not one token: an action could not end there."""
        self._tokenizer = tokenizer
        newline = tokenizer.encode("\n")
        if len(newline) != 1:
            raise TaskError(f"the shell format needs a newline to be one token, here it is {newline}")
        self.stop_token_ids: tuple[int, ...] = (newline[0],)

    def prompt(self, text: str) -> list[int]:
        return self._tokenizer.encode(text if text.endswith(self.PROMPT) else f"{text}\n{self.PROMPT}")

    def action(self, sample: Sample) -> Action:
        text = self._tokenizer.decode(sample.ids)
        if sample.finish_reason != "stop":
            return Action(text, complete=False)
        # A shell drops NUL bytes from what is typed; no command line can carry them.
        line = self._tokenizer.decode(sample.ids[:-1]).replace("\0", "").strip()
        if line in ("exit", "logout"):
            return Action(text, last=True)
        return Action(text, line or None, last=sample.ids[-1] not in self.stop_token_ids)

    def line(self, command: str) -> list[int]:
        """The ids of a whole action, as a policy would sample it."""
        return [*self._tokenizer.encode(command), *self.stop_token_ids]

    def observation(self, output: bytes, limit: int) -> tuple[str, list[int]]:
        text = bounded(output, limit).decode(errors="replace")
        text += "\n" if text and not text.endswith("\n") else ""
        return text + self.PROMPT, self._tokenizer.encode(text + self.PROMPT)


def bounded(output: bytes, limit: int) -> bytes:
    """At most `limit` bytes: the head when the limit is small, else head and tail with a mark between."""
    if len(output) <= limit:
        return output
    mark = b"\n[... %d bytes left out ...]\n" % (len(output) - limit)
    if limit < 4 * len(mark):
        return output[:limit]
    half = (limit - len(mark)) // 2
    return output[:half] + mark + output[-half:]


@dataclass(frozen=True)
class Limits:
    """Bounds of one episode: lengths in tokens, times in seconds."""

    max_turns: int = 8
    max_tokens_per_turn: int = 512
    max_prompt_length: int = 2048
    max_response_length: int = 4096
    max_observation_bytes: int = 8192
    temperature: float = 1.0
    turn_timeout_s: float = 120.0
    episode_timeout_s: float = 1800.0

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
        )


Spoken = tuple[Turn, Action] | None
"""A turn that was sampled and the action in it; None when there was no room for one."""


class Agent:
    """Plays episodes of one format with one engine. Holds no state between episodes."""

    def __init__(self, engine: Engine, form: Format, limits: Limits) -> None:
        self.engine, self.form, self.limits = engine, form, limits

    def start(self, task_id: str, group: int, prompt: str) -> Episode:
        """An episode that holds its prompt. Raises TaskError when that is too long."""
        ids = self.form.prompt(prompt)
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

        `seed` gives the sampling seed of a turn. Returns how the dialogue ended. Raises Broken when the
        policy broke its sandbox, Lost when infrastructure did, which includes an engine too slow for the
        deadline.
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
            return Status.TIMEOUT
        raise Overdue(
            f"task {episode.task_id}: {self.limits.episode_timeout_s:g} s passed by turn "
            f"{len(episode.turns)}, only {commands:.1f} s of them in its commands; the engine or the "
            "server is too slow"
        )

    async def _turns(
        self, episode: Episode, workspace: Workspace, seed: Callable[[int], int], spoken: Spoken
    ) -> Status:
        for number in range(1, self.limits.max_turns + 1):
            if spoken is None or not spoken[1].complete:
                return Status.TRUNCATED
            turn, action = spoken
            sent = list(episode.ids)
            output = await self._run(turn, action, workspace)
            if action.last or number == self.limits.max_turns:
                turn.observation = output.decode(errors="replace")  # for the log; the policy is done
                return self._ended(action)
            if not self._observe(episode, output):
                return Status.TRUNCATED
            # What the policy continues must start with exactly what it was given and said before.
            assert episode.ids[: len(sent)] == sent, "the history of an episode was rewritten"
            spoken = await self._speak(episode, seed(number))
        raise AssertionError("unreachable: the last turn returns")

    async def _speak(self, episode: Episode, seed: int) -> Spoken:
        """One turn of the policy; None when no token is left to it."""
        room = episode.prompt_length + self.limits.max_response_length - len(episode.ids)
        if room < 1:
            return None
        start = time.perf_counter()
        most = min(room, self.limits.max_tokens_per_turn)
        sampling = Sampling(most, self.limits.temperature, self.form.stop_token_ids, seed)
        sample = await self.engine.generate(list(episode.ids), sampling)
        action = self.form.action(sample)
        turn = episode.sampled(sample.ids, sample.logprobs, action.text, sample.finish_reason)
        turn.generate_s = time.perf_counter() - start
        return turn, action

    async def _run(self, turn: Turn, action: Action, workspace: Workspace) -> bytes:
        """Run the action's command, if it has one. The time counts even when the deadline cuts it off."""
        if action.command is None:
            return b""
        start = time.perf_counter()
        try:
            result = await workspace.run(
                action.command, self.limits.turn_timeout_s, max(self.limits.max_observation_bytes, 1024)
            )
        finally:
            turn.command_s = time.perf_counter() - start
        turn.exit_code, turn.timed_out = result.exit_code, result.timed_out
        return _output(result, self.limits)

    def _observe(self, episode: Episode, output: bytes) -> bool:
        """Append what the policy sees next. False when that leaves no room to act."""
        text, ids = self.form.observation(output, self.limits.max_observation_bytes)
        if episode.response_length + len(ids) >= self.limits.max_response_length:
            return False
        episode.observed(ids, text)
        return True

    def _ended(self, action: Action) -> Status:
        cut = self.form.has_closing_action and not action.last
        return Status.TRUNCATED if cut else Status.OK


def _output(result: CommandResult, limits: Limits) -> bytes:
    """The command's output, bounded, with a word on a timeout."""
    output = bounded(result.output, limits.max_observation_bytes)
    if not result.timed_out:
        return output
    return (output + b"\n[timed out after %g s]" % limits.turn_timeout_s).lstrip(b"\n")
