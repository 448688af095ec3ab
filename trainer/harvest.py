"""A step's episodes: collected whole, at the pace that the run wants.

What it is
    `Harvests.next` gives the episodes of one step after the other. In step with training (the default) a
    step is played while training waits for it, and repeats exactly. One step ahead (`rollout.asynchronous`)
    the next step is played while this one is trained on: its episodes begin one update behind.

How to use it
    async with harvests(job) as field:
        harvest = await field.next()

What it does not do
    It plays no episode (`trainer.rollout`) and updates nothing (`trainer.train`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainer.checkpoint import Progress, capture
from trainer.data import Cursor
from trainer.distributed import share
from trainer.episode import Episode, Failure, Status
from trainer.errors import Lost, TrainerError
from trainer.interrupt import Interrupted, Wanted
from trainer.summary import dull, dull_share
from trainer.tasks import Task
from trainer.together import shared

if TYPE_CHECKING:
    from trainer.metrics import Row
    from trainer.train import Training

LOST_TRIES = 5
"""How often a step may lose most of its episodes, with a runtime that answers, before we give up."""


@dataclass(frozen=True)
class Harvest:
    """The episodes of one step, and what its row of metrics says about how they were got."""

    episodes: list[Episode]
    row: Row


class Harvests:
    """See the module's docstring."""

    def __init__(self, job: Training) -> None:
        self._job = job
        self._ahead: asyncio.Task[Harvest] | None = None
        self._begun: Cursor | None = None

    @property
    def cursor(self) -> Cursor:
        """Where the data stood before the first step that is not trained on yet."""
        return self._job.sampler.state_dict() if self._begun is None else self._begun

    async def next(self) -> Harvest:
        """The episodes of step `job.step`. Raises Interrupted, Lost and whatever stops a run; the state
        before the step has been saved then."""
        job = self._job
        with saved_on_failure(job, capture(job.step, self.cursor, job.config)):
            if not job.config.rollout.asynchronous:
                found = await job.interrupt.during(harvest(job, job.step))
                await prefetch(job)
                return found
            found = await job.interrupt.during(self._joined())
            self._ahead = self._begun = None
            if job.step + 1 < job.steps:
                self._begin(job.step + 1)
            return found

    def _begin(self, step: int) -> asyncio.Task[Harvest]:
        self._begun = self._job.sampler.state_dict()
        self._ahead = asyncio.create_task(harvest(self._job, step), name=f"step {step}")
        return self._ahead

    async def _joined(self) -> Harvest:
        return await (self._ahead or self._begin(self._job.step))

    async def close(self) -> None:
        """Cancel what is being played, until every sandbox is on its way out."""
        if self._ahead is not None:
            self._ahead.cancel()
            await asyncio.wait({self._ahead})
            if not self._ahead.cancelled():
                self._ahead.exception()  # the run ends for another reason already
            self._ahead = None


@asynccontextmanager
async def harvests(job: Training) -> AsyncIterator[Harvests]:
    """Harvests of a run; nothing goes on playing after it."""
    field = Harvests(job)
    try:
        yield field
    finally:
        await field.close()


async def harvest(job: Training, step: int) -> Harvest:
    """Play one step, then again those of its groups that teach nothing, on new tasks, for so many rounds."""
    rollout = job.config.rollout
    episodes, lost = await collect(job, draw(job, rollout.prompts_per_step), step)
    row: Row = {"lost_tries": lost, "groups/zero_variance": dull_share(episodes), **job.rollouts.counts}
    for round_ in range(1, rollout.resample + 1):
        if not (groups := dull(episodes)):
            break
        more, lost = await collect(job, draw(job, len(groups)), step, groups, round_)
        episodes = [episode for episode in episodes if episode.group not in groups] + more
        row["lost_tries"] += lost
        row["groups/resampled"] = row.get("groups/resampled", 0) + len(groups)
        row["groups/rounds"] = round_
    return Harvest(sorted(episodes, key=lambda episode: (episode.group, episode.number)), row)


def draw(job: Training, count: int) -> list[Task]:
    """The next tasks."""
    return [job.tasks[i] for i in job.sampler.take(count)]


async def collect(
    job: Training, tasks: Sequence[Task], step: int, groups: Sequence[int] = (), round_: int = 0
) -> tuple[list[Episode], int]:
    """Episodes of a step, of all ranks, and how many tries were lost before (`collect_mine`)."""

    async def play(tasks: Sequence[Task], groups: Sequence[int]) -> tuple[list[Episode], int]:
        return await collect_mine(job, tasks, step, groups, round_)

    return await shared(job.voice, job.interrupt, tasks, groups, play)


async def collect_mine(
    job: Training, tasks: Sequence[Task], step: int, groups: Sequence[int] = (), round_: int = 0
) -> tuple[list[Episode], int]:
    """This rank's episodes of a step, at least half of them valid, and how many tries were lost before.

    A step that infrastructure spoiled moves nothing. When a runtime went down, what it took along is played
    again, whole, once it is back: the step is then the one that an undisturbed run would have had. Raises
    Lost when no runtime answers for `training.peer_grace` and `runtime.failover_timeout`, or when it answers
    and still loses everything.
    """
    episodes: Sequence[Episode] = ()
    for lost in range(LOST_TRIES):
        episodes = await job.rollouts.collect(tasks, step, episodes, groups, round_)
        valid = sum(episode.valid for episode in episodes)
        if valid == len(episodes) or (2 * valid >= len(episodes) and not await job.rollouts.disturbed()):
            return list(episodes), lost
        errors = sorted({episode.error for episode in episodes if not episode.valid})
        job.events.add("step_lost", step=step, valid=valid, episodes=len(episodes), errors=errors[:3])
        await asyncio.sleep(job.pause_s)
        wait_s = job.config.training.peer_grace + job.config.runtime.failover_timeout
        await job.environment.wait_ready(wait_s)
    raise Lost(
        f"step {step} lost most of its episodes {LOST_TRIES} times although the runtime answers, "
        f"last with: {errors[0]}. See the runtime's log"
    )


async def prefetch(job: Training) -> None:
    """While this step's update is made, the sandboxes of the next one get ready."""
    if job.step + 1 < job.steps:
        coming = job.sampler.peek(job.config.rollout.prompts_per_step)
        part = share(len(coming), job.ranks)
        await job.rollouts.prefetch([job.tasks[i] for i in coming[part.start : part.stop]])


@contextmanager
def saved_on_failure(job: Training, before: Progress) -> Iterator[None]:
    """Until the update nothing has moved: whatever goes wrong, the state before the step is worth keeping."""
    try:
        yield
    except Interrupted as interrupted:
        if interrupted.wanted is Wanted.CHECKPOINT:
            job.save(before)
        raise
    except TrainerError:
        job.save(before)
        raise


def mask_stale(episodes: Sequence[Episode], version: int, most: int) -> None:
    """Mask the episodes that hold a token sampled more than `most` updates before weights of `version`."""
    for episode in episodes:
        if episode.valid and version - episode.oldest_version > most:
            error = f"sampled by weights {version - episode.oldest_version} updates old, allowed are {most}"
            episode.finish(status=Status.INFRA, error=error, failure=Failure.STALE)
