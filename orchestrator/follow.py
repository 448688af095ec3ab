"""Watches a run live until it ends: what happened, step by step, and how it ended.

What it is
    `follow` polls the records of a run and prints each thing once: the server is ready, the jobs start,
    every step of training. On a terminal the latest step is a line that moves; elsewhere each step is a
    line of its own. It returns what a shell should exit with.

What it does not do
    It decides nothing about the run but one thing: when the runtime job is over and the training job is
    still queued, nobody is left to start it, and it is cancelled.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from rich.console import Console
from rich.live import Live
from rich.text import Text

from orchestrator import curve, evaluations, runs, view
from orchestrator.contract import Evaluation, RunDirectory, read_bytes, read_json_lines
from orchestrator.quantities import clock
from orchestrator.runs import RunView
from orchestrator.schedulers import QUEUED, Scheduler

STRANDED_S = 20.0
"""How long a queued training job may stay without a runtime job before it is cancelled."""


class Follower:
    """Prints what is new since the last look. One object per run that is followed."""

    def __init__(self, run: RunDirectory, console: Console) -> None:
        self.run, self.console = run, console
        self.total = total_steps(run)
        self.live: Live | None = None
        self._said: set[str] = set()
        self._steps = 0
        self._judged, self._progress = -1, evaluations.Progress(run)
        self._start = time.monotonic()

    def show(self, look: RunView) -> None:
        """Print the news of one look."""
        for key, text in self._news(look):
            if key not in self._said:
                self._said.add(key)
                self._say(text)
        self._show_steps()
        self._show_judged()

    def _news(self, look: RunView) -> Iterator[tuple[str, Text]]:
        if look.url:
            yield f"url {look.url}", Text.assemble(("runtime ready", "green"), f" at {view.clean(look.url)}")
        for job in look.jobs:
            told = f"{job.role} {job.phase or job.state}"
            attempt = f" (attempt {job.attempt})" if job.attempt > 1 else ""
            key = f"{told}{attempt}"
            if job.outcome:
                why = f": {view.clean(job.reason)}" if job.reason else ""
                yield key, Text.assemble(f"{job.role} ", view.styled(job.outcome), attempt, why)
            else:
                why = f": {view.clean(job.reason)}" if job.is_over and job.reason else ""
                yield key, Text(f"{told}{attempt}{why}", "dim")

    def _say(self, text: Text) -> None:
        elapsed = clock(int(time.monotonic() - self._start)).removeprefix("00:")
        self.console.print(Text.assemble((f"  {elapsed:<9} ", "dim"), text))

    def _show_steps(self) -> None:
        rows = read_json_lines(self.run.metrics)
        if len(rows) <= self._steps:
            return
        if self.live is not None:
            self.live.update(self._bar(rows), refresh=True)
        else:
            for metrics in rows[self._steps :]:
                self._say(Text(view.step_line(metrics, self.total)))
        self._steps = len(rows)

    def _show_judged(self) -> None:
        """How far an evaluation is: on a terminal always, elsewhere each tenth of it."""
        if (found := self.run.read(self.run.evaluation, Evaluation)) is None or found.complete:
            return
        judged = self._progress.count()
        told = evaluations.progress_line(found, judged)
        tenth = 10 * judged // max(1, found.tasks * found.samples)
        if self.live is not None:
            self.live.update(view.row("", told), refresh=True)
        elif tenth > self._judged:
            self._say(Text(told))
        self._judged = max(tenth, self._judged)

    def _bar(self, rows: list[dict[str, Any]]) -> Text:
        spark = view.sparkline(runs.success_rates(rows), 30)
        return view.row("", view.step_line(rows[-1], self.total), "   ", Text(spark, "green"))


def total_steps(run: RunDirectory) -> int | None:
    """`trainer.total_steps` of a run's frozen configuration; None when all epochs are run."""
    with contextlib.suppress(yaml.YAMLError, TypeError, KeyError, ValueError):
        steps = yaml.safe_load(read_bytes(run.config))["trainer"]["total_steps"]
        return int(steps) if steps else None
    return None


def follow(
    run: RunDirectory,
    scheduler: Scheduler,
    console: Console,
    every_s: float | None = None,
    stranded_s: float = STRANDED_S,
) -> RunView:
    """Print news until every job of the run is over; the last look is returned.

    `every_s` between looks: half a second on this machine, ten seconds where a controller is asked.
    """
    follower = Follower(run, console)
    every = every_s or (0.5 if scheduler.name == "local" else 10.0)
    stranded_since: float | None = None
    with _live(follower, console):
        while True:
            look = runs.view(run, scheduler)
            follower.show(look)
            if look.is_over:
                return look
            stranded_since = (stranded_since or time.monotonic()) if is_stranded(look) else None
            if stranded_since is not None and time.monotonic() - stranded_since > stranded_s:
                console.print(
                    "  the runtime job is over and nobody will start the training job: cancelling it"
                )
                return runs.cancel(run, scheduler)
            time.sleep(every)


@contextlib.contextmanager
def _live(follower: Follower, console: Console) -> Iterator[None]:
    """A moving last line on a terminal; nothing elsewhere."""
    if not console.is_terminal or console.is_dumb_terminal:
        yield
        return
    with Live(console=console, auto_refresh=False, transient=True) as live:
        follower.live = live
        yield


def is_stranded(look: RunView) -> bool:
    """True when the training job waits for a runtime job that is over."""
    states = {job.role: job for job in look.jobs}
    runtime, training = states.get("runtime"), states.get("training")
    if runtime is None or training is None:
        return False
    return runtime.is_over and training.state in QUEUED


def ending(run: RunDirectory, look: RunView, console: Console) -> None:
    """How a followed run ended: the learning curve or what was evaluated, the outcome, and the end of the log
    when it failed."""
    rows = read_json_lines(run.metrics)
    width = min(100, console.width)
    if plot := curve.learning_curve(rows, width=width, colour=console.color_system is not None):
        console.print()
        console.print(Text.from_ansi(plot))
    if said := curve.verdict(rows):
        console.print(view.row("curve", said))
    if table := evaluations.rows(run.read(run.evaluation, Evaluation), evaluations.Progress(run).count()):
        console.print(view.lines(table))
    console.print(view.row("ended", view.styled(look.state), f"  {view.clean(look.reason)}"))
    console.print(view.row("directory", view.short_path(look.path)))
    if look.state not in ("success", "cancelled"):
        _log_ends(run, console)


def _log_ends(run: RunDirectory, console: Console, count: int = 12) -> None:
    for log in runs.logs(run):
        text = read_bytes(log.path).decode(errors="replace").splitlines()
        if log.stream == "err" and text:
            console.print(Text(f"\n  end of {view.short_path(log.path)}", "dim"))
            console.print(Text("\n".join(f"  │ {view.clean(line)}" for line in text[-count:])))
            console.print()


def as_json(look: RunView, more: Mapping[str, Any] | None = None) -> str:
    """A look, and what else is known, as one line of JSON."""
    return json.dumps({**look.as_dict(), **(more or {})}, sort_keys=True, default=str)
