"""Further lives: chained jobs, jobs requeued from outside, checkpoints at TERM, and a runtime that returns.

Every job is a real one of the local scheduler.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jobkit import Pair, each, training_up, until

from orchestrator.contract import CompleteFlag, Outcome, Result, Role
from orchestrator.merge import past

TRAINING, RUNTIME = Role.TRAINING, Role.RUNTIME
Make = Callable[..., Pair]

# A trainer that counts its steps in checkpoints, one for each life, and succeeds in its third.
THREE = """
done = len(list((run / "training").glob("checkpoints/step-*")))
def checkpoint(*_):
    (run / f"training/checkpoints/step-{done + 1}").mkdir(parents=True)
    sys.exit(85)
if done == 2:
    metrics("went on", step=3)
    sys.exit(0)
signal.signal(signal.SIGUSR1, checkpoint)
up()
"""
AT_ONCE = THREE + "checkpoint()"
WAITING = THREE + "time.sleep(1000)"
FAILOVER: dict[str, Any] = {"runtime_max_restarts": 3, "failover_timeout": 20.0}


def outcomes(pair: Pair, role: Role) -> list[str]:
    return [said["outcome"] for said in pair.events_of(f"{role}.ended")]


def jobs_of(pair: Pair, role: Role) -> list[str]:
    manifest = pair.run.read_manifest()
    assert manifest is not None
    return [s["job_id"] for s in manifest.submissions if s["role"] == role and s["job_id"]]


# --- the training goes on ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "job"), [({"on_timeout": "chain"}, {}), ({}, {"requeue": False})], ids=["chain", "refused"]
)
def test_a_successor_goes_on(make: Make, settings: dict[str, Any], job: dict[str, Any]) -> None:
    pair = make(AT_ONCE, **settings)
    pair.launch(**job)
    pair.all_over(30)
    result = pair.result()
    assert result is not None and result.outcome == Outcome.SUCCESS, pair.logs()
    assert (result.attempt, result.metrics) == (3, {"step": 3.0})
    assert outcomes(pair, TRAINING) == [Outcome.REQUEUED, Outcome.REQUEUED, Outcome.SUCCESS]
    ids = jobs_of(pair, TRAINING)
    assert len(set(ids)) == 3 and result.job_id == ids[-1]
    assert all(pair.run.err("training", job_id).exists() for job_id in ids)
    assert len(pair.events_of("training.requeue_refused")) == (2 if job else 0)
    assert pair.run.latest_attempt(RUNTIME) == 1


def test_limits_count_lives_whatever_made_them(make: Make) -> None:
    def check(case: tuple[dict[str, Any], str]) -> None:
        settings, words = case
        pair = make(AT_ONCE, **settings)
        pair.launch()
        pair.all_over(30)
        result = pair.result()
        assert result is not None and result.outcome == Outcome.TIMEOUT, pair.logs()
        assert words in result.reason

    each(
        [
            ({"on_timeout": "chain", "max_restarts": 1}, "life 2, the last that scheduler.max_restarts"),
            ({"on_timeout": "stop"}, "on_timeout is stop"),
            ({"on_timeout": "array"}, "the last task of the array"),  # not a task of any
        ],
        check,
    )


@pytest.mark.parametrize("policy", ["requeue", "chain"])
def test_merged_logs_know_the_lives(make: Make, policy: str) -> None:
    """The lives of one job share their files, and most lines carry no time; a chain has a file for each."""
    say = "print('life', len(list((run / 'training').glob('checkpoints/step-*'))) + 1)"
    pair = make(say + AT_ONCE, on_timeout=policy)
    pair.launch()
    pair.all_over(30)
    lines = {entry.text: entry.attempt for entry in past(pair.run, TRAINING) if entry.stream == "out"}
    assert {f"life {n}": n for n in (1, 2, 3)}.items() <= lines.items(), lines


@pytest.mark.slow
def test_a_trainer_that_misses_the_warning_goes_on_from_a_regular_checkpoint(make: Make) -> None:
    """It has its time, then it is ended early enough for the job to ask for another life."""
    body = """
folder = run / "training/checkpoints/step-1"
if folder.exists():
    sys.exit(0)
folder.mkdir(parents=True)
up()
time.sleep(1000)
"""
    pair = make(body, signal_lead=8.0)
    pair.launch(time_limit_s=20, signal="USR1@16")
    pair.all_over(30)
    result = pair.result()
    assert result is not None and result.outcome == Outcome.SUCCESS, pair.logs()
    assert outcomes(pair, TRAINING) == [Outcome.REQUEUED, Outcome.SUCCESS]


# --- told to end -------------------------------------------------------------------------------------


def test_a_job_requeued_from_outside_writes_no_result(make: Make) -> None:
    pair = make(WAITING)
    pair.launch()
    training_up(pair)
    (pair.run.training / "up").unlink()
    pair.scheduler.requeue(pair.ids[TRAINING])
    until(lambda: pair.run.latest_attempt(TRAINING) == 2, "the second life", 20)
    assert pair.result() is None and pair.complete() is None
    assert outcomes(pair, TRAINING) == [Outcome.REQUEUED]
    assert (pair.run.checkpoints / "step-1").exists()  # it was asked for at TERM, and there was time
    training_up(pair)
    pair.scheduler.cancel([pair.ids[TRAINING]])
    pair.all_over(20)
    result = pair.result()
    assert result is not None and result.outcome == Outcome.CANCELLED, pair.logs()
    assert "a checkpoint was written" in result.reason
    assert (pair.run.checkpoints / "step-2").exists()
    assert outcomes(pair, RUNTIME) == [Outcome.SUCCESS]


def test_a_word_that_turned_out_wrong_is_taken_back(make: Make) -> None:
    """The life before could not learn that it was being requeued, and said that it was cancelled."""
    pair = make("metrics('went on', step=1)")
    pair.launch()
    pair.all_over()
    run, job_id = pair.run, pair.ids[TRAINING]
    wrong = Result(run_id=run.run_id, attempt=1, job_id=job_id, outcome="cancelled", reason="", exit_code=143)
    flag = CompleteFlag(run_id=run.run_id, attempt=1, nonce="n", outcome="cancelled")
    for job, restarts, taken_back in (("77", "1", False), (job_id, "0", False), (job_id, "1", True)):
        run.publish(run.result, wrong)
        run.publish(run.complete_flag, flag)
        with environment(ORCHESTRATE_JOB_ID=job, ORCHESTRATE_RESTARTS=restarts):
            from orchestrator.job_training import complete

            assert (complete(run) is None) == taken_back
        assert (pair.result() is None) == taken_back


class environment:
    """Variables of this process, for the length of a block."""

    def __init__(self, **variables: str) -> None:
        self.variables = variables

    def __enter__(self) -> None:
        os.environ.update(self.variables)

    def __exit__(self, *_: object) -> None:
        for name in self.variables:
            del os.environ[name]


# --- the runtime comes back --------------------------------------------------------------------------

CHANGED = """
up()
first = (run / "runtime_url.txt").read_text()
while (run / "runtime_url.txt").read_text() == first or not (run / "training/go").exists():
    time.sleep(0.02)
metrics("saw the new server", x=1)
"""


def comes_back(pair: Pair, lives: int = 2) -> None:
    """The runtime serves again, and the same training process ends well with it."""
    until(lambda: pair.run.latest_attempt(RUNTIME) == lives, f"life {lives} of the runtime", 20)
    pair.phase(RUNTIME, "running", 20)
    (pair.run.training / "go").touch()
    pair.all_over(20)
    result = pair.result()
    assert result is not None and result.outcome == Outcome.SUCCESS, pair.logs()
    assert (result.attempt, result.reason) == (1, "saw the new server")
    assert len(jobs_of(pair, TRAINING)) == 1
    assert outcomes(pair, RUNTIME)[-1] == Outcome.SUCCESS


def test_a_crashed_server_lives_again_in_its_job(make: Make) -> None:
    pair = make(CHANGED, **FAILOVER)
    pair.launch()
    training_up(pair)
    os.kill(pair.pid_of("runtime command"), signal.SIGKILL)
    comes_back(pair)
    assert outcomes(pair, RUNTIME) == [Outcome.REQUEUED, Outcome.SUCCESS]
    assert len(jobs_of(pair, RUNTIME)) == 1 and pair.record(pair.ids[RUNTIME]).restarts == 0


@pytest.mark.slow
def test_a_runtime_that_is_requeued_comes_back(make: Make) -> None:
    def check(case: str) -> None:
        pair = make(CHANGED, **FAILOVER, signal_lead=3.0)
        runtime = {"time_limit_s": 12, "signal": "USR1@8"} if case == "walltime" else {}
        pair.start(TRAINING, held=True)
        pair.start(RUNTIME, requeue=case != "refused", **runtime)
        training_up(pair)
        if case == "from outside":
            pair.scheduler.requeue(pair.ids[RUNTIME])
        if case == "refused":
            pair.scheduler.signal(pair.ids[RUNTIME], "USR1")
        comes_back(pair)
        assert len(jobs_of(pair, RUNTIME)) == (2 if case == "refused" else 1)

    each(["from outside", "walltime", "refused"], check)


@pytest.mark.slow
def test_a_runtime_that_is_gone_for_good_is_submitted_again_by_the_training(make: Make) -> None:
    """As when its node dies and nothing requeues it: everything of its job is killed at once."""
    pair = make(CHANGED, **FAILOVER)
    pair.launch()
    training_up(pair)
    parts = ["supervisor", "keeper", "stub", "wrapper", "command"]
    pids = [pair.pid_of(f"runtime {part}") for part in parts]
    helpers = [p for p in pair.processes() if Path(f"/proc/{p}/cmdline").read_bytes().startswith(b"sleep")]
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in pids:
            os.kill(pid, number)
    until(lambda: pair.run.latest_attempt(RUNTIME) == 2, "the new runtime", 20)
    for pid in helpers:  # a container monitor of the dead server: only a reboot, or `reap`, ends it
        os.kill(pid, signal.SIGKILL)
    comes_back(pair)
    old, new = jobs_of(pair, RUNTIME)
    assert pair.events_of("training.runtime_resubmitted")[0]["instead_of"] == old
    assert new in pair.submitted


@pytest.mark.slow
def test_a_server_that_lives_and_does_not_answer_is_replaced(make: Make) -> None:
    """In the same job, and before the training has lost its patience."""
    pair = make(CHANGED, **FAILOVER, peer_grace=12.0)  # half of it is for bringing the server back
    pair.launch()
    training_up(pair)
    os.kill(pair.pid_of("runtime command"), signal.SIGSTOP)
    comes_back(pair)
    assert len(jobs_of(pair, RUNTIME)) == 1 and pair.run.latest_attempt(RUNTIME) == 2
    said = [said["reason"] for said in pair.events_of("runtime.ended")]
    assert "lives but did not answer" in said[0], said


def test_failover_has_limits(make: Make) -> None:
    def check(case: tuple[dict[str, Any], str]) -> None:
        settings, reason = case
        pair = make(CHANGED, **settings)
        pair.launch()
        training_up(pair)
        os.kill(pair.pid_of("runtime command"), signal.SIGKILL)
        pair.all_over(20)
        result = pair.result()
        assert result is not None and result.outcome == Outcome.PEER_GONE, pair.logs()
        assert reason in result.reason

    each(
        [({"runtime_max_restarts": 0}, "the runtime ended (failed: the server was killed by SIGKILL")], check
    )


def test_a_cancelled_runtime_is_not_brought_back(make: Make) -> None:
    pair = make(CHANGED, **FAILOVER)
    pair.launch()
    training_up(pair)
    pair.scheduler.cancel([pair.ids[RUNTIME]])
    pair.all_over(20)
    result = pair.result()
    assert result is not None and result.outcome == Outcome.PEER_GONE, pair.logs()
    assert jobs_of(pair, RUNTIME) == [pair.ids[RUNTIME]]
