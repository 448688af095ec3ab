"""Rollouts: many episodes at once, each a coroutine that acts in a sandbox of its own.

What it is
    `Rollouts.collect` plays every task of a step `rollouts_per_prompt` times and returns the episodes
    in the order of the tasks, whatever order they ended in. Generation and command latency of
    different episodes overlap; a slow one holds up nobody else's turn. With `oversample` more episodes
    start than are needed, and those that are late are cancelled (`trainer.race`).

How to use it
    rollouts = Rollouts.of(config, engine, environment, Shell(tokenizer))
    episodes = await rollouts.collect(tasks, step)

What it does not do
    No weights (`Engine.load`), no gradient. An episode that infrastructure lost is tried again in
    fresh sandboxes, then replaced by one that was played besides, then returned with status INFRA and an
    empty mask; it is never scored 0.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

from trainer.agent import Agent, Limits
from trainer.engines import Engine
from trainer.environments import Environment, Prefetching, Verdict, Workspace
from trainer.episode import Episode, Failure, Status
from trainer.errors import Broken, Lost, Overdue, TaskError
from trainer.formats import Format
from trainer.race import Rules, race
from trainer.summary import summary
from trainer.tasks import Task
from trainer.watch import Watch

if TYPE_CHECKING:
    from orchestrator.schema import Config

__all__ = ["Plan", "Rollouts", "summary"]

log = logging.getLogger(__name__)
Seen = Callable[[Episode], None]
"""Is called with each valid episode as it ends."""
ROUND = 1_000_000
"""Episodes of later rounds of a step are numbered from here on, so that their seeds are their own."""


@dataclass(frozen=True)
class Plan:
    """How many episodes, how many at once, how often again, and the seed that everything comes from."""

    rollouts_per_prompt: int = 1
    max_parallel: int = 64
    retries: int = 2
    retry_pause_s: float = 0.5
    seed: int = 0
    oversample: float = 1.0
    grace_s: float = 2.0
    step_timeout_s: float | None = None
    purpose: str = ""
    """What else the seeds come from: validation must not repeat what training draws."""

    @classmethod
    def of(cls, config: Config) -> Self:
        """As a run's configuration asks for. Raises TaskError on what makes no sense."""
        rollout = config.rollout
        if rollout.resample and rollout.rollouts_per_prompt < 2:
            raise TaskError(
                "rollout.resample replaces groups that all earned the same, and a group of one always does: "
                "set rollout.rollouts_per_prompt to 2 or more, or rollout.resample=0"
            )
        return cls(
            rollouts_per_prompt=rollout.rollouts_per_prompt,
            max_parallel=rollout.max_parallel_episodes,
            retries=rollout.retries,
            seed=config.run.seed,
            oversample=rollout.oversample,
            grace_s=rollout.straggler_grace,
            step_timeout_s=rollout.step_timeout,
        )


@dataclass(frozen=True)
class _Place:
    """Which episode: its task, the group (index of the prompt in the step), its number in the step."""

    task: Task
    step: int
    group: int
    number: int

    @property
    def name(self) -> str:
        return f"step {self.step}, episode {self.number} ({self.task.id})"


class Rollouts:
    """Collects episodes with one engine in one environment."""

    def __init__(
        self,
        engine: Engine,
        environment: Environment,
        form: Format,
        limits: Limits,
        plan: Plan,
        watch: Watch | None = None,
    ) -> None:
        self.watch = watch or Watch()
        self._agent = Agent(engine, form, limits, self.watch)
        self._environment, self._plan = environment, plan
        self._life: object = None
        self.counts: dict[str, float] = {}
        """Of the last `collect`, where it played more than was needed: started, cancelled, refilled."""

    @classmethod
    def of(cls, config: Config, engine: Engine, environment: Environment, form: Format) -> Self:
        """As a run's configuration asks for. Raises TaskError."""
        return cls(engine, environment, form, Limits.of(config), Plan.of(config))

    def for_validation(self, config: Config, purpose: str = "validation/") -> Rollouts:
        """The same engine, environment and format, for validation tasks: each as often as is asked for.
        Other purposes have other seeds."""
        rollout, agent = config.rollout, self._agent
        limits = replace(agent.limits, greedy=rollout.validation_greedy)
        plan = replace(
            self._plan,
            rollouts_per_prompt=rollout.validation_rollouts,
            oversample=1.0,
            step_timeout_s=None,
            purpose=purpose,
        )
        return Rollouts(agent.engine, self._environment, agent.form, limits, plan)

    async def disturbed(self) -> bool:
        """Whether what makes the workspaces broke off since `collect` began, or does not answer now."""
        return self._life is None or await self._environment.life() != self._life

    async def prefetch(self, tasks: Sequence[Task]) -> None:
        """Say what `collect` will need next, to an environment that can make use of it. Never fails."""
        if isinstance(self._environment, Prefetching):
            images = Counter(task.image for task in tasks for _ in range(self._plan.rollouts_per_prompt))
            await self._environment.prefetch(images, self._plan.max_parallel)

    async def collect(
        self,
        tasks: Sequence[Task],
        step: int,
        known: Sequence[Episode] = (),
        groups: Sequence[int] = (),
        round_: int = 0,
        seen: Seen | None = None,
    ) -> list[Episode]:
        """One episode per task and repetition, in order; `Episode.group` is the task's place in `tasks`, or
        what `groups` says. `round_` tells the parts of one step apart that are collected one after the other.

        `known` are the episodes of an earlier try of this step: the valid ones are kept, the lost ones are
        played again, with the seeds that they had. `seen` gets every valid one that is played.

        Raises EngineDied, Refused or TaskError, at once and after every sandbox is on its way out;
        infrastructure failures raise nothing, they are in the episodes' status.
        """
        wanted, places = self._places(tasks, step, groups or range(len(tasks)), round_)
        found = {episode.number: episode for episode in known if episode.valid}
        slots = asyncio.Semaphore(self._plan.max_parallel)
        self._life = await self._environment.life()
        numbers = [place.number for place in places]
        rules = Rules(numbers[:wanted], numbers[wanted:], self._plan.grace_s, self._plan.step_timeout_s)
        started = {
            place.number: asyncio.create_task(self._episode(place, slots, seen), name=place.name)
            for place in places
            if place.number not in found
        }
        ended = await race(rules, started, found)
        if len(places) > wanted or self._plan.step_timeout_s:
            self._count(rules, started, ended)
        episodes = {place.number: ended.get(place.number) or self._late(place) for place in places[:wanted]}
        return rules.filled(episodes, ended)

    def _places(
        self, tasks: Sequence[Task], step: int, groups: Sequence[int], round_: int
    ) -> tuple[int, list[_Place]]:
        """How many episodes are wanted, and those that are started: the wanted ones, then the ones besides,
        which are dealt out to the groups in turn."""
        each, start = self._plan.rollouts_per_prompt, round_ * ROUND
        wanted = len(tasks) * each
        more = math.ceil(wanted * (self._plan.oversample - 1) - 1e-9)
        # Numbers come from the groups, so that those of a share, or of what is left, are as in the whole.
        numbers = [start + group * each + n for group in groups for n in range(each)]
        besides = start + (max(groups, default=-1) + 1) * each
        which = [*(n // each for n in range(wanted)), *(n % len(tasks) for n in range(more))]
        numbers += range(besides, besides + more)
        return wanted, [_Place(tasks[i], step, groups[i], n) for n, i in zip(numbers, which, strict=True)]

    def _count(
        self, rules: Rules, started: dict[int, asyncio.Task[Episode]], ended: dict[int, Episode]
    ) -> None:
        late = [task.get_name() for number, task in started.items() if number not in ended]
        missing = sum(not (n in ended and ended[n].valid) for n in rules.wanted)
        valid = sum(ended[n].valid for n in rules.besides if n in ended)
        self.counts = {
            "rollout/started": len(started),
            "rollout/cancelled": len(late),
            "rollout/refilled": min(missing, valid),
        }
        if slow := [name for name in late if missing]:
            log.warning("cancelled, because the step has enough or is out of time: %s", ", ".join(slow[:8]))

    def _late(self, place: _Place) -> Episode:
        """What stands for an episode that was cancelled: masked, as if infrastructure had lost it."""
        episode = self._started(place, self._agent)
        return episode.finish(
            status=Status.INFRA, error="it was late, and the step ended without it", failure=Failure.LATE
        )

    def _started(self, place: _Place, agent: Agent) -> Episode:
        task = place.task
        episode = agent.start(task.id, place.group, task.messages or task.prompt)
        episode.number, episode.prompt = place.number, task.prompt
        return episode

    async def _episode(self, place: _Place, slots: asyncio.Semaphore, seen: Seen | None = None) -> Episode:
        """Play one episode, again in a fresh sandbox each time that infrastructure loses it."""
        agent = self._agent.of_task(place.task)
        async with slots:
            for attempt in range(self._plan.retries + 1):
                start = time.perf_counter()
                episode = self._started(place, agent)
                try:
                    await self._attempt(place, episode, agent)
                    retry = False
                except Lost as error:
                    log.warning("%s, attempt %d: %s", place.name, attempt + 1, error)
                    failure = Failure.OVERDUE if isinstance(error, Overdue) else Failure.LOST
                    episode.finish(status=Status.INFRA, error=str(error), failure=failure)
                    retry = attempt < self._plan.retries and not isinstance(error, Overdue)
                episode.timings["total_s"] = time.perf_counter() - start
                episode.timings["attempts"] = attempt + 1
                if not retry:
                    break
                await asyncio.sleep(self._plan.retry_pause_s * 2**attempt)
        if seen is not None and episode.valid:
            seen(episode)
        return episode

    async def _attempt(self, place: _Place, episode: Episode, agent: Agent) -> None:
        """One sandbox, one dialogue, one verdict. The first words come while the sandbox is made."""

        def seed(turn: int) -> int:
            return self._seed(place, turn)

        async with self._opening(place.task) as opening:
            first = await agent.begin(episode, seed)
            workspace = await opening
            try:
                status = await agent.play(episode, workspace, seed, first)
                with self.watch("environment"):
                    verdict = await workspace.verify(episode.answer)
            except Broken as error:
                if await self.disturbed():  # the server takes its sandboxes with it when it is killed
                    raise Lost(f"{error}, and the runtime with it") from error
                # the policy's own doing: scored, and it earned nothing
                status, verdict = Status.OK, Verdict(0.0, str(error))
                episode.failure = Failure.BROKEN
            episode.finish(verdict.reward, status, verdict.reason)
        episode.timings |= workspace.timings
        episode.timings["generate_s"] = sum(turn.generate_s for turn in episode.turns)
        episode.timings["command_s"] = sum(turn.command_s for turn in episode.turns)

    @asynccontextmanager
    async def _opening(self, task: Task) -> AsyncIterator[asyncio.Task[Workspace]]:
        """A workspace on its way, which is closed in the end, however far it came."""
        async with AsyncExitStack() as stack:
            opening = asyncio.create_task(self._opened(stack, task))
            try:
                yield opening
            finally:
                opening.cancel()
                await asyncio.wait({opening})
                if not opening.cancelled():
                    opening.exception()  # whoever awaited it has it; nobody else needs it

    async def _opened(self, stack: AsyncExitStack, task: Task) -> Workspace:
        with self.watch("environment"):
            return await stack.enter_async_context(self._environment.open(task))

    def _seed(self, place: _Place, turn: int) -> int:
        """Sampling seed: of run, step, episode and turn only, so that a resumed run repeats itself."""
        text = f"{self._plan.purpose}{self._plan.seed}/{place.step}/{place.number}/{turn}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest())
