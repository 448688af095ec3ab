"""Help is instant: little CPU, and nothing heavy is loaded."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.cli import plain_launch
from orchestrator.cli_commands import cli

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


@pytest.mark.parametrize("command", [[], ["launch"], ["status"], ["logs"], ["eval"], ["config", "show"]])
def test_help_loads_nothing_heavy(command: list[str]) -> None:
    code = (
        "import sys\nfrom orchestrator.cli_commands import cli\n"
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


SLOW = HEAVY | {
    *("click", "dataclasses", "inspect", "ast", "importlib.metadata", "concurrent", "logging", "platform"),
    *("uuid", "secrets", "random", "socket", "shutil", "ctypes", "tempfile", "hashlib", "asyncio"),
}
"""What a launch has no need of."""


def test_a_launch_loads_nothing_that_it_does_not_need() -> None:
    code = "import sys; known = set(sys.modules)\nfrom orchestrator import cli, cli_launch\n"
    code += "from orchestrator.schedulers import slurm\nprint(*set(sys.modules) - known)"
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60
    )
    loaded = set(done.stdout.split())
    assert SLOW & (loaded | {name.partition(".")[0] for name in loaded}) == set()


# --- the short way of a plain launch -----------------------------------------------------------------


def by_click(argv: list[str]) -> dict[str, object]:
    with cli.commands["launch"].make_context("launch", argv) as context:
        return context.params


@pytest.mark.parametrize(
    "words",
    [
        ["-c", "dev"],
        ["--config", "dev", "--json"],
        ["a.b=1", "--json", "-c", "../x.yaml", "c.d=[1, 2]", "", "e=-1"],
        ["-c", "dev", "-c", "local", "--json", "--json"],
        ["-c", "dev", "odd"],
    ],
)
def test_a_plain_launch_is_read_as_click_reads_it(words: list[str]) -> None:
    assert plain_launch(["launch", *words]) == by_click(words)


@pytest.mark.parametrize(
    "words",
    [
        *([], ["status"], ["launch"], ["launch", "-h"], ["launch", "--help", "-c", "dev"], ["launch", "-c"]),
        *(["launch", "--config=dev"], ["launch", "-cdev"], ["launch", "-c", "--json"], ["launch", "a=1"]),
        *(["launch", "-c", "dev", word] for word in ("-n", "--dry-run", "-f", "--", "-", "--runtime-only")),
        ["--version", "launch", "-c", "dev"],
    ],
)
def test_whatever_is_not_that_plain_is_left_to_click(words: list[str]) -> None:
    assert plain_launch(words) is None


def orchestrate(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "orchestrator", *words],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("words", [["-c", "nothing-like-it"], ["-c", "local", "no.such.key=1"]])
def test_both_ways_fail_alike(words: list[str]) -> None:
    short, long = orchestrate("launch", *words), orchestrate("launch", *words, "--")
    assert (short.returncode, short.stdout, short.stderr) == (long.returncode, long.stdout, long.stderr)
    assert short.returncode == 2 and short.stderr.startswith("error: ")


def test_a_shell_that_asks_for_words_gets_no_launch() -> None:
    asked = orchestrate("launch", "-c", "dev", "--json", _ORCHESTRATE_COMPLETE="bash_source")
    assert asked.returncode == 0 and "_ORCHESTRATE_COMPLETE=bash_complete" in asked.stdout
