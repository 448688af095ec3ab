"""The set-up of a checkout, with stand-ins for the interpreter and what it would install: one at a time."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = """#!/bin/sh
# An interpreter that makes an environment of itself; its pip takes a second and says when.
case "$*" in
    *venv*.venv) mkdir -p .venv/bin; cp "$0" .venv/bin/python; cp "$0" .venv/bin/pip ;;
    install*) echo begin >> pip.log; sleep 1; echo end >> pip.log ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    if shutil.which("flock") is None or shutil.which("podman") is None:
        pytest.skip("tools/setup itself needs flock and podman")
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools/setup", tmp_path / "tools/setup")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    return tmp_path


def begin(checkout: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "ORCHESTRATE_PYTHON": str(checkout / "python"), "ORCHESTRATE_VLLM": "none"}
    return subprocess.Popen(
        ["tools/setup"], cwd=checkout, env=environment, text=True, stdout=subprocess.PIPE, process_group=0
    )


def wait_for(file: Path) -> None:
    until = time.monotonic() + 30
    while not file.exists():
        assert time.monotonic() < until, f"no {file}"
        time.sleep(0.01)


def test_a_second_one_waits_and_finds_everything_there(checkout: Path) -> None:
    first = begin(checkout)
    wait_for(checkout / "pip.log")
    second = begin(checkout)
    told = second.communicate(timeout=60)[0]
    assert (first.wait(60), second.returncode) == (0, 0)
    assert "another set-up of this checkout is at work" in told
    assert (checkout / "pip.log").read_text() == "begin\nend\n"
    first.communicate()


def test_of_one_that_was_killed_only_the_step_that_goes_on_is_waited_for(checkout: Path) -> None:
    first = begin(checkout)
    wait_for(checkout / "pip.log")
    first.kill()
    second = begin(checkout)
    second.communicate(timeout=60)
    first.communicate(timeout=60)
    assert second.returncode == 0
    assert (checkout / "pip.log").read_text() == "begin\nend\n"
