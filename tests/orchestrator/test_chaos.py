"""`kill -9` of each part of a run, at each phase: nothing of the run lives on, and the records are true."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from jobkit import Pair, each, training_up

from orchestrator.contract import Outcome, Role
from orchestrator.schedulers import JobState

TRAINING, RUNTIME = Role.TRAINING, Role.RUNTIME
Make = Callable[..., Pair]

PARTS = ["supervisor", "keeper", "stub", "wrapper", "command"]
SPOKEN = PARTS[2:]
"""Whose death somebody of the job sees for what it is; that of the others looks like a cancel."""


@pytest.mark.slow
def test_kill_of_each_part_of_the_training_job(make: Make) -> None:
    def check(part: str) -> None:
        pair = make()
        pair.launch()
        training_up(pair)
        os.kill(pair.pid_of(f"training {part}"), signal.SIGKILL)
        pair.all_over()
        result, complete = pair.result(), pair.complete()
        assert result is not None and complete is not None, pair.logs()
        assert result.outcome == (Outcome.FAILED if part in SPOKEN else Outcome.CANCELLED)
        assert any(word in result.reason for word in ("SIGKILL", "SIGTERM", "was killed")), result
        status = pair.status(RUNTIME)
        assert status is not None and status.outcome == Outcome.SUCCESS, status

    each(PARTS, check)


def test_what_a_killed_server_left_on_its_node_is_swept(make: Make) -> None:
    def check(part: str) -> None:
        pair = make(
            mode="runtime-only", sweep_command=["sh", "-c", 'touch "$ORCHESTRATE_RUN_DIR"/runtime/swept']
        )
        pair.start(RUNTIME)
        pair.phase(RUNTIME, "running")
        if part:
            os.kill(pair.pid_of(f"runtime {part}"), signal.SIGKILL)
        else:
            pair.scheduler.cancel([pair.ids[RUNTIME]])
        pair.all_over()
        assert (pair.run.runtime / "swept").exists() == bool(part)

    each(["command", "wrapper", ""], check)


@pytest.mark.slow
def test_kill_of_each_part_of_the_runtime_job(make: Make) -> None:
    def check(part: str) -> None:
        pair = make()
        pair.launch()
        training_up(pair)
        os.kill(pair.pid_of(f"runtime {part}"), signal.SIGKILL)
        pair.all_over()
        status, result = pair.status(RUNTIME), pair.result()
        assert status is not None and result is not None, pair.logs()
        assert status.outcome == (Outcome.FAILED if part in SPOKEN else Outcome.CANCELLED)
        assert result.outcome == Outcome.PEER_GONE
        assert f"the runtime ended ({status.outcome}" in result.reason

    each(PARTS, check)


@pytest.mark.slow
def test_kill_of_each_part_of_the_runtime_job_before_it_is_ready(make: Make) -> None:
    def check(part: str) -> None:
        pair = make(server=["never-ready"])
        pair.launch()
        pair.phase(RUNTIME, "starting")
        os.kill(pair.pid_of(f"runtime {part}"), signal.SIGKILL)
        pair.all_over()
        status = pair.status(RUNTIME)
        assert status is not None and status.phase == "ended", pair.logs()
        assert pair.info(pair.ids[TRAINING]).raw == "CANCELLED"

    each(["supervisor", "stub", "wrapper", "command"], check)


@pytest.mark.slow
def test_kill_of_a_part_of_the_training_job_while_it_waits(make: Make) -> None:
    def check(part: str) -> None:
        pair = make(start_policy="after", server=["never-ready"])
        pair.launch()
        pair.phase(TRAINING, "waiting")
        os.kill(pair.pid_of(f"training {part}"), signal.SIGKILL)
        pair.all_over()
        result = pair.result()
        assert result is not None, pair.logs()
        assert result.outcome in (Outcome.FAILED, Outcome.CANCELLED)

    each(["keeper", "stub", "wrapper"], check)


def test_kill_of_all_of_the_training_job_at_once(make: Make) -> None:
    """As when a node dies: nobody is left to write anything. Scheduler and heartbeat tell the runtime."""
    pair = make()
    pair.launch()
    training_up(pair)
    for part in PARTS:
        os.kill(pair.pid_of(f"training {part}"), signal.SIGSTOP)
    for pid in [pair.pid_of(f"training {part}") for part in PARTS]:
        os.kill(pid, signal.SIGKILL)
    helper = [pid for pid in pair.processes() if "sleep" in Path(f"/proc/{pid}/cmdline").read_text()]
    status = pair.phase(RUNTIME, "ended")
    assert status.outcome == Outcome.PEER_GONE
    assert "the training left no result: its job" in status.reason
    assert pair.info(pair.ids[TRAINING]).state == JobState.GONE
    for pid in helper:  # a daemon of the dead trainer: with all its keepers gone, only a reboot would end it
        if Path(f"/proc/{pid}").exists():
            os.kill(pid, signal.SIGKILL)
    pair.nothing_left()
