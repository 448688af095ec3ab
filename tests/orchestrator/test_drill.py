"""`orchestrate drill`: what may be killed, and real runs that recover, or do not, and are told apart."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from typing import Any

import pytest
from click.testing import CliRunner
from jobkit import Pair, until
from memory_scheduler import MemoryScheduler

from orchestrator import drill
from orchestrator.cli_commands import cli
from orchestrator.contract import Role
from orchestrator.drill import CannotDrill, Target, Watch, find, is_first_of_namespace
from orchestrator.launch import Request, launch

STEPS = """
up()
step = 0
while True:
    with open(run / "training" / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": step}) + chr(10))
    step += 1
    time.sleep(0.1)
"""


def at_work(make: Callable[..., Pair], **settings: Any) -> Pair:
    pair = make(STEPS, **settings)
    pair.launch()
    until(lambda: pair.run.metrics.exists() and pair.run.metrics.read_text(), f"steps\n{pair.logs()}", 20)
    return pair


def test_sandboxes_are_known_by_their_namespace() -> None:
    assert is_first_of_namespace("Name:\tagent\nNSpid:\t4711\t1\n")
    assert not is_first_of_namespace("Name:\tsh\nNSpid:\t4712\t7\n")
    assert not is_first_of_namespace("Name:\tbash\nNSpid:\t4713\n") and not is_first_of_namespace("")


@pytest.mark.parametrize(
    ("part", "says"),
    [("launcher", "nothing of it to kill"), ("disk", "choose one of server"), ("server", "does not run")],
)
def test_what_cannot_be_killed_is_said(request_of: Callable[..., Request], part: str, says: str) -> None:
    memory = MemoryScheduler()
    run = launch(request_of(), memory).run
    with pytest.raises(CannotDrill, match=says):
        find(run, memory, part)


def test_parts_are_found_by_the_records_of_the_run(make: Callable[..., Pair]) -> None:
    pair = at_work(make)
    found = {part: find(pair.run, pair.scheduler, part) for part in drill.PARTS if part != "sandbox"}
    assert found["server"].pid == pair.pid_of("runtime command")
    assert found["trainer"].pid == pair.pid_of("training command")
    assert found["training-wrapper"].pid == pair.pid_of("training wrapper")
    assert found["runtime"].job_id == pair.ids[Role.RUNTIME]
    with pytest.raises(CannotDrill, match="there is no one sandbox"):
        find(pair.run, pair.scheduler, "sandbox")
    done = CliRunner().invoke(cli, ["drill", str(pair.run.root), "--kill", "server"])
    assert done.exit_code == 0 and "nothing was done" in done.output and "--yes" in done.output
    os.kill(found["server"].pid, 0)


def test_a_part_on_another_node_is_refused(make: Callable[..., Pair]) -> None:
    pair = at_work(make)
    with pytest.raises(CannotDrill, match=f"is on n7 and this is {socket.gethostname()}"):
        drill._pid(pair.run, "server", "runtime", "n7")


@pytest.mark.slow
@pytest.mark.parametrize("part", ["server", "runtime-wrapper", "runtime"])
def test_a_killed_part_comes_back_and_the_drill_sees_it(make: Callable[..., Pair], part: str) -> None:
    pair = at_work(make, runtime_max_restarts=2, failover_timeout=20.0)
    done = CliRunner().invoke(
        cli, ["drill", str(pair.run.root), "--kill", part, "--yes", "--json", "--timeout", "40"]
    )
    report = json.loads(done.stdout)
    assert done.exit_code == 0 and report["recovered"], (report, pair.logs())
    assert 0 <= report["noticed_s"] <= report["back_s"] <= report["next_step_s"] and not report["steps_twice"]


@pytest.mark.slow
def test_a_run_that_does_not_recover_is_told(make: Callable[..., Pair]) -> None:
    pair = at_work(make)
    target = find(pair.run, pair.scheduler, "trainer")
    watch = Watch(pair.run, pair.scheduler, target)
    drill.strike(target, pair.scheduler)
    report = watch.follow(30.0)
    assert not report.recovered and "the run ended as failed" in report.verdict
    with pytest.raises(CannotDrill):
        drill.strike(Target("trainer", "it", "training", pid=2**22 - 1), pair.scheduler)
