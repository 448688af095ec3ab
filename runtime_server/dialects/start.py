"""What `/start` asks for, and which dialect its sender speaks. Pure: a body in, a plan out.

What it is
    The command of the body is never run: its words tell who sent it (`dialect_of`) and carry what the
    in-sandbox server would have been told: working directory, user, plug-ins.

What it does not do
    It checks no key and makes no sandbox. Fields it does not know are ignored, mounts among them.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

WORKSPACE = "/workspace"
SKYRL_PORT = "88888888"  # what the fork writes where its own server would put a port
NO_CHANGE_S = 10.0
HOLD_S = 8.0
_FACTOR_MAX = 64.0


class Dialect(StrEnum):
    V0 = "v0"
    SKYRL = "skyrl"
    V1 = "v1"
    APP = "v1-app"
    OWN = "own"  # made by this server's own API: SWE-ReX, or nobody's

    @property
    def by_path(self) -> bool:
        """Whether its client takes a url with a path. V1's client refuses one."""
        return self not in (Dialect.V1, Dialect.APP)


class Start(BaseModel):
    """Body of `POST /start`, the fields that mean something here."""

    model_config = ConfigDict(extra="ignore")

    image: Annotated[str, Field(min_length=1, max_length=1000)]
    command: str | list[str] = ""
    working_dir: str = "/"
    environment: dict[str, str] = Field(default_factory=dict)
    session_id: Annotated[str, Field(min_length=1, max_length=400)]
    resource_factor: float = 1.0
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = None
    run_as_group: Any = None

    @field_validator("environment", mode="before")
    @classmethod
    def as_text(cls, value: Any) -> Any:
        """Numbers and truth values as a shell would have them; what is null is left out."""
        if not isinstance(value, dict):
            return {} if value is None else value
        return {str(name): str(what) for name, what in value.items() if what is not None}

    @field_validator("resource_factor")
    @classmethod
    def positive(cls, value: float) -> float:
        return min(max(value, 0.01), _FACTOR_MAX) if math.isfinite(value) else 1.0


@dataclass(frozen=True)
class Told:
    """What the in-sandbox server would have been told on its command line."""

    dialect: Dialect
    workdir: str
    username: str = "root"
    plugins: tuple[str, ...] = ()
    no_change_s: float = NO_CHANGE_S

    @property
    def jupyter(self) -> bool:
        return "jupyter" in self.plugins


def words_of(command: str | Sequence[str]) -> list[str]:
    if not isinstance(command, str):
        return [str(word) for word in command]
    try:
        return shlex.split(command)
    except ValueError:  # unbalanced quotes: it is never run
        return command.split()


def dialect_of(words: Sequence[str], has_group: bool) -> Dialect:
    line = " ".join(words)
    if "agent-server" in line or "agent_server" in line:
        return Dialect.APP if has_group else Dialect.V1
    return Dialect.SKYRL if SKYRL_PORT in words else Dialect.V0


def told(start: Start) -> Told:
    """V0's `working_dir` is that of its server's code, which no image here has: its shell's is an option."""
    words = words_of(start.command)
    dialect = dialect_of(words, start.run_as_group is not None)
    if not dialect.by_path:
        return Told(dialect, _absolute(start.working_dir, "/"))
    return Told(
        dialect,
        _absolute(_option(words, "--working-dir"), WORKSPACE),
        _option(words, "--username") or "openhands",
        tuple(_options(words, "--plugins")),
        _seconds(start.environment.get("NO_CHANGE_TIMEOUT_SECONDS", "")),
    )


def _absolute(path: str, default: str) -> str:
    return path if path.startswith("/") and "\0" not in path else default


def _option(words: Sequence[str], name: str) -> str:
    return next(iter(_options(words, name)), "")


def _options(words: Sequence[str], name: str) -> list[str]:
    """The words after `name` up to the next option; `name=value` counts too."""
    found: list[str] = []
    taking = False
    for word in words:
        if word.startswith("--"):
            given, _, value = word.partition("=")
            taking = given == name
            found += [value] if taking and value else []
        elif taking:
            found.append(word)
    return found


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return NO_CHANGE_S
    return value if 0 < value < 86400 else NO_CHANGE_S


@dataclass(frozen=True)
class Hold:
    """How long, in seconds, an answer may wait for readiness: always less than the client's own limit."""

    start: float
    look: float


def hold_of(dialect: Dialect, agent: str = "", start_s: float = HOLD_S) -> Hold:
    """`agent` is the User-Agent. V0's limit is 10 s, unless its operator knows better (`start_s`)."""
    if dialect == Dialect.V1:
        return Hold(150.0, 20.0)
    if dialect == Dialect.APP:
        return Hold(10.0, 0.0)
    old = agent.startswith("python-requests")  # the client of openhands-ai 0.30, always 10 s
    return Hold(min(start_s, HOLD_S) if old else start_s, 5.0)


__all__ = ["Dialect", "Hold", "Start", "Told", "dialect_of", "hold_of", "told", "words_of"]
