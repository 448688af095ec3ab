"""What a test cluster has left on the machine: the proof that it leaves nothing.

How to use it
    traces = Traces.of(cluster)     while it runs
    traces.left()                   afterwards: one line per thing found, so [] is the good answer

What it does not do: it removes nothing, and sees only what can be told to be this cluster's, by its
user ids, its directory, its namespaces or its network.
"""

from __future__ import annotations

import contextlib
import pwd
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import config
from .cluster import Cluster

PLACES = ("/tmp", "/var/tmp", "/dev/shm", "/run", "/run/user", "/run/lock", "/home", "/dev/mqueue")
NAMESPACES = ("mnt", "net", "pid", "uts", "ipc")


@dataclass(frozen=True)
class Traces:
    root: Path
    uids: tuple[range, ...]
    namespaces: frozenset[str]

    @classmethod
    def of(cls, cluster: Cluster) -> Traces:
        first = config.subordinate_ids(cluster.uid)
        uids = (range(cluster.uid, cluster.uid + 1), range(first, first + config.SUBORDINATE_IDS))
        inside = frozenset(name for folder in cluster.proc_folders() for name in _namespaces(folder))
        return cls(cluster.layout.root, uids, inside - frozenset(_namespaces(Path("/proc/self"))))

    def left(self) -> list[str]:
        return [*self._files(), *self._processes(), *self._network(), *self._accounts()]

    def _ours(self, uid: int) -> bool:
        return any(uid in some for some in self.uids)

    def _files(self) -> Iterator[str]:
        if self.root.exists():
            yield f"directory {self.root}"
        for place in (Path(name) for name in PLACES):
            for path in place.iterdir() if place.is_dir() else ():
                with contextlib.suppress(OSError):
                    if self._ours(path.lstat().st_uid):
                        yield f"file {path}"

    def _processes(self) -> Iterator[str]:
        """Processes of its users or in its namespaces, and mounts seen from any process."""
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # ended while we look
                if self._ours(folder.stat().st_uid) or self.namespaces.intersection(_namespaces(folder)):
                    command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    yield f"process {folder.name}: {command}"
                if str(self.root) in (folder / "mountinfo").read_text():
                    yield f"mount of {self.root} in process {folder.name}"

    def _network(self) -> Iterator[str]:
        shown = subprocess.run(["ip", "-o", "addr"], capture_output=True, text=True, check=True).stdout
        yield from (f"interface {line}" for line in shown.splitlines() if f" {config.NETWORK}." in line)

    def _accounts(self) -> Iterator[str]:
        with contextlib.suppress(KeyError):
            yield f"account {pwd.getpwuid(self.uids[0].start)}"
        for name in ("/etc/subuid", "/etc/subgid", "/etc/hosts"):
            if f":{self.uids[1].start}:" in (text := Path(name).read_text()) or f"{config.CONTROL} " in text:
                yield f"line in {name}"


def _namespaces(folder: Path) -> list[str]:
    found = []
    for name in NAMESPACES:
        with contextlib.suppress(OSError):
            found.append(str((folder / "ns" / name).readlink()))
    return found
