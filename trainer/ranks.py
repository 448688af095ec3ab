"""The other processes of a training, and the few things that are said to them.

What it is
    `Ranks` is this process's place among those that train one model together, and its voice: sums, maxima
    and objects over all of them. `ALONE` is the only rank of a training of one process: every call returns
    what it was given, and nothing of torch.distributed is imported.

How to use it
    def moments(x, mask, ranks: Ranks = ALONE): return ranks.sum(ppo.moments(x, mask))
    step = ranks.broadcast_object(step)            # rank 0 decides
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), group)   # `trainer.distributed.join` does it

What it does not do
    It starts no process group (`trainer.distributed`) and shards nothing. Every call on more than one rank is
    collective: all of them make it, in the same order, or they wait for each other until the group's timeout.
    Objects travel as pickles, between processes of one job only.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """`rank` of `size`; `group` carries the calls (None: torch.distributed's own) and reaches CPU tensors.
    `patience`: how long a call waits for the others before it raises (None: torch's default)."""

    rank: int = 0
    size: int = 1
    group: ProcessGroup | None = None
    patience: timedelta | None = None

    @property
    def first(self) -> bool:
        """True on the one rank that decides, writes files and speaks to people."""
        return self.rank == 0

    def sum(self, x: Tensor) -> Tensor:
        """Σ over all ranks, of `x`'s shape, type and device. The same bits on every rank."""
        return self._reduce(x, "SUM")

    def max(self, x: Tensor) -> Tensor:
        """The maximum over all ranks, element by element; NaN where any rank has one."""
        if self.size == 1 or not x.is_floating_point():
            return self._reduce(x, "MAX")
        spoiled = self._reduce(x.isnan().to(torch.uint8), "MAX").bool()
        return self._reduce(x.nan_to_num(nan=-torch.inf), "MAX").masked_fill(spoiled, torch.nan)

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        return bool(flag) if self.size == 1 else bool(self.max(torch.tensor(int(flag))))

    def same(self, x: Any) -> bool:
        """Whether all ranks hold an equal `x`: a tensor, bit for bit, or anything that pickles equally."""
        return self.size == 1 or len(set(self.gather_objects(digest(x)))) == 1

    def broadcast_object(self, o: T) -> T:
        """What rank 0 holds; the others may pass None."""
        if self.size == 1:
            return o
        import torch.distributed as dist

        box: list[Any] = [o if self.first else None]
        dist.broadcast_object_list(box, src=0, group=self.group, device=torch.device("cpu"))
        found: T = box[0]
        return found

    def gather_objects(self, o: T) -> list[T]:
        """What every rank holds, in the order of the ranks, on every rank."""
        if self.size == 1:
            return [o]
        import torch.distributed as dist

        box: list[Any] = [None] * self.size
        dist.all_gather_object(box, o, group=self.group)
        return box

    def first_then_others(self, work: Callable[[], T]) -> T:
        """Every rank's own `work()`, rank 0's before all others': it makes the files that they find."""
        found = [work()] if self.first else []
        self.barrier()
        return found[0] if found else work()

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        self.any(False)

    def _reduce(self, x: Tensor, operation: str) -> Tensor:
        if self.size == 1:
            return x
        import torch.distributed as dist

        # Copied: the group's result is written in place, and a caller's tensor is the caller's.
        found = x.detach().to("cpu", copy=True).contiguous()
        dist.all_reduce(found, getattr(dist.ReduceOp, operation), group=self.group)
        return found.to(x.device)


ALONE = Ranks()


def another_voice(ranks: Ranks) -> Ranks:
    """The same ranks with a group of their own, so that what a thread says never meets what another one
    does. Collective."""
    if ranks.size == 1:
        return ranks
    import torch.distributed as dist

    group = dist.new_group(backend="gloo", timeout=ranks.patience)
    return Ranks(ranks.rank, ranks.size, group, ranks.patience)


def digest(x: Any) -> str:
    """A short name of a value; equal for equal bits, shape and type."""
    if isinstance(x, Tensor):
        flat = x.detach().cpu().contiguous()
        x = (str(flat.dtype), tuple(flat.shape), flat.flatten().view(torch.uint8).numpy().tobytes())
    return hashlib.sha256(pickle.dumps(x, protocol=4)).hexdigest()
