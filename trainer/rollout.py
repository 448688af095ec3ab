"""Rollouts: many episodes at once, each a coroutine that acts in a sandbox of its own.

What it is
    `Rollouts.collect` plays every task of a step `rollouts_per_prompt` times and returns the episodes
    in the order of the tasks, whatever order they ended in. Generation and command latency of
    different episodes overlap; a slow one holds up nobody else's turn.

How to use it
    rollouts = Rollouts.of(config, engine, environment, Shell(tokenizer))
    episodes = await rollouts.collect(tasks, step)

What it does not do
    No weights (`Engine.load`), no gradient. An episode that infrastructure lost is tried again in
    fresh sandboxes and then returned with status INFRA and an empty mask; it is never scored 0.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from trainer.agent import Agent, Format, Limits
from trainer.engines import Engine
from trainer.environments import Environment, Prefetching, Verdict, Workspace
from trainer.episode import Episode, Status
from trainer.errors import Broken, Lost, Overdue
from trainer.tasks import Task

if TYPE_CHECKING:
    from orchestrator.schema import Config

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """How many episodes, how many at once, how often again, and the seed that everything comes from."""

    rollouts_per_prompt: int = 1
    max_parallel: int = 64
    retries: int = 2
    retry_pause_s: float = 0.5
    seed: int = 0


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
        self, engine: Engine, environment: Environment, form: Format, limits: Limits, plan: Plan
    ) -> None:
        self._agent, self._environment, self._plan = Agent(engine, form, limits), environment, plan
        self._life: object = None

    @classmethod
    def of(cls, config: Config, engine: Engine, environment: Environment, form: Format) -> Self:
        """As a run's configuration asks for."""
        rollout = config.rollout
        plan = Plan(
            rollouts_per_prompt=rollout.rollouts_per_prompt,
            max_parallel=rollout.max_parallel_episodes,
            retries=rollout.retries,
            seed=config.run.seed,
        )
        return cls(engine, environment, form, Limits.of(config), plan)

    async def disturbed(self) -> bool:
        """Whether what makes the workspaces broke off since `collect` began, or does not answer now."""
        return self._life is None or await self._environment.life() != self._life

    async def prefetch(self, tasks: Sequence[Task]) -> None:
        """Say what `collect` will need next, to an environment that can make use of it. Never fails."""
        if isinstance(self._environment, Prefetching):
            images = Counter(task.image for task in tasks for _ in range(self._plan.rollouts_per_prompt))
            await self._environment.prefetch(images, self._plan.max_parallel)

    async def collect(self, tasks: Sequence[Task], step: int, known: Sequence[Episode] = ()) -> list[Episode]:
        """One episode per task and repetition, in order; `Episode.group` is the task's place in `tasks`.

        `known` are the episodes of an earlier try of this step: the valid ones are kept, the lost ones are
        played again, with the seeds that they had.

        Raises EngineDied, Refused or TaskError, at once and after every sandbox is on its way out;
        infrastructure failures raise nothing, they are in the episodes' status.
        """
        each = self._plan.rollouts_per_prompt
        places = [_Place(tasks[n // each], step, n // each, n) for n in range(len(tasks) * each)]
        found = {n: episode for n, episode in enumerate(known) if episode.valid}
        slots = asyncio.Semaphore(self._plan.max_parallel)
        self._life = await self._environment.life()
        try:
            async with asyncio.TaskGroup() as group:
                running = {
                    place.number: group.create_task(self._episode(place, slots), name=place.name)
                    for place in places
                    if place.number not in found
                }
        except BaseExceptionGroup as errors:
            # Of any kind, `Interrupted` too, which is no Exception: callers know plain errors, not groups.
            # The first one is the cause; the others were cancelled for it, or say the same.
            raise _first(errors) from errors
        found |= {number: task.result() for number, task in running.items()}
        return [found[place.number] for place in places]

    async def _episode(self, place: _Place, slots: asyncio.Semaphore) -> Episode:
        """Play one episode, again in a fresh sandbox each time that infrastructure loses it."""
        async with slots:
            for attempt in range(self._plan.retries + 1):
                start = time.perf_counter()
                episode = self._agent.start(place.task.id, place.group, place.task.prompt)
                try:
                    await self._attempt(place, episode)
                    retry = False
                except Lost as error:
                    log.warning("%s, attempt %d: %s", place.name, attempt + 1, error)
                    episode.finish(status=Status.INFRA, error=str(error))
                    retry = attempt < self._plan.retries and not isinstance(error, Overdue)
                episode.timings["total_s"] = time.perf_counter() - start
                episode.timings["attempts"] = attempt + 1
                if not retry:
                    break
                await asyncio.sleep(self._plan.retry_pause_s * 2**attempt)
        return episode

    async def _attempt(self, place: _Place, episode: Episode) -> None:
        """One sandbox, one dialogue, one verdict. The first words come while the sandbox is made."""

        def seed(turn: int) -> int:
            return self._seed(place, turn)

        async with self._opening(place.task) as opening:
            first = await self._agent.begin(episode, seed)
            workspace = await opening
            try:
                status = await self._agent.play(episode, workspace, seed, first)
                verdict = await workspace.verify()
            except Broken as error:
                if await self.disturbed():  # the server takes its sandboxes with it when it is killed
                    raise Lost(f"{error}, and the runtime with it") from error
                # the policy's own doing: scored, and it earned nothing
                status, verdict = Status.OK, Verdict(0.0, str(error))
            episode.finish(verdict.reward, status, verdict.reason)
        episode.timings |= workspace.timings
        episode.timings["generate_s"] = sum(turn.generate_s for turn in episode.turns)
        episode.timings["command_s"] = sum(turn.command_s for turn in episode.turns)

    @asynccontextmanager
    async def _opening(self, task: Task) -> AsyncIterator[asyncio.Task[Workspace]]:
        """A workspace on its way, which is closed in the end, however far it came."""
        async with AsyncExitStack() as stack:
            opening = asyncio.create_task(stack.enter_async_context(self._environment.open(task)))
            try:
                yield opening
            finally:
                opening.cancel()
                await asyncio.wait({opening})
                if not opening.cancelled():
                    opening.exception()  # whoever awaited it has it; nobody else needs it

    def _seed(self, place: _Place, turn: int) -> int:
        """Sampling seed: of run, step, episode and turn only, so that a resumed run repeats itself."""
        text = f"{self._plan.seed}/{place.step}/{place.number}/{turn}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest())


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first plain exception of a group."""
    first: BaseException = errors
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    return first


def summary(episodes: Sequence[Episode]) -> dict[str, float]:
    """What a step's metrics say about its rollouts: shares by status, rewards of the valid ones."""
    valid = [episode for episode in episodes if episode.valid]
    count = max(len(episodes), 1)
    shares = {f"status/{status}": sum(e.status is status for e in episodes) / count for status in Status}
    rewards = [episode.reward for episode in valid]
    mean = sum(rewards) / len(rewards) if rewards else 0.0
    return shares | {
        "reward_mean": mean,
        "success_rate": sum(r > 0.5 for r in rewards) / max(len(rewards), 1),
    }
