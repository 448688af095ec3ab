"""A step's episodes, played by all ranks and known to all of them.

What it is
    `shared` lets each rank play its run of the prompts with its own engine, and gives every rank all
    episodes. What one rank cannot do, none has done: an error, or a request to end, that reaches one rank
    while the others play is raised on all of them, so that all save, or none does.

How to use it
    episodes, lost = await shared(ranks, interrupt, tasks, groups, play)

What it does not do
    It decides nothing about episodes (`trainer.harvest`). Ranks that have ended wait for the slowest; a rank
    that has died ends the others' wait.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from trainer.distributed import share
from trainer.errors import TrainerError
from trainer.interrupt import Interrupt, Interrupted, Wanted
from trainer.ranks import Ranks

if TYPE_CHECKING:
    from trainer.tasks import Task

T = TypeVar("T")
E = TypeVar("E")


class Played(NamedTuple, Generic[E]):
    """Episodes, or what is told of them, and how many tries were lost before."""

    episodes: list[E]
    lost: int


Play = Callable[[Sequence["Task"], Sequence[int]], Awaitable[tuple[list[E], int]]]


async def shared(
    ranks: Ranks, interrupt: Interrupt, tasks: Sequence[Task], groups: Sequence[int], play: Play[E]
) -> Played[E]:
    """`play(tasks, groups)` on this rank's share; all ranks' episodes in order, and the largest count.

    Collective. Raises what any rank has raised: a request to stop before one for a checkpoint before an
    error.
    """
    groups = groups or range(len(tasks))
    if ranks.size == 1:
        return Played(*await play(tasks, groups))
    part, mine = share(len(tasks), ranks), Played[E]([], 0)
    trouble: BaseException | None = None
    try:
        if part:
            mine = Played(*await play(tasks[part.start : part.stop], groups[part.start : part.stop]))
    except (TrainerError, Interrupted) as error:
        trouble = error
    except asyncio.CancelledError:
        if interrupt.wanted is None:  # the run ends for a reason of its own, on all ranks
            raise
        trouble = Interrupted(interrupt.wanted)
    everybody = await aside(lambda: ranks.gather_objects((mine, trouble)))
    if troubles := [trouble for _, trouble in everybody if trouble is not None]:
        raise min(troubles, key=_urgency)
    played = [found for found, _ in everybody]
    return Played([e for found in played for e in found.episodes], max(found.lost for found in played))


def _urgency(trouble: BaseException) -> int:
    if not isinstance(trouble, Interrupted):
        return 2
    return 0 if trouble.wanted is Wanted.STOP else 1


async def aside(work: Callable[[], T]) -> T:
    """Run `work`, which waits for other ranks, in a thread that keeps no process from ending."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[T] = loop.create_future()

    def settle(value: T | None, error: BaseException | None) -> None:
        if answer.done():
            return
        if error is not None:
            answer.set_exception(error)
        else:
            answer.set_result(value)  # type: ignore[arg-type]  # T may be None itself

    def run() -> None:
        try:
            value, error = work(), None
        except BaseException as caught:  # whatever it is belongs to the one who waits
            value, error = None, caught
        try:
            loop.call_soon_threadsafe(settle, value, error)
        except RuntimeError:  # the loop is closed: nobody waits any more
            return

    threading.Thread(target=run, name="other ranks", daemon=True).start()
    return await answer
