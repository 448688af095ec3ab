"""The directories of one server on this node, and the removal of those whose server is dead.

What it is
    `State.create` makes two private directories of one random name, `orc-<uid>-<hex>`:
    `root`     sockets, Podman's database, run-time state; on a tmpfs (/dev/shm), because Podman's
               database and lock files are written several times per container
    `storage`  the writable layers of the sandboxes; on disk, because a sandbox may write more than
               there is memory
    Each holds its owner's record (`ownership.py`).

What it does not do
    It starts nothing. `sweep` touches no directory whose owner lives, nor one of another user.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Self

from runtime_server.engines import EngineError, namespace, pausing, processes
from runtime_server.engines.filesystems import networked
from runtime_server.engines.ownership import OWNER, bases, dead_owner, new_token, own

RUNROOT_MAX = 50  # Podman's own limit
SOCKET_MAX = 107


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
        self.blank = storage / "b"  # the root directory of containers that have none yet
        self.layers = storage / "l"  # writable layers of the sandboxes, one folder each
        self.frozen = storage / "f"  # those of snapshots
        self.links = storage / "k"  # short names of layers
        self.here = storage / "m"  # where an overlay is mounted for an instant
        self.journal = root / "journal"

    @classmethod
    def create(cls, state_dir: str = "", claim: str = "") -> Self:
        """Two fresh directories; both under `state_dir` when it is given. Raises EngineError."""
        token = new_token()
        fast, disk = (Path(state_dir), Path(state_dir)) if state_dir else bases()
        state = cls(fast / token, disk / token)
        state.check()
        try:
            for folder in {state.root, state.storage}:
                folder.mkdir(mode=0o700, parents=bool(state_dir))
                own(folder, state.cgroup, claim)
            for folder in (state.io, state.xdg, state.network, state.oci, state.graphroot):
                folder.mkdir(mode=0o700)
            for folder in (state.layers, state.frozen, state.links, state.here):
                folder.mkdir(mode=0o700)
        except OSError as error:
            raise EngineError(
                f"cannot make a state directory: {error}. Name another with runtime.state_dir."
            ) from error
        return state

    @classmethod
    def claimed(cls, state_dir: str, claim: str) -> Self | None:
        """What a killed server with this claim left: ours from now on. None when there is none."""
        if not claim:
            return None
        roots = [Path(state_dir)] * 2 if state_dir else [*bases()]
        for path in [path for path, owner in leftovers(state_dir).items() if owner == claim]:
            state = cls(path, roots[1] / path.name)
            if path.parent == roots[0] and state.journal.exists() and state.layers.is_dir():
                for folder in {state.root, state.storage}:
                    own(folder, state.cgroup, claim)
                return state
        return None

    def check(self) -> None:
        """Refuse paths that are too long, and storage on a network filesystem. Raises EngineError."""
        longest = self.io / ("x" * 12) / "agent.sock"
        if len(str(self.runroot)) >= RUNROOT_MAX or len(os.fsencode(longest)) > SOCKET_MAX:
            raise EngineError(
                f"the state directory {self.root} is too long a path for Podman ({RUNROOT_MAX} characters) "
                "or a Unix socket: set runtime.state_dir to something short, like /tmp"
            )
        for folder in (self.root.parent, self.storage.parent):
            if kind := networked(folder):
                raise EngineError(
                    f"{folder} is on {kind}, which cannot hold containers or sockets: "
                    "set runtime.state_dir to a node-local disk"
                )

    def remove(self) -> None:
        """End whatever still runs there, then remove every trace."""
        pausing.thaw_all(self.cgroup)
        processes.end_all(lambda: processes.of_server(self.token, self.cgroup))
        namespace.end_pause(self.root)
        processes.remove_cgroups(self.cgroup)
        for folder in {self.storage, self.root}:
            namespace.remove_tree(folder, last=OWNER)


def leftovers(state_dir: str = "") -> dict[Path, str]:
    """Directories that dead servers of this user left on this node, each with its claim."""
    folders = {Path(state_dir)} if state_dir else set(bases())
    candidates = [p for base in folders for p in sorted(base.glob(f"orc-{os.getuid()}-*"))]
    return {path: owner.claim for path in candidates if (owner := dead_owner(path)) is not None}


def sweep(state_dir: str = "", spare: Callable[[str], bool] = bool) -> list[Path]:
    """Remove what dead servers of this user left on this node; returns the directories removed.

    `spare` is asked whether somebody may come back for a claim: what has one is left alone for as long as
    a sandbox lives there, and without a server they all end within a minute.
    """
    dead = [path for path, claim in leftovers(state_dir).items() if not (spare(claim) and inhabited(path))]
    for path in dead:
        with contextlib.suppress(OSError):  # another server's sweep may be faster
            State(path, path).remove()
    return dead


def inhabited(path: Path) -> bool:
    """Whether a sandbox of that server still waits for one who takes it over."""
    return bool(processes.children(processes.naming(path.name)))
