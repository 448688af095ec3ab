"""Help is instant: little CPU, and nothing heavy is loaded."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

HEAVY = {"torch", "vllm", "transformers", "fastapi", "pydantic", "rich", "httpx", "yaml", "numpy"}


def _cpu_seconds() -> float:
    before = os.times()
    subprocess.run(
        [sys.executable, "-m", "orchestrator", "--help"], check=True, capture_output=True, timeout=60
    )
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def test_help_takes_less_than_150_ms_of_cpu() -> None:
    assert statistics.median(_cpu_seconds() for _ in range(5)) <= 0.15


@pytest.mark.parametrize("command", [[], ["launch"], ["status"], ["logs"], ["config", "show"]])
def test_help_loads_nothing_heavy(command: list[str]) -> None:
    code = (
        "import sys\nfrom orchestrator.cli import cli\n"
        f"try: cli({[*command, '--help']!r})\nexcept SystemExit: pass\n"
        "print(*{m.partition('.')[0] for m in sys.modules}, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60
    )
    assert "Usage:" in done.stdout
    assert HEAVY & set(done.stderr.split()) == set()


def test_an_installed_wheel_finds_its_data(tmp_path: Path) -> None:
    """The layout of a wheel: the package with `data/` in it, and no checkout around it."""
    shutil.copytree(
        ROOT / "orchestrator", tmp_path / "orchestrator", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("config", "jobs"):
        shutil.copytree(ROOT / name, tmp_path / "orchestrator" / "data" / name)
    command = [sys.executable, "-P", "-m", "orchestrator", "launch", "-c", "local", "--dry-run"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=60, cwd=tmp_path, env=environment
    )
    assert f"exec bash {tmp_path}/orchestrator/data/jobs/runtime.sh" in done.stdout


SLOW = HEAVY - {"yaml"} | {
    "importlib.metadata",
    "concurrent",
    "logging",
    "platform",
    "uuid",
    "secrets",
    "ast",
}
"""What a launch has no need of; click itself loads uuid and, with inspect, ast."""


def test_a_launch_loads_nothing_that_it_does_not_need() -> None:
    code = "import sys, click; known = set(sys.modules)\nfrom orchestrator import cli, cli_launch\n"
    code += "from orchestrator.schedulers import slurm\nprint(*set(sys.modules) - known)"
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60
    )
    loaded = set(done.stdout.split())
    assert SLOW & (loaded | {name.partition(".")[0] for name in loaded}) == set()
