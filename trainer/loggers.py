"""Where metrics go besides the run's own files: W&B and trackio, when asked for.

What it is
    `open_loggers` makes one `Logger` for each name in `trainer.loggers`. Their packages are extras, and are
    imported only here and only then. `metrics.jsonl` and TensorBoard are written without any of this.

How to use it
    loggers = open_loggers(["wandb"], run, config)
    metrics = Metrics(run.metrics, run.tensorboard, 0, loggers)

What it does not do
    No curve elsewhere is worth a training: a logger that fails is named once, and left out from then on. Keys
    are the packages' own affair (WANDB_API_KEY, HF_TOKEN in the environment).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

from trainer.errors import Missing

if TYPE_CHECKING:
    from orchestrator.contract import RunDirectory
    from orchestrator.schema import Config

PROJECT = "orchestrate-rl"
SECTIONS = ("model", "data", "rollout", "algorithm", "trainer")
"""Parts of the configuration that are told: none that may name a secret."""


class Logger(Protocol):
    """Takes rows of metrics."""

    def log(self, row: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


def missing(names: Sequence[str]) -> list[str]:
    """What cannot be used here, one line each with its remedy. Imports nothing."""
    return [_reason(name) for name in names if name not in KINDS or find_spec(name) is None]


def _reason(name: str) -> str:
    if name not in KINDS:
        return f"trainer.loggers names {name!r}; there are {', '.join(KINDS)}"
    return f"trainer.loggers names {name}, which is not installed here: pip install 'orchestrate-rl[{name}]'"


def open_loggers(names: Sequence[str], run: RunDirectory, config: Config) -> list[Logger]:
    """In the order of the names. Raises Missing, which names the extra to install."""
    if reasons := missing(names):
        raise Missing("; ".join(reasons))
    return [Careful(name, KINDS[name](run, config)) for name in dict.fromkeys(names)]


def _told(config: Config) -> dict[str, Any]:
    whole = config.model_dump(mode="json")
    return {section: whole[section] for section in SECTIONS}


class Wandb:
    """One run of W&B with our run's id, so that a resumed run goes on in it."""

    def __init__(self, run: RunDirectory, config: Config) -> None:
        import wandb

        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=run.run_id,
            name=run.run_id,
            resume="allow",
            dir=str(run.training),
            config=_told(config),
        )

    def log(self, row: Mapping[str, float], step: int) -> None:
        self._run.log(dict(row), step=step)

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """One run of trackio, which keeps its data on this machine unless told otherwise."""

    def __init__(self, run: RunDirectory, config: Config) -> None:
        import trackio

        self._trackio: Any = trackio
        trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=run.run_id,
            resume="allow",
            config=_told(config),
        )

    def log(self, row: Mapping[str, float], step: int) -> None:
        self._trackio.log(dict(row), step=step)

    def close(self) -> None:
        self._trackio.finish()


KINDS: dict[str, Callable[[RunDirectory, Config], Logger]] = {"wandb": Wandb, "trackio": Trackio}


class Careful:
    """A logger that can fail only once."""

    def __init__(self, name: str, inner: Logger) -> None:
        self._name, self._inner = name, inner
        self.failed = False

    def log(self, row: Mapping[str, float], step: int) -> None:
        self._try(lambda: self._inner.log(row, step))

    def close(self) -> None:
        self._try(self._inner.close)

    def _try(self, work: Callable[[], None]) -> None:
        if self.failed:
            return
        try:
            work()
        except Exception as error:  # whatever a foreign package and its network may raise
            self.failed = True
            print(f"warning: {self._name} is left out from now on: {error}", file=sys.stderr, flush=True)
