"""The job wrapper on its own: started by hand, settled by the stub, judged without a scheduler."""

from __future__ import annotations

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from jobkit import REPOSITORY, Pair

from orchestrator import checkpoints
from orchestrator.contract import (
    CompleteFlag,
    Env,
    Outcome,
    Result,
    Role,
    RunDirectory,
)
from orchestrator.job_again import flat_numbers
from orchestrator.peer import ask_health, runtime_health
from orchestrator.processes import labelled

RUNTIME, TRAINING = Role.RUNTIME, Role.TRAINING
FIRST, SECOND = f"first-{os.getpid()}", f"second-{os.getpid()}"  # tests run side by side, and settling kills
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "PYTHONPATH": str(REPOSITORY),
    "ORCHESTRATE_PYTHON": sys.executable,
}


def shell(value: str) -> list[str]:
    return ["/bin/sh", "-c", value]


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    pair = Pair(tmp_path, trainer=shell("exit 0"))
    yield pair
    pair.clean()


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def by_hand(pair: Pair) -> Iterator[Start]:
    """`bash jobs/ROLE.sh RUN_DIR`, as a person would type it."""
    started: list[subprocess.Popen[str]] = []

    def start(role: str, run: RunDirectory = pair.run, **environment: str) -> subprocess.Popen[str]:
        stub = subprocess.Popen(
            ["/bin/bash", str(REPOSITORY / "jobs" / f"{role}.sh"), str(run.root)],
            env=ENVIRONMENT | {"BENCH": str(pair.root)} | environment,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(stub)
        return stub

    yield start
    for stub in started:
        if stub.poll() is None:
            stub.terminate()
        stub.communicate(timeout=20)


# --- stubs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["runtime", "training"])
def test_stub_is_short_and_sets_its_traps_first(role: str) -> None:
    lines = (REPOSITORY / "jobs" / f"{role}.sh").read_text().splitlines()
    assert len(lines) <= 40
    code = [line for line in lines if line and not line.startswith("#")]
    assert code[0].startswith("pid=") and code[1].startswith("trap ") and code[2].startswith("trap ")


def test_both_jobs_run_by_hand(pair: Pair, by_hand: Start) -> None:
    runtime, training = by_hand("runtime"), by_hand("training")
    assert training.wait(20) == 0
    assert runtime.wait(20) == 0
    result, status = pair.result(), pair.status(RUNTIME)
    assert result is not None and result.outcome == Outcome.SUCCESS
    assert status is not None and status.outcome == Outcome.SUCCESS
    pair.nothing_left()


def test_interrupt_by_hand_ends_in_order(pair: Pair, by_hand: Start) -> None:
    runtime = by_hand("runtime")
    pair.phase(RUNTIME, "running")
    os.killpg(runtime.pid, signal.SIGINT)  # what a terminal does on Ctrl-C
    assert runtime.wait(20) == 143
    status = pair.status(RUNTIME)
    assert status is not None and (status.phase, status.outcome) == ("ended", Outcome.CANCELLED)
    pair.nothing_left()


def test_a_finished_training_is_not_overwritten_by_another_start(pair: Pair, by_hand: Start) -> None:
    done = Result(
        run_id=pair.run.run_id, attempt=1, job_id="1", outcome="success", reason="done", exit_code=0
    )
    pair.run.publish(pair.run.result, done)
    flag = CompleteFlag(run_id=pair.run.run_id, attempt=1, nonce="n", outcome="success")
    pair.run.publish(pair.run.complete_flag, flag)
    training = by_hand("training")
    assert "already complete (success)" in training.communicate(timeout=20)[1]
    assert (training.returncode, pair.result()) == (0, done)
    assert by_hand("runtime").wait(20) == 0  # nobody needs a server any more


@pytest.mark.parametrize("role", [RUNTIME, TRAINING])
def test_a_missing_interpreter_is_settled_by_another(pair: Pair, by_hand: Start, role: Role) -> None:
    pair.run.env_file.unlink()
    search = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    stub = by_hand(role, ORCHESTRATE_PYTHON="/no/such/python", **search)
    assert stub.wait(20) == 127
    status = pair.status(role)
    assert status is not None and status.outcome == Outcome.FAILED
    assert "exited with code 127" in status.reason
    assert (pair.complete() is not None) == (role == TRAINING)


def test_what_is_not_a_run_is_refused(tmp_path: Path, by_hand: Start) -> None:
    stub = by_hand("runtime", RunDirectory(tmp_path / "nowhere"))
    assert stub.wait(20) == 66
    bare = RunDirectory(tmp_path)
    stub = by_hand("training", bare)
    assert "no run.json" in stub.communicate(timeout=20)[1]
    assert stub.returncode == 66


def test_commands_that_do_not_exist_fail_with_a_reason(tmp_path: Path, by_hand: Start) -> None:
    broken = Pair(tmp_path, trainer=["/no/such/trainer"])
    by_hand("runtime", broken.run)
    assert by_hand("training", broken.run).wait(20) == 66
    result = broken.result()
    assert result is not None and "the trainer did not start" in result.reason
    assert "/no/such/trainer" in result.reason


def test_a_later_attempt_takes_over(pair: Pair, by_hand: Start) -> None:
    first = by_hand("runtime")
    pair.phase(RUNTIME, "running")
    second = by_hand("runtime")
    assert first.wait(20) == 143  # and its stub has settled, by now
    assert pair.phase(RUNTIME, "running").attempt == 2
    assert second.poll() is None
    second.terminate()
    assert second.wait(20) == 143
    pair.nothing_left()


def test_the_wrapper_imports_little() -> None:
    """A job's wrapper stays up beside the real work: no schema, no web framework, no torch."""
    program = "import sys, orchestrator.job; print(*sorted(m.partition('.')[0] for m in sys.modules))"
    out = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env=ENVIRONMENT,
        timeout=20,
    ).stdout.split()
    assert not {"pydantic", "yaml", "httpx", "click", "rich", "torch", "vllm", "fastapi", "asyncio"} & set(
        out
    )


# --- settling ----------------------------------------------------------------------------------------


def settle(pair: Pair, role: Role, code: int, wanted: str, nonce: str = FIRST) -> int:
    command = [
        sys.executable,
        "-m",
        "orchestrator.job",
        "settle",
        role,
        str(pair.run.root),
        str(code),
        wanted,
    ]
    return subprocess.run(command, env=ENVIRONMENT | {Env.NONCE.value: nonce}, timeout=20).returncode


@pytest.mark.parametrize(
    ("code", "wanted", "outcome"),
    [(137, "", "failed"), (143, " stop", "cancelled"), (137, " warned stop", "timeout"), (1, "", "failed")],
)
def test_settle_says_what_the_wrapper_could_not(pair: Pair, code: int, wanted: str, outcome: str) -> None:
    assert settle(pair, TRAINING, code, wanted) == 0
    result, complete = pair.result(), pair.complete()
    assert result is not None and complete is not None
    assert (result.outcome, complete.outcome) == (outcome, outcome)
    assert result.exit_code != 0


def test_settle_ends_what_is_left_of_that_life_only(pair: Pair) -> None:
    ours, others = (
        subprocess.Popen(["sleep", "1000"], env={Env.NONCE.value: nonce}) for nonce in (FIRST, SECOND)
    )
    assert settle(pair, RUNTIME, 137, "") == 0
    assert ours.wait(5) == -signal.SIGTERM
    assert labelled(Env.NONCE, SECOND) == [others.pid]
    others.kill()
    others.wait(5)


def test_settle_completes_an_end_that_was_cut_short(pair: Pair) -> None:
    """The wrapper was killed between the result and the flag: what it had said stays."""
    attempt = pair.run.take_attempt(TRAINING, FIRST)
    said = Result(
        run_id=pair.run.run_id, attempt=attempt, job_id="", outcome="success", reason="done", exit_code=0
    )
    pair.run.publish(pair.run.result, said)
    assert settle(pair, TRAINING, 137, "") == 0
    complete = pair.complete()
    assert complete is not None
    assert (complete.outcome, pair.result(), pair.run.latest_attempt(TRAINING)) == ("success", said, 1)


@pytest.mark.parametrize("known", [True, False])
def test_settle_leaves_a_later_attempt_alone(pair: Pair, known: bool) -> None:
    """Neither writes over it nor, by taking a number of its own, supersedes it."""
    if known:
        pair.run.take_attempt(TRAINING, FIRST)
    later = pair.run.take_attempt(TRAINING, SECOND)
    assert settle(pair, TRAINING, 143, " stop", nonce=FIRST) == 0
    assert (pair.result(), pair.complete(), pair.run.latest_attempt(TRAINING)) == (None, None, later)


# --- health ------------------------------------------------------------------------------------------


@pytest.fixture
def answering() -> Iterator[Callable[[int, Any], str]]:
    """A server that answers everything with one status and body; redirects go to itself."""
    servers: list[http.server.HTTPServer] = []

    def serve(code: int, body: Any) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(code)
                self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}).start()
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("code", "body", "problem"),
    [
        (200, {"status": "ok", "run_id": "r", "nonce": "n"}, ""),
        (200, {"status": "draining", "run_id": "r", "nonce": "n"}, "is draining"),
        (200, {"status": "ok"}, "refused the API key"),
        (401, {}, "refused the API key"),
        (503, {}, "answered 503"),
        (302, {}, "answered 302"),  # never followed: the key would go along
        (200, b"<html>", "is not the health"),
        (200, [1], "is not the health"),
    ],
)
def test_health_is_judged(answering: Callable[[int, Any], str], code: int, body: Any, problem: str) -> None:
    found = ask_health(answering(code, body), "key")
    assert problem in found.problem
    assert bool(found.problem) == bool(problem)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "http://nowhere.invalid:1", "", "http://h:notaport"])
def test_an_address_without_a_server_is_a_problem_and_no_error(url: str) -> None:
    problem = ask_health(url, "key", 1.0).problem
    assert ("is no address" if "notaport" in url else "does not answer") in problem


def test_another_server_at_the_address_is_not_taken_for_ours(
    pair: Pair, answering: Callable[[int, Any], str]
) -> None:
    from orchestrator.contract import ReadyFlag

    url = answering(200, {"status": "ok", "run_id": "another", "nonce": "n"})
    flag = ReadyFlag(run_id=pair.run.run_id, attempt=1, job_id="", nonce="n", host="h", pid=1, url=url)
    pair.run.publish(pair.run.ready_flag, flag)
    assert "another server" in runtime_health(pair.run, "run").problem
    pair.run.take_attempt(RUNTIME, "later")
    pair.run.take_attempt(RUNTIME, "latest")
    assert "starting again" in runtime_health(pair.run, "run").problem


# --- small things ------------------------------------------------------------------------------------


def test_only_finite_flat_numbers_are_metrics() -> None:
    given = {"a": 1, "b": 0.5, "c": True, "d": "x", "e": float("nan"), "f": [1], "g": None}
    assert flat_numbers(given) == {"a": 1.0, "b": 0.5}
    assert flat_numbers([1]) == {}


@pytest.mark.parametrize("elsewhere", [False, True])
def test_the_newest_checkpoint_is_the_highest_step(
    make: Callable[..., Pair], tmp_path: Path, elsewhere: bool
) -> None:
    settings = {"checkpoint_dir": str(tmp_path / "elsewhere")} if elsewhere else {}
    run = make("", **settings).run
    assert checkpoints.newest(run) == ""
    for name in ("step-9", "step-10", "step-x", ".tmp", ".saving-step-11"):
        ((tmp_path / "elsewhere" if elsewhere else run.checkpoints) / name).mkdir(parents=True)
    assert checkpoints.newest(run) == "step-10"
