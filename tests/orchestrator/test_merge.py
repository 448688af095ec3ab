"""`orchestrate logs --merge`: one order for lines and events."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from memory_scheduler import MemoryScheduler

from orchestrator.cli_commands import cli
from orchestrator.contract import Role, RunDirectory
from orchestrator.launch import Request, launch
from orchestrator.merge import Merger, attempt_at, past, time_of


@pytest.fixture
def run(request_of: Callable[..., Request]) -> RunDirectory:
    return launch(request_of(), MemoryScheduler()).run


def stamp(at: float) -> str:
    return datetime.fromtimestamp(at).strftime("%Y-%m-%d %H:%M:%S,%f")[:-3]


def say(run: RunDirectory, role: Role, what: str, attempt: int) -> None:
    log = run.events_of(role, f"{role}-job")
    log.attempt = attempt
    log.add(what)


def test_times_of_lines() -> None:
    now = 1_700_000_000.25
    assert time_of(f"{stamp(now)} INFO ready") == pytest.approx(now, abs=0.01)
    assert time_of("[2023-11-14T22:13:20Z] x") == 1_700_000_000
    assert time_of("2023-11-14T22:13:20+00:00 x") == 1_700_000_000
    assert time_of("step 3") is None and time_of("2023-99-99 10:00:00 x") is None


def test_attempts_by_time() -> None:
    assert [attempt_at([(10, 1), (20, 2)], at) for at in (5, 10, 19, 30)] == [0, 1, 1, 2]


def test_lines_and_events_in_one_order(run: RunDirectory) -> None:
    say(run, Role.RUNTIME, "starting", 1)
    say(run, Role.TRAINING, "waiting", 1)
    later = time.time() + 5
    run.out("runtime", "2").write_text(f"booting\n{stamp(later)} INFO served\nno time of its own\n")
    run.err("training", "1").write_text(f"{stamp(later + 1)} step 1\n")
    entries = [entry for entry in past(run) if entry.stream != "event"]
    assert [entry.text.split()[-1] for entry in entries] == ["booting", "served", "own", "1"]
    assert {entry.attempt for entry in entries} == {1}
    assert next(entry.text for entry in past(run)) == "launcher.created"
    assert {entry.role for entry in past(run, "training")} == {"training"}


def test_following_gives_each_thing_once_and_whole(run: RunDirectory) -> None:
    out = run.out("training", "1")
    out.write_text("one\nhal")
    merger = Merger(run)
    assert "one" in [entry.text for entry in merger.start()]
    assert merger.news() == []
    with out.open("a") as file:
        file.write("f\n")
    say(run, Role.TRAINING, "running", 1)
    assert [entry.text for entry in merger.news()] == ["training.running", "half"]
    out.write_text(out.read_text() + "end without newline")
    assert merger.news() == []
    assert [entry.text for entry in merger.news(whole=False)] == ["end without newline"]


def test_the_command(run: RunDirectory, runs_dir: Path) -> None:
    say(run, Role.RUNTIME, "starting", 2)
    run.out("runtime", "2").write_text("hello \x1b]0;title\x07there\n")
    done = CliRunner().invoke(cli, ["logs", "--merge", "--runs-dir", str(runs_dir)])
    assert done.exit_code == 0, done.output
    assert "runtime·2   │ hello there" in done.output and "launcher    ● created" in done.output
    rows: list[dict[str, Any]] = [
        json.loads(line)
        for line in CliRunner()
        .invoke(cli, ["logs", str(run.root), "--merge", "--json", "-n", "2"])
        .stdout.splitlines()
    ]
    assert len(rows) == 2 and rows[-1]["line"].startswith("hello") and rows[-1]["attempt"] == 2
