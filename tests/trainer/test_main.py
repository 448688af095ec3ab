"""`python -m trainer` as a process: what it refuses, how it ends, and what it leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from training_kit import new_run, small_config

from orchestrator.contract import Env, Exit, RunDirectory, read_bytes, wait_for
from orchestrator.schema import Config
from trainer.__main__ import checkpoint_wanted
from trainer.preflight import problems

Lives = dict[str, tuple[int, str, dict[str, Any]]]
HEAVY = ("torch", "vllm", "transformers", "numpy", "pyarrow")


def started(run: RunDirectory, *more: str) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ORCHESTRATE_")}
    command = [sys.executable, "-m", "trainer", "--run-dir", str(run.root), *more]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out + err


def configured(folder: Path, **changes: Any) -> RunDirectory:
    """A run whose config.yaml is the small one; changes are by section."""
    run = new_run(folder)
    data = small_config(folder).model_dump(mode="json")
    for section, values in changes.items():
        data[section] |= values
    run.config.write_text(yaml.safe_dump(data))
    return run


def test_checking_a_good_configuration_says_so(tmp_path: Path) -> None:
    assert ended(started(configured(tmp_path), "--check"))[0] == Exit.OK


@pytest.mark.parametrize(
    ("section", "values", "said"),
    [
        ("trainer", {"polcy_lr": 1}, "polcy_lr"),
        ("trainer", {"policy_lr": "much"}, "policy_lr"),
        ("trainer", {"sequence_parallel_size": 2}, "trainer.sequence_parallel_size=1"),
        ("data", {"train": "/absent.parquet"}, "data.train=/absent.parquet is no file"),
        ("model", {"path": "/absent"}, "holds no config.json"),
        ("model", {"path": "builtin:huge"}, "builtin:tiny"),
        ("rollout", {"tensor_parallel_size": 2}, "rollout.tensor_parallel_size=2"),
    ],
)
def test_checking_names_what_is_wrong(
    tmp_path: Path, section: str, values: dict[str, Any], said: str
) -> None:
    code, text = ended(started(configured(tmp_path, **{section: values}), "--check"))
    assert code == Exit.USAGE and said in text and "Traceback" not in text


def test_a_directory_that_is_no_run_is_refused(tmp_path: Path) -> None:
    code, text = ended(started(RunDirectory(tmp_path)))
    assert code == Exit.NO_INPUT and "config.yaml" in text


def test_help_and_check_import_nothing_heavy(tmp_path: Path) -> None:
    run = configured(tmp_path)
    code = (
        "import sys, trainer.__main__ as m\n"
        f"assert m.main(['--run-dir', {str(run.root)!r}, '--check']) == 0\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_problems_of_a_default_configuration_are_none(tmp_path: Path) -> None:
    assert problems(small_config(tmp_path)) == []


@pytest.fixture(scope="module")
def lives(tmp_path_factory: pytest.TempPathFactory) -> Lives:
    """How trainers without a runtime end, all at once to save time: exit code, output, summary."""
    found, running = {}, {}
    for name, timeout_s in (("alone", 1), ("USR2", 100)):
        run = configured(tmp_path_factory.mktemp(name), runtime={"ready_timeout": timeout_s})
        running[name] = (run, started(run))
    run, process = running["USR2"]
    events = run.events_of("training", "trainer").path
    wait_for(lambda: True if b"assembled" in read_bytes(events) else None, "the trainer", 90)
    process.send_signal(signal.SIGUSR2)
    for name, (run, process) in running.items():
        found[name] = (*ended(process), json.loads(run.summary.read_text()))
    return found


@pytest.mark.slow
def test_no_runtime_is_said_and_has_its_own_exit_code(lives: Lives) -> None:
    code, text, summary = lives["alone"]
    assert code == Exit.PEER_GONE and "no runtime server" in text
    assert "no runtime server" in summary["reason"] and summary["metrics"]["steps"] == 0


@pytest.mark.slow
def test_a_signal_while_it_waits_for_the_runtime_ends_it_at_once(lives: Lives) -> None:
    code, _, summary = lives["USR2"]
    assert code == Exit.REQUEUE and "checkpoint" in summary["reason"]


def test_a_run_directory_may_come_from_the_environment(tmp_path: Path) -> None:
    run = configured(tmp_path)
    command = [sys.executable, "-m", "trainer", "--check"]
    environment = os.environ | {Env.RUN_DIR.value: str(run.root)}
    assert subprocess.run(command, env=environment, capture_output=True, timeout=60).returncode == Exit.OK


def test_a_checkpoint_is_wanted_when_this_life_is_named_or_its_time_is_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, config = RunDirectory.create(tmp_path), Config()
    monkeypatch.setenv(Env.NONCE, "this")
    assert not checkpoint_wanted(run, config, time.monotonic())
    run.publish(run.checkpoint_request, "an earlier life")
    assert not checkpoint_wanted(run, config, time.monotonic())
    run.publish(run.checkpoint_request, "this")
    assert checkpoint_wanted(run, config, time.monotonic())
    run.publish(run.checkpoint_request, "")
    config.trainer.autoresume_after = 60
    assert not checkpoint_wanted(run, config, time.monotonic())
    assert checkpoint_wanted(run, config, time.monotonic() - 61)
