"""Which process: by pid and start time, on which machine; so that a reused pid is not taken for it.

What it is
    `Process.of(pid)` can be written down and asked later, elsewhere too, whether it is alive.

What it does not do
    It starts and ends nothing (`orchestrator.processes` does) but sends a signal. Standard library only.
"""

from __future__ import annotations

import os
from pathlib import Path

from orchestrator.durable import host_name
from orchestrator.frozen import dataclass, field

STATE, PARENT, START = 0, 1, 19
"""Places in /proc/PID/stat after the name, see proc(5)."""


def stat_fields(pid: int | str) -> list[str]:
    """Fields of /proc/PID/stat after the command name (which may hold anything); [] for no process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()


def start_time(pid: int) -> int:
    """When a process started, in clock ticks since boot; 0 when it is dead or a zombie."""
    fields = stat_fields(pid)
    return int(fields[START]) if fields and fields[STATE] not in "ZX" else 0


def _place() -> str:
    """Names the set of pids that this process sees: the boot of the machine and the pid namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {Path('/proc/self/ns/pid').readlink()}"


@dataclass(frozen=True)
class Process:
    """A process by pid and start time, so that a reused pid is not taken for it."""

    pid: int
    start: int
    host: str = field(default_factory=host_name)
    place: str = field(default_factory=_place)

    @classmethod
    def of(cls, pid: int) -> Process:
        return cls(pid, start_time(pid))

    def alive(self) -> bool | None:
        """True, False, or None when it lives where this process cannot look."""
        if self.place != _place():
            return False if self.host == host_name() else None
        return self.start != 0 and start_time(self.pid) == self.start

    def send(self, number: int) -> bool:
        """Signal it if it still is the same process. Returns whether it was."""
        if not self.alive():
            return False
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            return False
        return True
