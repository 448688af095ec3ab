"""The two-way lifetime contract, with real jobs: success, failure, cancel, walltime and requeue.

After every end nothing of the run lives and the run directory says what happened.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
from jobkit import Pair, each, events, training_up

from orchestrator.contract import Outcome, Role
from orchestrator.schedulers import JobState

TRAINING, RUNTIME = Role.TRAINING, Role.RUNTIME
Make = Callable[..., Pair]

# --- ends that are meant -----------------------------------------------------------------------------


def test_success_releases_on_ready_and_ends_both(make: Make) -> None:
    pair = make("metrics('all steps done', success_rate=0.9, bad=float('inf'), word='x')")
    pair.launch()
    assert pair.info(pair.ids[TRAINING]).state in (JobState.HELD, JobState.PENDING, JobState.RUNNING)
    pair.all_over()
    result, complete = pair.result(), pair.complete()
    assert result is not None and complete is not None, pair.logs()
    assert (result.outcome, result.exit_code, result.reason) == (Outcome.SUCCESS, 0, "all steps done")
    assert result.metrics == {"success_rate": 0.9}
    assert complete.outcome == Outcome.SUCCESS
    for role in (RUNTIME, TRAINING):
        status = pair.status(role)
        assert status is not None
        assert (status.phase, status.outcome) == ("ended", Outcome.SUCCESS)
        assert pair.info(pair.ids[role]).exit_code == 0
    order = events(pair)
    assert order.index("runtime.ready") < order.index("runtime.released") < order.index("training.running")


def test_plain_dependency_works_too(make: Make) -> None:
    pair = make("metrics(x=1)", start_policy="after")
    pair.launch()
    pair.all_over()
    result = pair.result()
    assert result is not None and result.outcome == Outcome.SUCCESS, pair.logs()
    assert "runtime.released" not in events(pair)


def test_the_trainer_gets_address_and_key_which_shows_nowhere_else(make: Make) -> None:
    said = "dict(os.environ, argv=Path('/proc/self/cmdline').read_text())"
    pair = make(f"from pathlib import Path; (run / 'training' / 'seen').write_text(json.dumps({said}))")
    pair.launch()
    pair.all_over()
    seen = json.loads((pair.run.training / "seen").read_text())
    url, key = pair.run.read_text(pair.run.runtime_url), pair.run.read_text(pair.run.runtime_api_key)
    names = ("ORCHESTRATE_RUNTIME_URL", "RUNTIME_URL", "SANDBOX_REMOTE_RUNTIME_API_URL")
    assert {seen[name] for name in names} == {url}
    assert seen["RUNTIME_API_KEY_FILE"] == str(pair.run.runtime_api_key)
    assert key and seen.pop("ALLHANDS_API_KEY") == key  # the one name under which OpenHands and SkyRL read it
    assert key not in json.dumps(seen)
    assert key not in pair.logs()
    scripts = [path.read_text() for path in pair.run.root.glob("*.sbatch")]
    assert scripts and not any(key in text for text in [*scripts, pair.run.env_file.read_text()])


def test_success_is_exit_code_zero_and_nothing_else(make: Make) -> None:
    def check(case: tuple[str, int, str]) -> None:
        body, code, reason = case
        pair = make(body)
        pair.launch()
        pair.all_over()
        result, status = pair.result(), pair.status(RUNTIME)
        assert result is not None and status is not None, pair.logs()
        assert (result.outcome, result.exit_code) == (Outcome.FAILED, code)
        assert reason in result.reason
        assert status.outcome == Outcome.SUCCESS

    each(
        [
            ("metrics('loss is nan', step=3); sys.exit(70)", 70, "exited with code 70: loss is nan"),
            ("metrics('fine', step=3); os.kill(os.getpid(), signal.SIGKILL)", 70, "was killed by SIGKILL"),
            ("metrics('fine', step=3); sys.exit(85 + 128)", 70, "exited with code 213"),
        ],
        check,
    )


@pytest.mark.slow
def test_cancel_of_either_job_ends_both(make: Make) -> None:
    def check(who: list[Role]) -> None:
        pair = make()
        pair.launch()
        training_up(pair)
        pair.scheduler.cancel([pair.ids[role] for role in who])
        pair.all_over()
        result = pair.result()
        assert result is not None, pair.logs()
        if TRAINING in who:
            assert (result.outcome, "SIGTERM" in result.reason) == (Outcome.CANCELLED, True)
        else:
            assert (result.outcome, result.exit_code) == (Outcome.PEER_GONE, 69)
            assert "the runtime ended (cancelled" in result.reason

    each([[TRAINING], [RUNTIME], [TRAINING, RUNTIME]], check)


def test_cancelling_the_held_training_job_ends_the_runtime(make: Make) -> None:
    pair = make(server=["never-ready"])
    pair.launch()
    pair.phase(RUNTIME, "starting")
    pair.scheduler.cancel([pair.ids[TRAINING]])
    pair.all_over()
    status = pair.status(RUNTIME)
    assert status is not None and status.outcome == Outcome.PEER_GONE
    assert "cancelled while pending" in status.reason


def test_runtime_only_serves_until_it_is_cancelled(make: Make) -> None:
    pair = make(mode="runtime-only")
    pair.start(RUNTIME)
    pair.phase(RUNTIME, "running")
    pair.scheduler.cancel([pair.ids[RUNTIME]])
    pair.all_over()
    status = pair.status(RUNTIME)
    assert status is not None and status.outcome == Outcome.CANCELLED


# --- the runtime fails -------------------------------------------------------------------------------


def test_a_server_that_never_serves_cancels_the_held_training_job(make: Make) -> None:
    def check(case: tuple[str, str]) -> None:
        server, words = case
        pair = make(server=[server], ready_timeout=0.7 if server == "never-ready" else 8)
        pair.launch()
        pair.all_over()
        assert pair.info(pair.ids[TRAINING]).raw == "CANCELLED"
        status = pair.status(RUNTIME)
        assert status is not None and status.outcome == Outcome.FAILED
        assert words in status.reason
        assert pair.info(pair.ids[RUNTIME]).exit_code not in (0, None)
        result = pair.result()
        assert result is not None and result.outcome == Outcome.FAILED, pair.logs()
        assert result.reason.startswith("the training never started: ") and words in result.reason

    ways = {"die-before": "exited with code 3 before it was ready", "never-ready": "not ready within 0.7 s"}
    each(ways.items(), check)


def test_training_started_by_dependency_gives_up_when_the_runtime_is_already_gone(make: Make) -> None:
    """The dependency is met by a runtime that was cancelled while pending: it proves nothing."""
    pair = make(start_policy="after")
    pair.start(RUNTIME, held=True)
    pair.start(TRAINING, after=pair.ids[RUNTIME])
    pair.scheduler.cancel([pair.ids[RUNTIME]])
    pair.all_over()
    result = pair.result()
    assert result is not None, pair.logs()
    assert (result.outcome, result.exit_code) == (Outcome.PEER_GONE, 69)
    assert "is over (cancelled while pending)" in result.reason
    assert pair.info(pair.ids[TRAINING]).exit_code == 69


def test_training_waits_no_longer_than_the_ready_timeout(make: Make) -> None:
    pair = make(start_policy="after", server=["never-ready"], ready_timeout=0.7)
    pair.start(RUNTIME)
    pair.start(TRAINING)
    pair.all_over()
    result = pair.result()
    assert result is not None and result.outcome == Outcome.PEER_GONE, pair.logs()


def test_a_hanging_server_is_lost_after_the_grace(make: Make) -> None:
    pair = make(peer_grace=0.6)
    pair.launch()
    training_up(pair)
    os.kill(pair.pid_of("runtime command"), signal.SIGSTOP)
    pair.all_over()
    result = pair.result()
    assert result is not None and result.outcome == Outcome.PEER_GONE, pair.logs()
    # both jobs judge: the training by its grace, the runtime job, which may not start another, by half of it
    assert "no runtime for" in result.reason or "did not answer" in result.reason


def test_an_existing_server_is_used_and_left_alone(make: Make) -> None:
    owner = make(mode="runtime-only")
    owner.start(RUNTIME)
    owner.phase(RUNTIME, "running")
    pair = make("metrics(x=1)", mode="runtime-url")
    for path in ("runtime_url", "runtime_api_key"):
        text = owner.run.read_text(getattr(owner.run, path))
        pair.run.publish(getattr(pair.run, path), text, 0o600)
    pair.start(TRAINING)
    pair.ended(pair.ids[TRAINING])
    result = pair.result()
    assert result is not None and result.outcome == Outcome.SUCCESS, pair.logs()
    assert owner.info(owner.ids[RUNTIME]).state == JobState.RUNNING


def test_an_existing_server_that_cannot_be_used(make: Make) -> None:
    owner = make(mode="runtime-only")
    owner.start(RUNTIME)
    owner.phase(RUNTIME, "running")

    def check(case: tuple[str, str]) -> None:
        url, words = case
        pair = make("metrics(x=1)", mode="runtime-url", ready_timeout=0.5)
        pair.run.publish(pair.run.runtime_url, url)
        pair.run.publish(pair.run.runtime_api_key, "not the key", 0o600)
        pair.start(TRAINING)
        pair.ended(pair.ids[TRAINING])
        result = pair.result()
        assert result is not None and result.outcome == Outcome.PEER_GONE, pair.logs()
        assert words in result.reason

    url = owner.run.read_text(owner.run.runtime_url)
    each([(url, "refused the API key"), ("http://127.0.0.1:9", "does not answer")], check)


# --- walltime and requeue ----------------------------------------------------------------------------

REQUEUE = """
first = os.environ["ORCHESTRATE_RESTARTS"] == "0"
if not first:
    metrics("went on", step=2)
    sys.exit(0)
def checkpoint(*_):
    (run / "training" / "checkpoints" / "step-1").mkdir(parents=True)
    sys.exit(85)
signal.signal(signal.SIGUSR1, checkpoint)
up()
time.sleep(1000)
"""


def test_walltime_checkpoint_requeue_and_on(make: Make) -> None:
    pair = make(REQUEUE)
    pair.launch(time_limit_s=8, signal="USR1@7")
    pair.all_over(20)
    result = pair.result()
    assert result is not None and result.outcome == Outcome.SUCCESS, pair.logs()
    assert (result.attempt, result.reason, result.metrics) == (2, "went on", {"step": 2.0})
    outcomes = [e.data.get("outcome") for e in pair.run.timeline() if e.what == "training.ended"]
    assert outcomes == [Outcome.REQUEUED, Outcome.SUCCESS]
    assert pair.run.latest_attempt(RUNTIME) == 1
    assert pair.record(pair.ids[TRAINING]).restarts == 1


@pytest.mark.slow
def test_requeue_has_limits(make: Make) -> None:
    def check(case: tuple[dict[str, Any], dict[str, Any], str]) -> None:
        settings, job, words = case
        pair = make("sys.exit(85)", **settings)
        pair.launch(**job)
        pair.all_over()
        result = pair.result()
        assert result is not None and result.outcome == Outcome.TIMEOUT, pair.logs()
        assert words in result.reason

    each(
        [
            ({"max_restarts": 1}, {}, "in life 2, the last that scheduler.max_restarts (1)"),
            ({"on_timeout": "stop"}, {}, "on_timeout is stop"),
            ({"max_restarts": 0}, {"requeue": False}, "in life 1, the last that scheduler.max_restarts (0)"),
        ],
        check,
    )


def test_requeue_needs_progress(make: Make) -> None:
    pair = make("(run / 'training/checkpoints/step-7').mkdir(parents=True, exist_ok=True); sys.exit(85)")
    pair.launch()
    pair.all_over()
    result = pair.result()
    assert result is not None and result.outcome == Outcome.TIMEOUT, pair.logs()
    assert (result.attempt, "no progress: step-7" in result.reason) == (2, True)


def test_walltime_without_a_checkpoint_is_a_timeout(make: Make) -> None:
    pair = make("signal.signal(signal.SIGTERM, signal.SIG_IGN)\nup()\ntime.sleep(1000)", stop_timeout=0.5)
    pair.launch(time_limit_s=2, signal="USR1@1")
    pair.all_over(15)
    result = pair.result()
    assert result is not None and result.outcome == Outcome.TIMEOUT, pair.logs()
    assert pair.info(pair.ids[TRAINING]).raw == "TIMEOUT"
