"""`orchestrate launch` with the real local scheduler, stubs and wrappers; server and trainer are small.

The small ones are packages of the same names in front of the real ones, which is also how a site would
put its own trainer in place: `training.python` is any program that behaves like a Python.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from jobkit import python_with

from orchestrator.contract import Env, ReadyFlag, Result, Role, RunDirectory, wait_for
from orchestrator.processes import labelled
from orchestrator.runs import list_runs

REPOSITORY = Path(__file__).resolve().parents[2]

TRAINER = """
import json, os, sys, time
from orchestrator.contract import RunDirectory, append_line
run = RunDirectory(sys.argv[sys.argv.index("--run-dir") + 1])
for step in range(12):
    append_line(run.metrics, json.dumps({"step": step, "success_rate": step / 12, "tokens_per_s": 1000}))
if os.environ.get("TRAINER_WAITS"):
    time.sleep(1000)
sys.exit(int(os.environ.get("TRAINER_EXITS", "0")))
"""


@pytest.fixture
def python(tmp_path: Path) -> Path:
    return python_with(tmp_path, TRAINER)


class Shell:
    """Runs `orchestrate` as a person would, and ends what is left of the runs."""

    def __init__(self, runs_dir: Path, python: Path) -> None:
        self.runs_dir = runs_dir
        self.base = [f"run.runs_dir={runs_dir}", f"runtime.python={python}", f"training.python={python}"]

    def start(self, *arguments: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "orchestrator", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=REPOSITORY,
            env={**os.environ, **(env or {})},
        )

    def run(self, *arguments: str, env: dict[str, str] | None = None) -> tuple[int, str]:
        process = self.start(*arguments, env=env)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output

    def launch(self, *arguments: str) -> tuple[str, ...]:
        return ("launch", "-c", "local", *self.base, *arguments)

    def the_run(self) -> RunDirectory:
        return wait_for(lambda: next(iter(list_runs(self.runs_dir)), None), "a run", 20, longest_s=0.1)


@pytest.fixture
def shell(tmp_path: Path, python: Path) -> Iterator[Shell]:
    made = Shell(tmp_path / "runs", python)
    yield made
    for run in list_runs(made.runs_dir):
        if not nothing_left(run):
            made.run("cancel", str(run.root))


def nothing_left(run: RunDirectory) -> bool:
    return not labelled(Env.RUN_DIR, str(run.root))


def test_a_followed_run_ends_with_its_curve(shell: Shell) -> None:
    code, output = shell.run(*shell.launch("--follow"))
    assert code == 0, output
    assert output.index("runtime ready at http://127.0.0.1:") < output.index("step  12/50   success  92%")
    assert "success rate by step" in output and "ended     success" in output and "\x1b" not in output
    run = shell.the_run()
    result = run.read(run.result, Result)
    assert result is not None and result.outcome == "success"
    assert nothing_left(run)


def test_a_failing_trainer_gives_its_code(shell: Shell) -> None:
    code, output = shell.run(*shell.launch("--follow", "environment.variables.TRAINER_EXITS=70"))
    assert code == 70 and "ended     failed" in output, output
    assert nothing_left(shell.the_run())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_no_process_and_says_so(shell: Shell, number: int) -> None:
    process = shell.start(*shell.launch("--follow", "environment.variables.TRAINER_WAITS=1"))
    run = shell.the_run()
    wait_for(lambda: run.metrics.is_file() or None, "the first step", 30, longest_s=0.1)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "every job of the run is over" in output, output
    result = run.read(run.result, Result)
    assert result is not None and result.outcome == "cancelled"
    assert nothing_left(run)


def test_a_server_alone_serves_a_training_of_another_run(shell: Shell) -> None:
    code, output = shell.run(*shell.launch("--runtime-only"))
    assert code == 0, output
    server = shell.the_run()
    flag = server.read(server.ready_flag, ReadyFlag)
    assert flag is not None
    (curl,) = (line.strip() for line in output.splitlines() if "curl -sH @-" in line)
    command = curl.removeprefix("try").strip()
    answer = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=20, cwd=REPOSITORY, check=True
    )
    assert json.loads(answer.stdout)["nonce"] == flag.nonce
    key = server.read_text(server.runtime_api_key)
    assert key and key not in output
    code, output = shell.run(
        *shell.launch("--follow", "--runtime-url", flag.url, "--runtime-api-key-file"),
        str(server.runtime_api_key),
    )
    assert code == 0 and "ended     success" in output, output
    assert server.latest_attempt(Role.RUNTIME) == 1 and not nothing_left(server)
    code, output = shell.run("cancel", str(server.root))
    assert code == 0 and "is cancelled" in output, output
    assert nothing_left(server)


def test_a_launch_without_follow_detaches(shell: Shell) -> None:
    start = time.monotonic()
    code, output = shell.run(*shell.launch("environment.variables.TRAINER_WAITS=1"))
    assert code == 0 and "go on without this terminal" in output and time.monotonic() - start < 20
    run = shell.the_run()
    wait_for(lambda: run.metrics.is_file() or None, "the first step", 30, longest_s=0.1)
    code, output = shell.run("status", str(run.root))
    assert code == 0 and "running" in output and "step" in output
    code, output = shell.run("cancel", str(run.root), "--json")
    assert code == 0 and json.loads(output)["state"] == "cancelled"
    assert nothing_left(run)
