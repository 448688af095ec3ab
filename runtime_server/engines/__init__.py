"""What makes sandboxes: the one interface that the server knows of an engine.

What it is
    `Engine` starts and ends containers whose first process is the sandbox agent; `Recipe` says what one
    is made of, `Container` is one that runs, `Facts` is what this node really enforces.

How to use it
    engine = PodmanEngine(config, agent)        # runtime_server.engines.podman
    await engine.start(); container = await engine.create(recipe)

What it does not do
    No commands and no files: those go through the agent (`runtime_server.agent`), never the engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from runtime_server.engines.disk import Usage
    from runtime_server.engines.layers import Frozen
    from runtime_server.engines.watch import Watched

AGENT = "/.orchestrate/agent"
IO = "/.orchestrate/io"
SOCKET = "agent.sock"


class EngineError(Exception):
    """The engine cannot work on this node; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What one sandbox is made of. `io` is the host directory that holds the agent's socket."""

    name: str
    image: str
    io: Path
    env: Mapping[str, str] = field(default_factory=dict)
    workdir: str | None = None
    as_root: bool = True  # whether the image's first process is root, who may make any directory
    cpus: float = 1.0
    memory_mb: int = 1024
    pids: int = 512
    shm_mb: int = 64
    disk_mb: int = 0  # 0: as much as there is
    layers: tuple[str, ...] = ()  # directories of its root, the top one first; () leaves that to the engine
    user: str = ""  # "" is root, or whom the image names
    allow: tuple[str, ...] = ()  # hosts it may reach, through the server's proxy (egress.py)


@dataclass(frozen=True)
class Container:
    """One that runs. `pid`: its first process as this host sees it; `memory`: its memory cgroup, if any;
    `watched`: who looks after its limits where no cgroup does."""

    id: str
    pid: int
    memory: Path | None = None
    watched: Watched | None = None
    layer: Path | None = None  # its writable layer, where that is ours
    memory_mb: int = 0
    pids: int = 0
    disk_mb: int = 0
    usage: Usage | None = None  # what was found out about its disk
    image: str = ""  # whose layers it stands on, if its root is ours


@dataclass(frozen=True)
class Image:
    """One that can be used at once."""

    id: str
    name: str
    workdir: str
    as_root: bool = True
    layers: tuple[str, ...] = ()  # as in a recipe
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Facts:
    """What was found out about this node by trying it."""

    engine: str
    oci_runtime: str
    storage_driver: str
    cgroup_version: str
    rootless: bool
    enforced: Mapping[str, bool]
    notes: tuple[str, ...] = ()
    dresses: bool = False  # whether a container that runs can be given any root: `blank`, `dress`, `freeze`


class Engine(Protocol):
    """Every method may raise SandboxError; `start` raises EngineError."""

    @property
    def facts(self) -> Facts: ...

    @property
    def journal(self) -> Path | None:
        """Where to write down what a later server with the same claim has to know; None for no claim."""

    async def start(self) -> None:
        """Find out what works here and be ready for `create`."""

    async def stop(self) -> None:
        """End every container at once and leave nothing behind."""

    async def images(self) -> list[str]:
        """Names of the images that are here."""

    async def image(self, name: str) -> Image:
        """The image, fetched first where that is allowed. NotFound (image_missing) when there is none."""

    async def adopt(self, container: Container) -> Container:
        """One that an earlier server with our claim left. Gone (evicted) when it has ended since."""

    async def remove_others(self, containers: set[str], frozen: set[Path]) -> None:
        """All that an earlier server left but these."""

    def new_io(self, name: str) -> Path:
        """A fresh directory for the socket of one sandbox."""

    async def create(self, recipe: Recipe) -> Container:
        """Make and start one. Internal (create_failed) when that does not work."""

    async def blank(self, recipe: Recipe) -> Container:
        """Like `create`, with an empty root directory. Only where `facts.dresses`, as all that follows."""

    async def dress(self, container: Container, recipe: Recipe) -> Container:
        """Give a blank one the root directory of the recipe's `layers`, with its `workdir`. 1 ms."""

    async def freeze(self, container: Container, name: str) -> Frozen:
        """A copy of what one that was dressed has changed, to be a layer of others."""

    async def discard(self, frozen: Path) -> None:
        """Remove such a copy, which nobody uses any more."""

    async def pause(self, container: Container) -> None:
        """Stop all its processes but the agent, where they are."""

    async def resume(self, container: Container) -> None:
        """Let them go on."""

    async def kill(self, container: Container) -> None:
        """End all its processes; returns when they are gone."""

    async def remove(self, container: Container, io: Path) -> None:
        """Remove what is left of one that was killed."""
