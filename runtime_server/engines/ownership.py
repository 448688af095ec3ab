"""Who made a directory on this node: written in it, so that a dead owner can be told from a live one.

What it is
    `Owner` is that record (`owner.json`); `scratch` makes a private directory that has one. A sweep
    (`state.py`) removes what a dead owner left.

What it does not do
    It removes nothing.
"""

from __future__ import annotations

import json
import os
import secrets
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from runtime_server.engines import processes
from runtime_server.engines.filesystems import filesystem

TMPFS_FREE = 64 << 20
OWNER = "owner.json"


@dataclass(frozen=True)
class Owner:
    """Who made a directory, and what else is to go with it."""

    pid: int
    started: int
    boot: str
    cgroup: str
    claim: str = ""  # who may take it over when its owner has died: the same job on the same node

    @classmethod
    def me(cls, cgroup: str, claim: str = "") -> Self:
        return cls(os.getpid(), processes.started(os.getpid()), processes.boot_id(), cgroup, claim)

    @property
    def alive(self) -> bool:
        return self.boot == processes.boot_id() and processes.started(self.pid) == self.started


def bases() -> tuple[Path, Path]:
    """Where state (a tmpfs, when there is one with room) and storage (a disk) go by default."""
    temporary = Path(tempfile.gettempdir())
    disk = Path("/var/tmp") if filesystem(temporary) == "tmpfs" else temporary  # noqa: S108 - private inside
    shared = Path("/dev/shm")  # noqa: S108 - a private directory is made inside
    roomy = filesystem(shared) == "tmpfs" and os.access(shared, os.W_OK) and _free(shared) >= TMPFS_FREE
    return (shared if roomy else disk), disk


def scratch() -> Path:
    """A private directory that a sweep removes when its owner could not."""
    folder = bases()[0] / new_token()
    folder.mkdir(mode=0o700)
    own(folder, "")
    return folder


def new_token() -> str:
    return f"orc-{os.getuid()}-{secrets.token_hex(4)}"


def own(folder: Path, cgroup: str, claim: str = "") -> None:
    file = folder / OWNER
    file.with_suffix(".new").write_text(json.dumps(asdict(Owner.me(cgroup, claim))))
    file.with_suffix(".new").replace(file)


def dead_owner(path: Path) -> Owner | None:
    """Only when its record proves that the owner is gone."""
    try:
        status = path.lstat()
        owner = Owner(**json.loads((path / OWNER).read_text()))
    except (OSError, ValueError, TypeError):
        return None
    dead = status.st_uid == os.getuid() and not path.is_symlink() and not owner.alive
    return owner if dead else None


def _free(path: Path) -> int:
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize
