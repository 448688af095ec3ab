"""What a test cluster asks of the machine below it, and what old clusters left on it.

How to use it: `refuse_what_cannot_work(PROGRAMS)` before starting, `sweep(FOLDERS)` to tidy up.

What it does not do: it starts nothing and touches no directory but those of clusters that are gone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pwd
import random
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from . import config

SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PACKAGES = "slurm-wlm munge iproute2 slurmdbd mariadb-server-core mariadb-client-core"


class ClusterError(Exception):
    """The cluster could not be started, or did not get where it was told to; the message has the logs."""


def refuse_what_cannot_work(programs: Iterable[str]) -> None:
    if os.geteuid() != 0:
        raise ClusterError(
            "only root may make what a test cluster is made of (namespaces, mounts, a user): "
            "use sudo, or a machine of your own"
        )
    missing = [name for name in programs if shutil.which(name, path=SYSTEM_PATH) is None]
    if missing:
        raise ClusterError(
            f"not found: {', '.join(missing)}. Run `make setup`, "
            f"or: apt-get install --no-install-recommends {PACKAGES}"
        )


def sweep(folders: Iterable[Path]) -> None:
    """Remove those directories of clusters of which no process is left."""
    for folder in folders:
        lock = config.Layout(folder).lock
        with contextlib.suppress(OSError), lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.time() - lock.stat().st_mtime > 60:  # not one that is just being made
                shutil.rmtree(folder, ignore_errors=True)


def free_uid() -> int:
    """Drawn, for limits of the kernel are per user id and several clusters may run at once."""
    taken = {entry.pw_uid for entry in pwd.getpwall()}
    return random.choice([uid for uid in range(20_000, 36_000) if uid not in taken])


def with_targets(paths: Iterable[Path]) -> list[Path]:
    """Each directory as named and as resolved, outer ones first."""
    both = {path.absolute() for path in paths} | {path.resolve() for path in paths}
    return sorted(both, key=lambda path: len(path.parts))


def closed_parents(paths: Iterable[Path]) -> list[Path]:
    """The topmost directories above `paths` that an ordinary user may not pass."""
    closed = {
        next((parent for parent in reversed(path.parents) if not parent.stat().st_mode & 0o001), None)
        for path in paths
    }
    return sorted(folder for folder in closed if folder is not None)
