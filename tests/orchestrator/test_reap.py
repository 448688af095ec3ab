"""`orchestrate reap`: what is a leftover and what is kept, then real jobs whose keepers were killed."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from jobkit import Pair, training_up, until

from orchestrator import reap
from orchestrator.cli_commands import cli
from orchestrator.contract import (
    CompleteFlag,
    Env,
    Heartbeat,
    Manifest,
    Outcome,
    Result,
    Role,
    RunDirectory,
    wait_for,
)
from orchestrator.processes import labelled
from orchestrator.reap import Sight, verdict
from orchestrator.schedulers import JobInfo, JobState, OwnJob


def sight(state: JobState, role: str = "training", **more: Any) -> Sight:
    own = OwnJob(JobInfo("7", state, more.pop("reason", "")), "r_1", role, "r_1.training", "/runs/r_1")
    return Sight(own=own, **more)


@pytest.mark.parametrize(
    ("seen", "leftover", "why"),
    [
        (sight(JobState.RUNNING), False, "goes on"),
        (sight(JobState.HELD), False, "goes on"),
        (sight(JobState.HELD, complete="success"), True, "its run is over (success)"),
        (sight(JobState.PENDING, peer_over="its runtime job 8 is over"), True, "runtime job 8 is over"),
        (sight(JobState.UNKNOWN, complete="success", reason="ask on n2"), False, "ask on n2"),
        (sight(JobState.RUNNING, complete="failed", still_s=26), True, "26 s it gave no sign of life"),
        (sight(JobState.RUNNING, complete="failed", still_s=14), False, "it is alive"),
        (sight(JobState.RUNNING, peer_over="x", still_s=0), False, "winds up"),
        (sight(JobState.HELD, directory=False), True, "run directory is gone"),
        (sight(JobState.RUNNING, directory=False), False, "run directory is gone"),
        (sight(JobState.HELD, directory=None), False, "not seen here"),
        (sight(JobState.PENDING, "runtime", mode="runtime-only", complete="x"), False, "goes on"),
    ],
    ids=lambda value: str(value)[-60:],
)
def test_verdicts(seen: Sight, leftover: bool, why: str) -> None:
    assert verdict(seen)[0] is leftover and why in verdict(seen)[1]


def command(pair: Pair, *options: str) -> dict[str, Any]:
    done = CliRunner().invoke(cli, ["reap", str(pair.run.root), "--wait", "1", "--json", *options])
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_run_that_goes_on_is_kept(make: Callable[..., Pair]) -> None:
    pair = make()
    pair.launch()
    training_up(pair)
    found = command(pair, "--yes")
    assert {item["why"] for item in found["kept"]} == {"its run goes on"} and len(found["kept"]) == 2
    assert not [item for item in found["leftovers"] if item["kind"] != "sandboxes"]


@pytest.mark.slow
def test_a_held_job_without_a_runtime_is_shown_then_removed(make: Callable[..., Pair]) -> None:
    pair = make()
    pair.start(Role.TRAINING, held=True)
    runtime = pair.submit("exit 9\n")  # died before it could cancel its peer
    entry = {"role": "runtime", "state": "submitted", "job_id": runtime, "token": "t"}
    entries = [*pair.manifest.submissions, entry]
    pair.run.publish(pair.run.manifest, dataclasses.replace(pair.manifest, submissions=entries))
    pair.ended(runtime)
    (left,) = [item for item in command(pair)["leftovers"] if item["kind"] == "job"]
    assert (
        f"runtime job {runtime} is over" in left["why"] and pair.info(left["job_id"]).state == JobState.HELD
    )
    assert "removed yet" in CliRunner().invoke(cli, ["reap", str(pair.run.root)]).output
    removed = command(pair, "--yes")["removed"]
    assert [(item["kind"], item["problem"]) for item in removed] == [("job", "")]
    assert pair.info(left["job_id"]).state == JobState.ENDED
    result = pair.run.read(pair.run.result, Result)
    assert result is not None and result.outcome == Outcome.CANCELLED and "reaped" in result.reason
    assert any(event.what == "launcher.reaped" for event in pair.run.timeline())


def test_a_job_still_being_launched_is_kept(make: Callable[..., Pair]) -> None:
    pair = make()
    pair.start(Role.TRAINING, held=True)
    (kept,) = command(pair, "--yes")["kept"]
    assert kept["why"] == "its run goes on"
    old = dataclasses.replace(pair.manifest, created_at=time.time() - 3600)
    pair.run.publish(pair.run.manifest, old)
    (left,) = [item for item in command(pair)["leftovers"] if item["kind"] == "job"]
    assert "never submitted" in left["why"]


@pytest.mark.slow
def test_a_queued_job_of_a_complete_run_goes_and_one_that_beats_stays(make: Callable[..., Pair]) -> None:
    pair = make()
    pair.launch()
    training_up(pair)
    held = pair.submit("true\n", held=True, role="runtime", run_dir=pair.run.root)
    flag = CompleteFlag(run_id=pair.run.run_id, attempt=1, nonce="", outcome="success")
    pair.run.publish(pair.run.complete_flag, flag)
    removed = command(pair, "--yes")["removed"]
    assert held in {item["job_id"] for item in removed}
    assert not {item["job_id"] for item in removed} & {pair.ids[Role.TRAINING]}
    pair.all_over()  # the runtime saw the flag, and the training the end of the runtime


@pytest.mark.slow
def test_processes_and_records_of_a_killed_supervisor(make: Callable[..., Pair], tmp_path: Path) -> None:
    pair = make("up()\nsignal.signal(15, signal.SIG_IGN)\ntime.sleep(1000)")
    pair.launch()
    training_up(pair)
    job_id = pair.ids[Role.TRAINING]
    record = pair.record(job_id)
    orphan = subprocess.Popen(  # as a daemon that left its job's tree: only the label says whose it is
        [sys.executable, "-c", "import time; time.sleep(1000)"],
        env={Env.RUN_DIR.value: str(pair.run.root), Env.JOB_ID.value: job_id},
        start_new_session=True,
    )
    try:
        assert command(pair)["leftovers"] == []
        os.kill(record.keeper["pid"], signal.SIGSTOP)  # else it would write down the end
        os.kill(record.supervisor["pid"], signal.SIGKILL)
        os.kill(record.keeper["pid"], signal.SIGKILL)
        until(lambda: pair.info(job_id).state == JobState.GONE, "the job to be gone")
        kinds = {item["kind"] for item in command(pair)["leftovers"]}
        assert {"record", "process"} <= kinds
        done = command(pair, "--yes")["removed"]
        assert {item["problem"] for item in done} == {""}, done
        orphan.wait(30)
        assert pair.info(job_id).state == JobState.ENDED
        assert not set(labelled(Env.JOB_ID, job_id)) & set(labelled(Env.RUN_DIR, str(pair.run.root)))
    finally:
        orphan.kill()


def test_a_directory_without_runs(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["reap", "--runs-dir", str(tmp_path)])
    assert done.exit_code == 0, done.output


def test_the_heartbeats_of_several_runs_are_watched_at_once(tmp_path: Path) -> None:
    """One after the other, the second would be looked at when its job beats no more."""
    dead, alive = RunDirectory.create(tmp_path, "dead"), RunDirectory.create(tmp_path, "alive")
    sights = [
        Sight(own=OwnJob(JobInfo(run.run_id, JobState.RUNNING), run.run_id, "runtime", "t", str(run.root)))
        for run in (dead, alive)
    ]
    sights = [dataclasses.replace(sight, complete="success", beat_s=0.5) for sight in sights]
    with ThreadPoolExecutor(1) as pool:
        watched = pool.submit(reap._watched, sights, None)
        end = time.monotonic() + 1.2
        with Heartbeat(alive.heartbeat("runtime"), 0.02):
            wait_for(lambda: time.monotonic() >= end or None, "the end of the job", 5)
    assert [verdict(sight)[0] for sight in watched.result()] == [True, False]


def test_an_unreadable_run_is_not_judged(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path)
    assert run.read(run.manifest, Manifest) is None
    own = OwnJob(JobInfo("1", JobState.HELD), run.run_id, "training", "t", str(run.root))
    assert reap._sight(own, None, [], {}).directory is None
