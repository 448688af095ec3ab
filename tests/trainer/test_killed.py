"""`kill -9` of the trainer's process between checkpoints changes nothing that the run learns.

Every part is the real one: `python -m trainer`, a sandbox server, containers, the deterministic engine.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from rollout_kit import Server
from training_kit import new_run, small_config

from orchestrator.contract import Env, RunDirectory, read_json_lines, wait_for
from trainer.tasks import Task, Verify, write_tasks

pytestmark = [pytest.mark.container, pytest.mark.slow, pytest.mark.timeout(400)]
STEPS, SAVE_EVERY = 6, 3
LOSSES = ("loss_policy", "loss_value", "kl", "entropy", "grad_norm_policy")


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.stop()


def configured(folder: Path) -> RunDirectory:
    """A run whose rewards differ from task to task, so that there is something to learn."""
    # Saved at once: the test says from which checkpoint a life goes on, whatever the disk's pace.
    config = small_config(folder, total_steps=STEPS, save_every=SAVE_EVERY, async_save=False)
    write_tasks(
        Path(config.data.train), [Task(f"t{n}", f"{n} $ ", Verify(f"test {n % 2} = 1")) for n in range(4)]
    )
    run = new_run(folder)
    run.config.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return run


def started(run: RunDirectory, server: Server) -> subprocess.Popen[bytes]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("ORCHESTRATE_")}
    known = {Env.RUNTIME_URL: server.address.url, Env.RUNTIME_API_KEY_FILE: str(server.key_file)}
    with (run.root / "said").open("ab") as said:
        return subprocess.Popen(
            [sys.executable, "-m", "trainer", "--run-dir", str(run.root)],
            stdout=said,
            stderr=said,
            env={**inherited, **known},
        )


def killed_at(run: RunDirectory, server: Server, count: int) -> list[dict[str, Any]]:
    """Kill a life of the trainer as soon as there are so many rows; returns the rows that it leaves."""
    process = started(run, server)
    try:
        wait_for(
            lambda: len(rows(run)) >= count or process.poll() is not None or None,
            f"{count} rows",
            120,
            longest_s=0.02,
        )
    finally:
        process.kill()
    assert process.wait(10) == -signal.SIGKILL, (run.root / "said").read_text()
    return rows(run)


def rows(run: RunDirectory) -> list[dict[str, Any]]:
    """What was logged of every step, without what the clock says."""
    found = read_json_lines(run.metrics)
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "tokens_per_s"))} for row in found]


def test_killed_twice_and_yet_the_same_losses_to_the_last_bit(tmp_path: Path, server: Server) -> None:
    """The first time before there is any checkpoint, the second time two steps after one."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole, run = configured(tmp_path / "whole"), configured(tmp_path / "killed")
    assert started(whole, server).wait(200) == 0, (whole.root / "said").read_text()
    expected = rows(whole)
    assert [row["step"] for row in expected] == list(range(STEPS))
    assert all(expected[-1][name] for name in LOSSES) and 0 < expected[-1]["reward_mean"] < 1

    lost = [killed_at(run, server, 2), killed_at(run, server, SAVE_EVERY + 2)]
    assert started(run, server).wait(200) == 0, (run.root / "said").read_text()
    assert [event.data["step"] for event in run.timeline() if event.what == "training.resumed"] == [
        SAVE_EVERY
    ]
    assert rows(run) == expected
    for left in lost:  # also what was done in vain, and done again
        assert left == expected[: len(left)]
