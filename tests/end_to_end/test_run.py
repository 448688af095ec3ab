"""Whole runs with every real part: command line, local scheduler, stubs, server, Podman, vLLM, PPO.

Each ends another way, and each time nothing of the run may be left on the machine, and the run directory
must say what happened.
"""

from __future__ import annotations

import glob
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.contract import JobStatus, Result, RunDirectory, read_json_lines

pytestmark = [pytest.mark.container, pytest.mark.vllm, pytest.mark.alone, pytest.mark.timeout(240)]

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["model.warmstart_steps=2", "rollout.prompts_per_step=1", "runtime.max_parallel_sandboxes=4"]
STATE = ["/dev/shm/orc-*", "/var/tmp/orc-*", "/tmp/orc-*", "/sys/fs/cgroup/**/orc-*"]


class Orchestrate:
    """The command line with a directory of runs of its own."""

    def __init__(self, folder: Path) -> None:
        self.runs = folder / "runs"
        self.before = traces()

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "orchestrator", *words]

    def run(self, *words: str, code: int = 0) -> str:
        done = subprocess.run(
            self.command(*words), cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
        )
        assert done.returncode == code, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def launch(self, *more: str) -> list[str]:
        return ["launch", "--config", "local", *SMALL, f"run.runs_dir={self.runs}", *more]

    def start(self, *more: str) -> subprocess.Popen[str]:
        command = self.command(*self.launch("--follow", *more))
        return subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    @property
    def last(self) -> RunDirectory:
        return RunDirectory(max(p for p in self.runs.iterdir() if p.name[0].isdigit()))

    def result(self) -> Result:
        found = self.last.read(self.last.result, Result)
        assert found is not None, "no result.json"
        return found

    def nothing_left(self) -> None:
        """No process, socket, mount, cgroup or directory outside of the run directory."""
        soon(lambda: not processes(self.runs), f"processes of the run to end: {processes(self.runs)}")
        soon(lambda: traces() <= self.before, f"these to go: {traces() - self.before}")
        assert not list(self.last.root.rglob("*.sock"))


@pytest.fixture
def orchestrate(tmp_path: Path) -> Orchestrate:
    return Orchestrate(tmp_path)


def soon(check: Callable[[], bool], what: str, within_s: float = 60.0) -> None:
    deadline = time.monotonic() + within_s
    while not check():
        assert time.monotonic() < deadline, f"waited {within_s:g} s for {what}"
        time.sleep(0.1)


def processes(runs: Path) -> list[str]:
    """Every process that names these runs in its command line or its environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            words = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
        except OSError:
            continue
        if str(runs).encode() in words:
            found.append(f"{entry.name} {words[:200]!r}")
    return found


def traces() -> set[str]:
    """What a server keeps outside of the run directory."""
    mounts = {line.split()[1] for line in Path("/proc/mounts").read_text().splitlines() if "orc-" in line}
    # glob.glob, not Path.glob: that one fails on a directory that goes while it looks (Python below 3.13).
    return mounts | {path for pattern in STATE for path in glob.glob(pattern, recursive=True)}  # noqa: PTH207


def status(run: RunDirectory, role: str) -> JobStatus:
    found = run.read(run.status(role), JobStatus)
    assert found is not None
    return found


def rows(run: RunDirectory) -> list[dict[str, Any]]:
    return read_json_lines(run.metrics)


def test_a_run_trains_and_leaves_nothing(orchestrate: Orchestrate) -> None:
    said = orchestrate.run(*orchestrate.launch("--follow", "trainer.total_steps=2"))
    run, result = orchestrate.last, orchestrate.result()
    assert result.outcome == "success" and "success" in said and "success rate by step" in said
    wanted = {"step", "success_rate", "reward_mean", "loss_policy", "loss_value", "kl", "mismatch"}
    assert [row["step"] for row in rows(run)] == [0, 1]
    assert wanted | {"tokens_per_s", "time/rollout", "time/update"} <= set(rows(run)[0])
    assert all(row["status/infra"] == 0 and row["mismatch"] < 1e-3 for row in rows(run))
    episodes = read_json_lines(min(run.rollouts.iterdir()))
    assert len(episodes) == 4 and all(e["timings"]["create_s"] > 0 for e in episodes)
    assert list(run.tensorboard.rglob("events.*")) and list(run.checkpoints.iterdir())
    shown = json.loads(orchestrate.run("status", str(run.root), "--json"))
    assert shown["state"] == "success"
    key = run.read_text(run.runtime_api_key)
    for path in run.root.rglob("*"):
        if path.is_file() and path != run.runtime_api_key:
            assert key.encode() not in path.read_bytes(), f"the key is in {path}"
    orchestrate.nothing_left()


def test_ctrl_c_ends_everything(orchestrate: Orchestrate) -> None:
    process = orchestrate.start("trainer.total_steps=1000")
    soon(lambda: orchestrate.runs.is_dir() and bool(rows(orchestrate.last)), "a first step", 120)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=100)
    assert process.returncode == 130
    assert orchestrate.result().outcome == "cancelled"
    orchestrate.nothing_left()


def test_a_killed_server_ends_the_training_too(orchestrate: Orchestrate) -> None:
    process = orchestrate.start("trainer.total_steps=1000", "runtime.max_restarts=0")
    soon(lambda: orchestrate.runs.is_dir() and bool(rows(orchestrate.last)), "a first step", 120)
    events = orchestrate.last.timeline()
    os.kill(next(e.data["pid"] for e in events if e.what == "runtime.server_ready"), signal.SIGKILL)
    process.communicate(timeout=100)
    assert process.returncode != 0
    assert orchestrate.result().outcome == "peer_gone"
    assert "SIGKILL" in status(orchestrate.last, "runtime").reason
    orchestrate.nothing_left()


def test_a_server_alone_and_a_training_that_attaches_to_it(orchestrate: Orchestrate) -> None:
    said = orchestrate.run(*orchestrate.launch("--runtime-only"))
    server = orchestrate.last
    url, key = server.read_text(server.runtime_url), server.runtime_api_key
    assert url in said and "curl" in said
    attach = ["--runtime-url", url, "--runtime-api-key-file"]
    wrong = orchestrate.runs / "wrong-key"
    wrong.write_text("no such key\n")
    refused = subprocess.run(
        orchestrate.command(*orchestrate.launch(*attach, str(wrong))),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert refused.returncode == 2 and "key" in refused.stderr and "no such key" not in refused.stderr
    time.sleep(1)  # the name of a run has its second in it, and `last` goes by name
    orchestrate.run(*orchestrate.launch("--follow", "trainer.total_steps=1", *attach, str(key)))
    assert orchestrate.result().outcome == "success" and orchestrate.last.root != server.root
    orchestrate.run("cancel", str(server.root))
    orchestrate.nothing_left()
