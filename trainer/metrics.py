"""What a run says about each step: rows of numbers, curves, and alarms.

What it is
    `Metrics` writes one JSON object per step to `training/metrics.jsonl` and the same numbers to TensorBoard;
    it also is the history that alarms look at. `Clock` adds up where a step's time went.

How to use it
    metrics = Metrics(run.metrics, run.tensorboard, start=0)
    with clock("rollout"): ...
    metrics.log(row | clock.row())
    for alarm in alarms(row, metrics.rows[:-1], limit=0.1): ...

A row
    step                       counted from 0
    success_rate, reward_mean, reward_std  of the valid episodes
    status/*, failure/*        shares of all episodes; a failure says why (`trainer.episode.Failure`)
    length/*, tools/*          means over valid episodes, in tokens, turns and calls
    groups/*                   zero_variance: share of groups that all earned the same, before any resampling
    staleness/*                updates between the weights that sampled a token and those that learn from it
    loss_policy, loss_value    means over the optimiser steps; loss_policy is 0 while only the critic learns
    kl, entropy                nats per action token: k3 to the reference, and of the sampling policy
    mismatch                   mean |difference| in nats between trainer and engine on the same tokens
    tokens_per_s               sampled tokens ÷ time/total; …/generate: ÷ time/generate; …/train: all tokens
                               ÷ time/train
    time/*                     seconds on the wall clock: rollout (that training waited for) + logprob +
                               update + sync + validate + idle = total; train is logprob + update. generate
                               and environment: how long anything was sampled or done in a sandbox, at the
                               same time as each other, and as training where rollouts are asynchronous. save:
                               the last checkpoint, all in all; save_stall: that training waited for it

What it does not do
    No metric is computed here. After a resume, rows of steps that will be done again are removed first, so
    that no step is counted twice. Numbers that are not finite become null: JSON has no word for them.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.durable import append_line, publish_bytes, read_json_lines
from trainer.loggers import Logger

Row = dict[str, float]
Logged = dict[str, Any]
"""A row as it was written: numbers, or None where a number was not finite."""

PARTS = ("rollout", "logprob", "update", "sync", "validate")
COLLAPSED_STEPS = 10
"""So many steps in a row with nothing but truncated episodes, after better ones, are a collapse."""
RATIO_TOLERANCE = 1e-3
NONFINITE_STEPS = 3
JUMP, JUMP_FROM = 5.0, 1e-3
"""A mismatch is a jump when it is so many times what it was, and at least so many nats."""
JUMP_STEPS, JUMP_AFTER = 20, 5
"""Steps that it is compared with, and how many of them there must be."""


class Metrics:
    """The rows of one run. `rows` are those of all steps before the present one, oldest first."""

    def __init__(
        self, path: Path, tensorboard: Path | None = None, start: int = 0, loggers: Sequence[Logger] = ()
    ) -> None:
        """Go on at step `start`: later rows, of steps that are about to be done again, are removed."""
        self.path, self._loggers = path, loggers
        self.rows: list[Logged] = [row for row in read_json_lines(path) if _step(row) < start]
        path.parent.mkdir(parents=True, exist_ok=True)
        publish_bytes(path, "".join(json.dumps(row) + "\n" for row in self.rows).encode())
        self._board = _board(tensorboard, start) if tensorboard else None

    def log(self, row: Row) -> None:
        """Append the row of one step."""
        written = {name: _plain(value) for name, value in row.items()}
        append_line(self.path, json.dumps(written))
        self.rows.append(written)
        for name, value in row.items():
            if self._board is not None and name != "step":
                self._board.add_scalar(name, value, int(row["step"]))
        for logger in self._loggers:
            finite = {name: value for name, value in row.items() if name != "step" and math.isfinite(value)}
            logger.log(finite, int(row["step"]))

    def close(self) -> None:
        for logger in self._loggers:
            logger.close()
        if self._board is not None:
            self._board.close()

    def last(self, name: str, count: int = 10) -> list[float]:
        """The last `count` finite values of one metric."""
        return [row[name] for row in self.rows[-count:] if row.get(name) is not None]


def _board(directory: Path, start: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(directory, purge_step=start or None)


def _step(row: Logged) -> int:
    step = row.get("step")
    return step if isinstance(step, int) else 0


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


class Clock:
    """Adds up seconds by name, on the monotonic clock, from its own start."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start

    def row(self) -> Row:
        """`time/*`; idle is what no part accounts for."""
        total = time.perf_counter() - self._start
        parts = {name: self.seconds[name] for name in PARTS}
        idle = max(0.0, total - sum(parts.values()))
        train = parts["logprob"] + parts["update"]
        more = {"train": train, "idle": idle, "total": total}
        return {f"time/{name}": value for name, value in (parts | more).items()}


# --- alarms ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Alarm:
    """Something that should not be. A fatal one stops the run."""

    name: str
    message: str
    fatal: bool = False


def alarms(row: Row, before: Sequence[Mapping[str, Any]], limit: float, stale: bool = False) -> list[Alarm]:
    """What is wrong with a step, given the rows before it. `limit` bounds the mismatch, in nats.

    `stale`: episodes may be an update old, so that part of the mismatch is what the policy has learned since;
    it stops no run then. What stops it is the probe after each sync, which is always of one policy.
    """
    checks = (
        _nonfinite(row, before),
        _ratio(row),
        _mismatch(row, limit, fatal=not stale) or (None if stale else _jump(row, before)),
        _truncated(row, before),
    )
    return [alarm for alarm in checks if alarm is not None]


def _nonfinite(row: Row, before: Sequence[Mapping[str, Any]]) -> Alarm | None:
    if not _is_nonfinite(row):
        return None
    recent = before[-(NONFINITE_STEPS - 1) :]
    fatal = len(recent) == NONFINITE_STEPS - 1 and all(map(_is_nonfinite, recent))
    message = f"{row.get('nonfinite', 0):g} optimiser steps were skipped: loss or gradient is not finite"
    return Alarm("nonfinite", message, fatal)


def _is_nonfinite(row: Mapping[str, Any]) -> bool:
    """Counts were skipped, or a loss is no number (written as None)."""
    losses = [row.get(name, 0.0) for name in ("loss_policy", "loss_value")]
    return bool(row.get("nonfinite")) or any(loss is None or not math.isfinite(loss) for loss in losses)


def _ratio(row: Row) -> Alarm | None:
    error = row.get("first_ratio_error", 0.0)
    if error <= RATIO_TOLERANCE:
        return None
    return Alarm("ratio", f"the first ratio of the step is off by {error:.2g}; it must be exactly 1")


def _mismatch(row: Row, limit: float, fatal: bool = True) -> Alarm | None:
    found = row.get("mismatch", 0.0)
    if found <= limit:
        return None
    message = (
        f"engine and trainer differ by {found:.3g} nats per token on the same tokens, allowed are {limit:g} "
        "(trainer.mismatch_limit): stale weights, another temperature, or another number type"
    )
    return Alarm("mismatch", message, fatal)


def _jump(row: Row, before: Sequence[Mapping[str, Any]]) -> Alarm | None:
    """Still allowed, and yet much more than it was: something has just gone wrong."""
    found = row.get("mismatch", 0.0)
    recent = [float(old["mismatch"]) for old in before[-JUMP_STEPS:] if old.get("mismatch")]
    if len(recent) < JUMP_AFTER or found <= max(JUMP_FROM, JUMP * statistics.median(recent)):
        return None
    message = (
        f"engine and trainer differ by {found:.3g} nats per token, and by {statistics.median(recent):.3g} in "
        f"the {len(recent)} steps before: look for weights that were not taken over"
    )
    return Alarm("mismatch_jump", message)


def _truncated(row: Row, before: Sequence[Mapping[str, Any]]) -> Alarm | None:
    """A policy that ended its episodes once and does not any more will not come back by itself."""
    if not _all_truncated(row):
        return None
    run = 1
    while run <= len(before) and _all_truncated(before[-run]):
        run += 1
    fatal = run >= COLLAPSED_STEPS and len(before) >= run  # there was a better step before these
    return Alarm("truncated", f"every episode of {run} steps in a row was cut off", fatal)


def _all_truncated(row: Mapping[str, Any]) -> bool:
    share = row.get("status/truncated")
    return share is not None and share + row.get("status/infra", 0.0) >= 1.0 and share > 0
