"""What `orchestrate logs` does: the jobs' logs one after another, or merged with the events.

What it does not do
    It orders nothing itself: `orchestrator.merge` does.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click
from rich.text import Text

from orchestrator import cli_runs, runs, view
from orchestrator.contract import RunDirectory
from orchestrator.durable import read_bytes
from orchestrator.merge import Entry, Merger
from orchestrator.runs import Log

COLOURS = {"runtime": "cyan", "training": "magenta", "launcher": "blue"}
_LOOK_EVERY_S = 0.5


class Tail:
    """Prints what was added to a set of files, each line with the name of its job in front."""

    def __init__(self, as_json: bool, last: int) -> None:
        self.as_json, self.last = as_json, last
        self.console = view.console()
        self._read: dict[Path, int] = {}

    def show(self, found: list[Log], whole: bool = True) -> None:
        """Print the new lines; a line without its end waits, unless the `whole` rest is wanted."""
        for log in found:
            data = read_bytes(log.path)
            new = data[self._read.get(log.path, 0) :]
            if not whole:
                new = new[: new.rfind(b"\n") + 1]
            first = log.path not in self._read
            self._read[log.path] = self._read.get(log.path, 0) + len(new)
            lines = new.decode(errors="replace").splitlines()
            for line in lines[-self.last :] if first and self.last else lines:
                self._print(log, line)

    def _print(self, log: Log, line: str) -> None:
        if self.as_json:
            click.echo(
                json.dumps({"role": log.role, "stream": log.stream, "file": log.path.name, "line": line})
            )
            return
        text = Text.from_ansi(view.clean(line, colour=True))
        self.console.print(Text.assemble((f"{log.role:<8} │ ", COLOURS.get(log.role, "")), text))


def logs(**options: Any) -> None:
    run = cli_runs.find(options["run"], options["runs_dir"])
    if options["merge"]:
        _merged(run, options)
        return
    tail = Tail(options["as_json"], options["lines"])
    if options["follow"]:
        _until_over(run, lambda: tail.show(runs.logs(run, options["role"]), whole=False))
    found = runs.logs(run, options["role"])
    if not found and not options["as_json"]:
        click.echo(f"{run.run_id} has no logs yet; its jobs have not started", err=True)
    tail.show(found)


def _until_over(run: RunDirectory, look: Any) -> None:
    """Look again and again until the run is over; Ctrl-C stops the printing, never the run."""
    try:
        while not cli_runs.look_at(run).is_over:
            look()
            time.sleep(_LOOK_EVERY_S)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _merged(run: RunDirectory, options: dict[str, Any]) -> None:
    console, merger = view.console(), Merger(run, options["role"])

    def show(entries: list[Entry]) -> None:
        for entry in entries:
            click.echo(_as_json(entry)) if options["as_json"] else console.print(_line(entry))

    so_far = merger.start()
    show(so_far[-options["lines"] :] if options["lines"] else so_far)
    if options["follow"]:
        _until_over(run, lambda: show(merger.news()))
        show(merger.news(whole=False))


def _as_json(entry: Entry) -> str:
    about: dict[str, Any] = {"at": entry.at, "role": entry.role, "attempt": entry.attempt}
    if entry.stream == "event":
        return json.dumps({**about, "stream": "event", "what": entry.text, "data": entry.data}, default=str)
    return json.dumps({**about, "stream": entry.stream, "file": entry.file, "line": entry.text})


def _line(entry: Entry) -> Text:
    """`12:03:41 training·2 │ text`; an event has a dot instead of the bar."""
    clock = time.strftime("%H:%M:%S", time.localtime(entry.at)) if entry.at else "        "
    who = f"{entry.role}·{entry.attempt}" if entry.attempt else entry.role
    colour = COLOURS.get(entry.role, "")
    if entry.stream == "event":
        data = " ".join(f"{name}={value}" for name, value in entry.data.items())
        what = entry.text.removeprefix(f"{entry.role}.")
        said = Text.assemble((view.clean(what), "bold"), "  ", (view.clean(data), "dim"))
        return Text.assemble((f"{clock} ", "dim"), (f"{who:<11} ● ", colour), said)
    bar = "│" if entry.stream == "out" else "┃"
    text = Text.from_ansi(view.clean(entry.text, colour=True))
    return Text.assemble((f"{clock} ", "dim"), (f"{who:<11} {bar} ", colour), text)
