"""Memory and process limits without cgroups: looks at every sandbox's processes again and again.

What it is
    Where an ordinary user may make no cgroups, the kernel holds no limit for a sandbox. `Watch` does what the
    kernel would: a sandbox over its memory loses its largest process (so that command says `oom`), and
    is ended when that does not help; one with too many processes is ended as a whole, in one instant.
    Memory is the resident set of the process tree. Only when that is too much, shared pages are
    divided among those who share them, for a fork's pages are its parent's. Files in memory that belong
    to no directory (memfd) count too.

What it does not do
    It is no wall: between two looks a sandbox may take what the node has to give. So its processes are also
    the first that the kernel ends when the node (or the job) runs out of memory.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from runtime_server.engines import processes

log = logging.getLogger(__name__)
EVERY_S = 0.2
REST = 20  # times the processor time of a look: no more than a twentieth of a core goes into it
STRIKES = 4  # looks in a row at which memory was too much, until the sandbox itself is ended
PAGE = os.sysconf("SC_PAGE_SIZE")
_PPID, _THREADS, _RSS = 1, 17, 21  # places in /proc/PID/stat after the name


@dataclass(eq=False)
class Watched:
    """One sandbox, by its first process as this host sees it. `kills`: processes ended for memory."""

    pid: int
    memory: float  # bytes; infinity where the kernel holds the limit
    pids: float
    started: int = 0
    kills: int = 0
    strikes: int = 0
    ended: bool = False

    def __post_init__(self) -> None:
        self.started = processes.started(self.pid)

    @property
    def alive(self) -> bool:
        return processes.started(self.pid) == self.started != 0

    def end(self) -> None:
        """Its first process takes all others along."""
        if self.alive:
            self.ended = True
            processes.send(self.pid)

    def end_inside(self, pid: int) -> None:
        """End one of its processes, if the number is still that of a process in there."""
        with contextlib.suppress(OSError):
            inside = [Path(f"/proc/{number}/ns/pid").readlink() for number in (pid, self.pid)]
            if len(set(inside)) == 1 and self.alive:
                processes.send(pid)


@dataclass
class Table:
    """All processes of this node at one instant: children, resident bytes, threads."""

    children: dict[int, list[int]] = field(default_factory=dict)
    resident: dict[int, int] = field(default_factory=dict)
    threads: dict[int, int] = field(default_factory=dict)

    @classmethod
    def read(cls, pids: Iterable[int]) -> Table:
        table = cls()
        for pid in pids:
            if fields := processes.stat_fields(pid):
                table.children.setdefault(int(fields[_PPID]), []).append(pid)
                table.resident[pid] = int(fields[_RSS]) * PAGE
                table.threads[pid] = int(fields[_THREADS])
        return table

    def below(self, pid: int) -> list[int]:
        """The descendants: in a pid namespace orphans become children of its first process, none is lost."""
        found: list[int] = []
        left = [*self.children.get(pid, ())]
        while left:
            found.append(left.pop())
            left += self.children.get(found[-1], ())
        return found


def proportional(pid: int) -> int:
    """Bytes of memory, each shared page divided by how many share it; 0 when the process is gone."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def unmapped(pids: Iterable[int]) -> dict[tuple[int, int], int]:
    """Bytes in memory files that only descriptors name, by device and inode: each counts once."""
    found: dict[tuple[int, int], int] = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            for entry in os.scandir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    if os.readlink(entry.path).startswith("/memfd:"):  # noqa: PTH115 - done very often
                        status = os.stat(entry.path)  # noqa: PTH116
                        found[status.st_dev, status.st_ino] = status.st_blocks * 512
    return found


class Watch:
    """A thread that looks at all sandboxes `EVERY_S`; `add` and `drop` from any thread."""

    def __init__(self, limits: Sequence[str] = ("memory", "pids")) -> None:
        self._limits = limits
        self._watched: set[Watched] = set()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(5)

    def add(self, pid: int, memory: int, pids: int) -> Watched:
        """`memory` in bytes. Limits that the kernel holds are not ours."""
        watched = Watched(
            pid,
            memory if "memory" in self._limits else math.inf,
            pids if "pids" in self._limits else math.inf,
        )
        with self._lock:
            self._watched.add(watched)
        return watched

    def drop(self, watched: Watched) -> None:
        with self._lock:
            self._watched.discard(watched)

    def _run(self) -> None:
        took = 0.0
        while not self._stop.wait(max(EVERY_S, took * REST)):
            with self._lock:
                watched = [*self._watched]
            started = time.thread_time()  # not the clock: looks must not get rare where cores are busy
            try:
                self.look(watched)
            except Exception:  # without this thread there is no limit at all: say it, and look again
                log.exception("a look at the sandboxes failed")
            took = time.thread_time() - started

    def look(self, watched: Iterable[Watched]) -> None:
        """One round over all of them."""
        living = [one for one in watched if not one.ended and one.alive]
        table = Table.read(processes.all_pids() if living else ())
        for one in living:
            self._judge(one, table)

    def _judge(self, one: Watched, table: Table) -> None:
        pids = table.below(one.pid)
        if sum(table.threads[pid] for pid in pids) > one.pids:
            one.end()
        elif self._memory(pids, table) <= one.memory or used(pids) <= one.memory:
            one.strikes = 0
        else:
            self._strike(one, pids, table)

    def _memory(self, pids: list[int], table: Table) -> int:
        return sum(table.resident[pid] for pid in pids) + sum(unmapped(pids).values())

    def _strike(self, one: Watched, pids: list[int], table: Table) -> None:
        """Counted before it is killed, so that whoever sees the end of the process sees the count."""
        one.kills += 1
        one.strikes += 1
        if one.strikes >= STRIKES:
            one.end()
        elif pids:
            one.end_inside(max(pids, key=lambda pid: table.resident[pid]))


def used(pids: list[int]) -> int:
    """What these processes really use, in bytes: dear, so asked only of those that seem to use too much."""
    return sum(proportional(pid) for pid in pids) + sum(unmapped(pids).values())
