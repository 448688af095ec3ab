"""Nothing that interrupts a run changes what it learns: with every real part and the deterministic engine,
a run whose training was warned, ended and requeued, and whose server was killed, has the same steps as one
that was left alone, to the last digit."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
from test_run import Orchestrate, orchestrate, rows, soon

from orchestrator.contract import Manifest, RunDirectory
from orchestrator.schedulers import open_scheduler

__all__ = ["orchestrate"]
pytestmark = [pytest.mark.container, pytest.mark.slow, pytest.mark.timeout(400)]
SAME = ("rollout.engine=torch", "trainer.total_steps=4", "trainer.save_every=100", "run.seed=7")


def learned(run: RunDirectory) -> list[dict[str, Any]]:
    """The rows of a run, without what the clock and lost tries say."""
    apart = ("time/", "tokens_per_s", "lost_tries")
    return [{k: v for k, v in row.items() if not k.startswith(apart)} for row in rows(run)]


def pid_of_the_server(run: RunDirectory) -> int:
    ready = [event.data["pid"] for event in run.timeline() if event.what == "runtime.server_ready"]
    return int(ready[-1])


def test_interrupted_twice_and_yet_the_same_steps(orchestrate: Orchestrate) -> None:
    orchestrate.run(*orchestrate.launch("--follow", *SAME))
    reference = learned(orchestrate.last)
    assert [row["step"] for row in reference] == [0, 1, 2, 3]

    process = orchestrate.start(*SAME, "run.name=disturbed")
    soon(lambda: len(runs(orchestrate)) == 2, "the second run")
    run = orchestrate.last
    soon(lambda: len(rows(run)) >= 1, "the first step", 120)
    manifest = run.read(run.manifest, Manifest)
    assert manifest is not None
    open_scheduler("local", orchestrate.runs).signal(manifest.job_id("training"), "USR1")
    soon(lambda: run.latest_attempt("training") == 2, "the second life of the training", 60)
    before = len(rows(run))
    soon(lambda: len(rows(run)) > before, "a step of the second life", 120)
    os.kill(pid_of_the_server(run), signal.SIGKILL)
    process.communicate(timeout=180)
    assert process.returncode == 0, orchestrate.result()
    ended = [event.data["outcome"] for event in run.timeline() if event.what == "training.ended"]
    assert ended == ["requeued", "success"] and run.latest_attempt("runtime") == 2
    assert learned(run) == reference
    orchestrate.nothing_left()


def runs(orchestrate: Orchestrate) -> list[str]:
    return [path.name for path in orchestrate.runs.iterdir() if path.name[0].isdigit()]
