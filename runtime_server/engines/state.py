"""The directories of one server on this node, and the removal of those whose server is dead.

What it is
    `State.create` makes two private directories of one random name, `orc-<uid>-<hex>`:
    `root`     sockets, Podman's database, run-time state; on a tmpfs (/dev/shm), because Podman's
               database and lock files are written several times per container
    `storage`  the writable layers of the sandboxes; on disk, because a sandbox may write more than
               there is memory
    Each holds `owner.json`: pid, start time and boot id of the server, so that whoever comes later can
    tell a dead owner from a live one.

What it does not do
    It starts nothing. `sweep` touches no directory whose owner lives, nor one of another user.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from runtime_server.engines import EngineError, namespace, processes

RUNROOT_MAX = 50  # Podman's own limit
SOCKET_MAX = 107
TMPFS_FREE = 64 << 20
NETWORK_FILESYSTEMS = {"nfs", "nfs4", "lustre", "gpfs", "cifs", "smb3", "afs", "ceph", "beegfs", "fuse.sshfs"}


@dataclass(frozen=True)
class Owner:
    """Who made a directory, and what else is to go with it."""

    pid: int
    started: int
    boot: str
    cgroup: str

    @classmethod
    def me(cls, cgroup: str) -> Self:
        return cls(os.getpid(), processes.started(os.getpid()), processes.boot_id(), cgroup)

    @property
    def alive(self) -> bool:
        return self.boot == processes.boot_id() and processes.started(self.pid) == self.started


class State:
    """Every path of one server, as properties."""

    def __init__(self, root: Path, storage: Path) -> None:
        self.root, self.storage = root, storage
        self.token = root.name
        self.cgroup = f"orchestrate-{self.token}"
        self.socket = root / "podman.sock"
        self.runroot = root / "r"
        self.static = root / "s"
        self.tmp = root / "t"
        self.oci = root / "o"
        self.io = root / "io"
        self.xdg = root / "x"
        self.network = root / "n"
        self.volumes = root / "v"
        self.probe = root / "probe"
        self.log = root / "podman.log"
        self.containers_conf = root / "containers.conf"
        self.config = root / "c"
        self.graphroot = storage / "g"
        self.conmon = storage / "conmon"

    @classmethod
    def create(cls, state_dir: str = "") -> Self:
        """Two fresh directories; both under `state_dir` when it is given. Raises EngineError."""
        token = _token()
        fast, disk = (Path(state_dir), Path(state_dir)) if state_dir else bases()
        state = cls(fast / token, disk / token)
        state.check()
        try:
            for folder in {state.root, state.storage}:
                folder.mkdir(mode=0o700, parents=bool(state_dir))
                _own(folder, state.cgroup)
            for folder in (state.io, state.xdg, state.network, state.oci, state.graphroot):
                folder.mkdir(mode=0o700)
        except OSError as error:
            raise EngineError(
                f"cannot make a state directory: {error}. Name another with runtime.state_dir."
            ) from error
        return state

    def check(self) -> None:
        """Refuse paths that are too long, and storage on a network filesystem. Raises EngineError."""
        longest = self.io / ("x" * 12) / "agent.sock"
        if len(str(self.runroot)) >= RUNROOT_MAX or len(os.fsencode(longest)) > SOCKET_MAX:
            raise EngineError(
                f"the state directory {self.root} is too long a path for Podman ({RUNROOT_MAX} characters) "
                "or a Unix socket: set runtime.state_dir to something short, like /tmp"
            )
        for folder in (self.root.parent, self.storage.parent):
            if (kind := filesystem(folder)) in NETWORK_FILESYSTEMS:
                raise EngineError(
                    f"{folder} is on {kind}, which cannot hold containers or sockets: "
                    "set runtime.state_dir to a node-local disk"
                )

    def remove(self) -> None:
        """End whatever still runs there, then remove every trace."""
        processes.end_all(lambda: processes.of_server(self.token, self.cgroup))
        namespace.end_pause(self.root)
        processes.remove_cgroups(self.cgroup)
        for folder in {self.storage, self.root}:
            namespace.remove_tree(folder)


def bases() -> tuple[Path, Path]:
    """Where state (a tmpfs, when there is one with room) and storage (a disk) go by default."""
    temporary = Path(tempfile.gettempdir())
    disk = Path("/var/tmp") if filesystem(temporary) == "tmpfs" else temporary  # noqa: S108 - private inside
    shared = Path("/dev/shm")  # noqa: S108 - a private directory is made inside
    roomy = filesystem(shared) == "tmpfs" and os.access(shared, os.W_OK) and _free(shared) >= TMPFS_FREE
    return (shared if roomy else disk), disk


def leftovers(state_dir: str = "") -> list[Path]:
    """Directories that dead servers of this user left on this node."""
    folders = {Path(state_dir)} if state_dir else set(bases())
    candidates = [p for base in folders for p in sorted(base.glob(f"orc-{os.getuid()}-*"))]
    return [path for path in candidates if _is_dead(path)]


def sweep(state_dir: str = "") -> list[Path]:
    """Remove what dead servers of this user left on this node; returns the directories removed."""
    dead = leftovers(state_dir)
    for path in dead:
        with contextlib.suppress(OSError):  # another server's sweep may be faster
            State(path, path).remove()
    return dead


def scratch() -> Path:
    """A private directory that a sweep removes when its owner could not."""
    folder = bases()[0] / _token()
    folder.mkdir(mode=0o700)
    _own(folder, "")
    return folder


def _token() -> str:
    return f"orc-{os.getuid()}-{secrets.token_hex(4)}"


def _own(folder: Path, cgroup: str) -> None:
    (folder / "owner.json").write_text(json.dumps(asdict(Owner.me(cgroup))))


def _is_dead(path: Path) -> bool:
    """True only when its record proves that the owner is gone."""
    try:
        status = path.lstat()
        owner = Owner(**json.loads((path / "owner.json").read_text()))
    except (OSError, ValueError, TypeError):
        return False
    return status.st_uid == os.getuid() and not path.is_symlink() and not owner.alive


def _free(path: Path) -> int:
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


def filesystem(path: Path) -> str:
    """Type of the filesystem that `path` is on, as the kernel names it; "" when unknown."""
    real = path.resolve()
    best, kind = "", ""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        point = left.split()[4].replace("\\040", " ")
        if len(point) >= len(best) and (real == Path(point) or Path(point) in real.parents):
            best, kind = point, right.split()[0]
    return kind
