"""Checkpoints: exact, durable against a kill at any instant, and harmless to read."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_kit import made_episodes, small_learner

from orchestrator.schema import Config
from trainer.batch import Batch, divide
from trainer.checkpoint import Checkpoints, Progress, capture, changed_keys, is_whole, restore, rewind
from trainer.data import Cursor
from trainer.errors import CheckpointError
from trainer.learner import Learner

CURSOR: Cursor = {"epoch": 1, "position": 2, "size": 4, "seed": 0}


def progress(step: int) -> Progress:
    return capture(step, CURSOR, Config())


def moved(learner: Learner) -> Learner:
    """After one real step, so that Adam has something to remember."""
    batch = Batch.of(made_episodes())
    division = divide(batch.lengths, 2, 1000)
    learner.prepare(batch, division)
    learner.update(batch, division, train_policy=True)
    return learner


@pytest.fixture(scope="module")
def learner() -> Learner:
    return moved(small_learner())


def everything(learner: Learner) -> list[torch.Tensor]:
    weights = [*learner.policy.state_dict().values(), *learner.critic.state_dict().values()]
    states = [o.state_dict()["state"] for o in (learner.policy_optimizer, learner.critic_optimizer)]
    return weights + [
        x for state in states for _, inner in sorted(state.items()) for _, x in sorted(inner.items())
    ]


def draw() -> list[Any]:
    return [random.random(), float(np.random.rand()), float(np.random.normal()), torch.rand(3).tolist()]


def test_what_is_restored_is_the_same_bit_for_bit(tmp_path: Path, learner: Learner) -> None:
    store = Checkpoints(tmp_path / "deep" / "checkpoints")
    random.gauss(0, 1)  # leaves a second number waiting inside the generator
    np.random.normal()
    path = store.save(learner, progress(3))
    expected = draw()
    other = small_learner(seed=1)
    found = restore(path, other)
    assert (found.step, found.cursor) == (3, CURSOR)
    assert draw() == expected
    pairs = zip(everything(learner), everything(other), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert other.policy_optimizer.state_dict()["state"][0]["step"] == 2


def test_a_restored_learner_takes_the_same_next_step(tmp_path: Path) -> None:
    first, second = moved(small_learner()), small_learner(seed=1)
    path = Checkpoints(tmp_path).save(first, progress(1))
    moved(first)
    restore(path, second)
    moved(second)
    assert all(torch.equal(a, b) for a, b in zip(everything(first), everything(second), strict=True))


def test_generators_can_be_rewound_without_a_file() -> None:
    before = progress(0)
    expected = draw()
    rewind(before)
    assert draw() == expected


def test_before_the_first_step_there_is_nothing_of_adam(tmp_path: Path) -> None:
    path = Checkpoints(tmp_path).save(small_learner(), progress(0))
    other = small_learner(seed=2)
    restore(path, other)
    assert other.policy_optimizer.state_dict()["state"] == {}


def test_the_learning_rate_is_the_present_configurations(tmp_path: Path, learner: Learner) -> None:
    path = Checkpoints(tmp_path).save(learner, progress(1))
    other = small_learner()
    other.policy_optimizer.param_groups[0]["lr"] = 0.125
    restore(path, other)
    assert other.policy_optimizer.param_groups[0]["lr"] == 0.125


def test_latest_names_the_newest_and_old_ones_are_pruned(tmp_path: Path, learner: Learner) -> None:
    store = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3, 10):
        store.save(learner, progress(step))
    assert [path.name for path in store.all()] == ["step-000003", "step-000010"]
    assert (tmp_path / "latest").read_text() == "step-000010\n"
    assert store.newest() == store.path(10)


def test_going_back_to_an_older_one_is_a_line_in_latest(tmp_path: Path, learner: Learner) -> None:
    store = Checkpoints(tmp_path, keep=3)
    for step in (1, 2, 3):
        store.save(learner, progress(step))
    (tmp_path / "latest").write_text("step-000001\n")
    assert store.newest() == store.path(1)
    store.save(learner, progress(2))  # done again: replaces the one that was there
    assert store.newest() == store.path(2) and store.path(3).is_dir()


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, learner: Learner) -> None:
    store = Checkpoints(tmp_path, keep=5)
    for step in (1, 2, 3):
        store.save(learner, progress(step))
    (state,) = (store.path(3) / "state").iterdir()
    state.write_bytes(state.read_bytes()[:-1])
    (store.path(2) / "state.json").write_text("{")
    assert not is_whole(store.path(3)) and not is_whole(store.path(2))
    assert store.newest() == store.path(1)
    (store.path(1) / "policy" / "model.safetensors").unlink()
    assert store.newest() is None


@pytest.fixture(params=["", "background"])
def saver(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Callable[..., str]]:
    """Write a line, read a line, of `saver.py`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # it forks
    command = [sys.executable, str(Path(__file__).with_name("saver.py")), str(tmp_path), request.param]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        to, back = process.stdin, process.stdout

        def ask(line: int | str = "") -> str:
            if line != "":
                print(line, file=to, flush=True)
            return back.readline()

        yield ask
        process.kill()


@pytest.mark.slow
def test_a_kill_at_any_instant_of_saving_leaves_the_previous_one(
    tmp_path: Path, learner: Learner, saver: Callable[..., str]
) -> None:
    store, draw_pause, step = Checkpoints(tmp_path, keep=2), random.Random(4), 0
    for _ in range(10):
        pid = int(saver(step))
        assert int(saver()) > step  # one is finished, and it is in the middle of another
        time.sleep(draw_pause.uniform(0.0, 0.03))  # the instant of the kill is the point of this test
        os.kill(pid, signal.SIGKILL)
        while (said := saver()).strip().isdigit():
            pass
        assert said.split() == ["killed", "by", "-9"]
        newest = store.newest()
        assert newest is not None and is_whole(newest)
        found = restore(newest, small_learner(seed=3)).step
        assert found > step
        step = found
    store.save(learner, progress(step + 1))
    assert not list(tmp_path.glob(".saving-*")), "left-overs of killed saves stay for ever"


@pytest.mark.parametrize("room", [1000, 200_000, 1_500_000])
def test_a_disk_that_is_full_loses_nothing(tmp_path: Path, learner: Learner, room: int) -> None:
    store = Checkpoints(tmp_path)
    store.save(learner, progress(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))  # no file may be larger: as good as full
    try:
        with pytest.raises(CheckpointError, match="checkpoints before it are intact"):
            store.save(learner, progress(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert store.newest() == store.path(1) and store.all() == [store.path(1)]


def test_nothing_in_a_checkpoint_needs_unpickling(tmp_path: Path, learner: Learner) -> None:
    path = Checkpoints(tmp_path).save(learner, progress(1))
    endings = {file.suffix for file in path.rglob("*") if file.is_file()}
    assert endings == {".json", ".safetensors"}


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, learner: Learner) -> None:
    path = Checkpoints(tmp_path).save(learner, progress(1))
    other = small_learner()
    other.critic.head = torch.nn.Linear(3, 1)
    with pytest.raises(CheckpointError, match="cannot be used"):
        restore(path, other)
    state = json.loads((path / "state.json").read_text())
    del state["cursor"]
    (path / "state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match="cursor"):
        restore(path, small_learner())


def test_the_configuration_is_named_by_a_digest_and_changes_by_key() -> None:
    first, second = progress(0), progress(5)
    assert first.digest == second.digest and len(first.digest) == 16
    config = Config()
    config.trainer.policy_lr = 0.5
    changed = capture(0, CURSOR, config)
    assert changed.digest != first.digest
    assert changed_keys(first.config, changed.config) == ["trainer.policy_lr"]
