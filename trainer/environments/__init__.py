"""Environments: where the policy's commands run, and where its work is judged.

What it is
    An `Environment` opens one fresh `Workspace` per trajectory. `sandbox` (`SandboxEnvironment`) asks
    the runtime server of the run for a container. `unconfined` (`LocalEnvironment`) runs commands on
    this machine with no sandbox at all; it is for tests and measurements on machines without Podman
    and is opened only when asked for by that name.

How to use it
    environment = open_environment("sandbox", config, run)
    async with environment.open(task) as workspace:
        result = await workspace.run("ls", timeout_s=5, max_output=4096)
        verdict = await workspace.verify()

What it does not do
    No tokens and no policy (`trainer.agent`), no retries (`trainer.rollout`).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from trainer.errors import Refused
from trainer.tasks import Task

if TYPE_CHECKING:
    from orchestrator.contract import RunDirectory
    from orchestrator.schema import Config

KINDS = ("sandbox", "unconfined")


@dataclass(frozen=True)
class CommandResult:
    """What one command did: stdout then stderr, each bounded; exit code 124 when it was timed out.

    `left_out` bytes of the output were dropped, in the middle of what is here.
    """

    output: bytes
    exit_code: int
    timed_out: bool = False
    left_out: int = 0


@dataclass(frozen=True)
class Verdict:
    """What the hidden test said: reward 1 or 0, and a word on why it is 0."""

    reward: float
    reason: str = ""


class Workspace(Protocol):
    """One trajectory's own sandbox. Every call may raise Lost (infrastructure) or Broken (the policy)."""

    timings: dict[str, float]
    """Seconds so far, by what they were spent on: create_s, setup_s, verify_s."""

    async def run(self, command: str, timeout_s: float, max_output: int) -> CommandResult:
        """Run one command line under `sh`, stdin empty, in the task's directory."""

    async def verify(self, answer: str = "") -> Verdict:
        """Judge the work (`trainer.rewards`); `answer` is what the policy said last. After this the workspace
        is of no further use."""


@runtime_checkable
class Equipped(Workspace, Protocol):
    """A workspace with what an agent's tools need beside single commands. Raises as `Workspace` does."""

    async def say(self, command: str, timeout_s: float, max_output: int) -> CommandResult:
        """Run a command in a shell that stays: directory, variables and functions of earlier ones are there.

        One that is out of time is killed, and so may be the shell; the next command gets a new one.
        """

    async def read(self, path: str, max_bytes: int) -> bytes:
        """A regular file. Raises NoFile when there is none, or a longer one."""

    async def write(self, path: str, data: bytes) -> None:
        """Replace or make a file, and the folders above it; its mode stays. Raises NoFile."""


@runtime_checkable
class Prefetching(Protocol):
    """An environment that can get ready for what comes next."""

    async def prefetch(self, images: Mapping[str, int], most: int) -> None:
        """So many workspaces of each image will be opened, `most` at once. Best effort, and quick."""


class Environment(Protocol):
    """Opens workspaces; any number may be open at once."""

    def open(self, task: Task) -> AbstractAsyncContextManager[Workspace]:
        """A fresh workspace with the task's set-up done; it is removed on leaving, however that happens.

        Entering raises Lost (nobody's fault but the infrastructure's) or Refused (no retry mends it).
        """

    async def wait_ready(self, timeout_s: float) -> None:
        """Return once workspaces can be had. Raises Lost after `timeout_s`, Refused at once."""

    async def life(self) -> object:
        """What tells one life of the service from the next, asked anew; None while it does not answer."""

    async def close(self) -> None:
        """Remove whatever is still there."""


@dataclass
class Timings:
    """Shared bookkeeping of both kinds of workspace."""

    timings: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, seconds: float) -> None:
        self.timings[name] = self.timings.get(name, 0.0) + seconds


def open_environment(kind: str, config: Config, run: RunDirectory | None = None) -> Environment:
    """The environment named `kind`.

    `sandbox` finds its server through the environment variables ORCHESTRATE_RUNTIME_URL and
    ORCHESTRATE_RUNTIME_API_KEY(_FILE), else through the run directory, and looks again whenever the
    server has gone: it may have come back elsewhere. Raises Refused on an unknown kind.
    """
    if kind == "sandbox":
        from trainer.environments.sandbox import SandboxEnvironment

        return SandboxEnvironment.of(config, run)
    if kind == "unconfined":
        from trainer.environments.local import LocalEnvironment

        return LocalEnvironment()
    raise Refused(f"no environment is called {kind!r}; choose one of {', '.join(KINDS)}")
