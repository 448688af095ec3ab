"""builtin:smollm2: made once, whole or not at all, with a clear word where there is no package index."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer import smollm2
from trainer.model import find_model, load_tokenizer


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
