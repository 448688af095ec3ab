"""An exported policy is the trained one, loads in stock transformers, and text becomes the same ids."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
import torch
from training_kit import job_of, new_run, small_config

from orchestrator.contract import RunDirectory
from trainer.errors import CheckpointError
from trainer.export import export, main
from trainer.model import ByteTokenizer
from trainer.train import Training, train

Done = tuple[RunDirectory, Training]
TEXT = bytes(range(256)).decode("latin-1") + " naïve ✓ 日本"


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("export")
    run = new_run(folder)
    job = job_of(run, small_config(folder, total_steps=3, save_every=1, async_save=False))

    async def work() -> None:
        await train(job)
        await job.engine.close()

    asyncio.run(work())
    return run, job


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(60, 90)[None]).logits
    return found


def test_it_is_the_policy_that_was_trained(done: Done, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, job = done
    checkpoint = export(run, tmp_path / "out")
    assert checkpoint.name == "step-000003"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(logits(model), logits(job.learner.policy))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.encode(TEXT) == ByteTokenizer().encode(TEXT)
    assert (
        tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
        and tokenizer.eos_token_id == model.config.eos_token_id
    )
    assert json.loads((tmp_path / "out" / "training.json").read_text())["run"] == run.run_id


def test_an_earlier_step_in_half_precision(done: Done, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    run, job = done
    assert export(run, tmp_path / "out", "2", "bfloat16").name == "step-000002"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert next(model.parameters()).dtype == torch.bfloat16
    assert not torch.equal(logits(model.float()), logits(job.learner.policy))


def test_what_is_not_there_is_said_and_what_is_there_stays(
    done: Done, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = done
    with pytest.raises(CheckpointError, match="there are step-000002, step-000003; say best"):
        export(run, tmp_path / "out", "7")
    (tmp_path / "out").mkdir()
    assert main([str(run.root), "--out", str(tmp_path / "out")]) == 64
    assert "exists already" in capsys.readouterr().err and not list((tmp_path / "out").iterdir())
