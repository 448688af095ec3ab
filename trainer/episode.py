"""One trajectory as token ids: what was sampled, what was observed, what it was worth.

What it is
    `Episode` is an append-only buffer. Token in, token out: `ids` is the prompt, then for each turn the
    ids exactly as the engine sampled them, then the tokenised observation. Nothing is ever decoded and
    encoded again, so the ids that were sampled are the ids that are trained on. `mask` is 1 where the
    policy sampled the token (its stop token included) and 0 everywhere else.

How to use it
    episode = Episode.start("task-1", group=0, prompt=[...])
    episode.sampled(sample.ids, sample.logprobs, text="ls"); episode.observed([...], text="hint.txt")
    episode.finish(reward=1.0)

What it does not do
    No sampling, no sandbox, no tensors; it imports the standard library only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Self


class Status(StrEnum):
    """How an episode ended. Only INFRA is masked: the policy cannot have caused it."""

    OK = "ok"
    TRUNCATED = "truncated"  # ran out of tokens, or of turns where the format has a closing action
    TIMEOUT = "timeout"  # the policy's commands used up the episode's time
    INFRA = "infra"  # server, node or sandbox lost


class Failure(StrEnum):
    """Why an episode came to nothing, or to less: finer than its status, for statistics."""

    NONE = ""
    TOKENS = "tokens"  # no token was left, in a turn or in the episode
    TURNS = "turns"  # no turn was left, where the policy was to end by itself
    COMMANDS = "commands"  # its commands used up the episode's time
    BROKEN = "broken"  # it broke its own sandbox
    LOST = "lost"  # infrastructure lost its sandbox, and the fresh ones after that
    OVERDUE = "overdue"  # the engine or the server was too slow
    LATE = "late"  # the step ended without it
    STALE = "stale"  # sampled by weights that are too old


@dataclass
class Used:
    """One tool call of a turn, for the log. `problem`: it was malformed or could not be done."""

    tool: str
    problem: str = ""
    exit_code: int | None = None
    timed_out: bool = False
    seconds: float = 0.0


@dataclass
class Turn:
    """One sample and what came of it. `start` and `end` bound the sampled tokens in the episode's ids."""

    start: int
    end: int
    text: str = ""
    observation: str = ""
    finish_reason: str = ""
    exit_code: int | None = None
    timed_out: bool = False
    generate_s: float = 0.0
    command_s: float = 0.0
    used: list[Used] = field(default_factory=list)


@dataclass
class Episode:
    """One trajectory; `ids`, `mask` and `logprobs` have the same length."""

    task_id: str
    group: int
    ids: list[int]
    prompt_length: int
    mask: list[int]
    logprobs: list[float]
    reward: float = 0.0
    status: Status = Status.OK
    turns: list[Turn] = field(default_factory=list)
    error: str = ""
    timings: dict[str, float] = field(default_factory=dict)
    weight_version: int = 0
    number: int = 0
    """Its place in the step: what its seeds come from."""
    failure: Failure = Failure.NONE
    prompt: str = ""
    """What the task asks, as text, for the log."""
    answer: str = ""
    """What the policy said last, without the token that ends it."""
    spans: list[tuple[int, int]] = field(default_factory=list)
    """(first token, version of the weights that sampled from there on), versions rising."""

    @classmethod
    def start(cls, task_id: str, group: int, prompt: Sequence[int], weight_version: int = 0) -> Self:
        """A new trajectory that holds its prompt only. Raises ValueError on an empty prompt."""
        if not prompt:
            raise ValueError(f"task {task_id}: the prompt has no tokens, and a policy cannot start from none")
        size = len(prompt)
        return cls(
            task_id, group, list(prompt), size, [0] * size, [0.0] * size, weight_version=weight_version
        )

    @property
    def valid(self) -> bool:
        """False when infrastructure lost it: no gradient, not in group means, not in whitening."""
        return self.status is not Status.INFRA

    @property
    def response_length(self) -> int:
        """Tokens after the prompt, observations included."""
        return len(self.ids) - self.prompt_length

    @property
    def action_tokens(self) -> int:
        """Tokens that the policy sampled and that are trained on."""
        return sum(self.mask)

    def sampled(
        self,
        ids: Sequence[int],
        logprobs: Sequence[float],
        text: str = "",
        finish_reason: str = "",
        spans: Sequence[tuple[int, int]] = (),
    ) -> Turn:
        """Append what the engine sampled, stop token included, with the engine's log-probabilities (nats).

        `spans`: (first of these ids, version of the weights that sampled from there on).
        """
        if len(ids) != len(logprobs):
            raise ValueError(f"{self.task_id}: {len(ids)} sampled ids but {len(logprobs)} log-probabilities")
        start = len(self.ids)
        for at, version in spans:
            if not self.spans or self.spans[-1][1] != version:
                self.spans.append((start + at, version))
        self._append(ids, 1, logprobs)
        self.turns.append(Turn(start, len(self.ids), text, finish_reason=finish_reason))
        return self.turns[-1]

    def observed(self, ids: Sequence[int], text: str = "") -> None:
        """Append an observation of the last turn: masked, no log-probabilities."""
        self._append(ids, 0, [0.0] * len(ids))
        self.turns[-1].observation += text

    @property
    def oldest_version(self) -> int:
        """Of the weights that sampled any of its tokens."""
        return min((version for _, version in self.spans), default=self.weight_version)

    def finish(
        self,
        reward: float = 0.0,
        status: Status | None = None,
        error: str = "",
        failure: Failure | None = None,
    ) -> Self:
        """Set what it was worth. An infrastructure failure clears the mask and the log-probabilities."""
        self.reward, self.error = reward, error or self.error
        self.status = status or self.status
        self.failure = self.failure if failure is None else failure
        if not self.valid:
            self.reward, self.mask = 0.0, [0] * len(self.ids)
            self.logprobs = [0.0] * len(self.ids)
        return self

    def _append(self, ids: Sequence[int], mask: int, logprobs: Sequence[float]) -> None:
        self.ids += ids
        self.mask += [mask] * len(ids)
        self.logprobs += logprobs
