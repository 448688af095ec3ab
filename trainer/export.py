"""A trained policy as a Hugging Face directory: what transformers and a stock vLLM load.

What it is
    A checkpoint's `policy/` with the tokenizer and chat template of the model that training began with, and
    `training.json`, which says where it comes from. Weights are those of the checkpoint, adapters merged, in
    float32 or as asked for. Published at once: a directory that is there is whole.

How to use it
    orchestrate export RUN --out DIR [--checkpoint best|latest|STEP] [--dtype bfloat16]
    python -m trainer.export RUN_DIRECTORY --out DIR

What it does not do
    It moves nothing of optimiser, critic or reference, and replaces no directory that exists.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from orchestrator.checkpoints import POLICY, NoCheckpoint, choose, folder_of
from orchestrator.contract import Exit, RunDirectory
from orchestrator.schema import Config
from trainer.checkpoint import publish_directory, read_progress
from trainer.errors import CheckpointError, TrainerError

TEXT_FILES = ("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "*.model", "*.jinja")
"""What lies beside a model's weights and says how text becomes ids."""
DTYPES = ("float32", "bfloat16", "float16")


def export(run: RunDirectory, out: Path, which: str = "best", dtype: str = "float32") -> Path:
    """Write the policy of one of a run's checkpoints to `out`; returns the checkpoint.

    `which` is `best` (by validation; the newest where nothing was validated), `latest` or a step. Raises
    CheckpointError when there is no such checkpoint, or `out` exists or cannot be written.
    """
    if out.exists():
        raise CheckpointError(f"{out} exists already: choose another directory, or remove it")
    checkpoint = find(run, which)
    config = Config.model_validate(read_progress(checkpoint).config)

    def write(folder: Path) -> None:
        shutil.copytree(checkpoint / POLICY, folder, dirs_exist_ok=True)
        if dtype != "float32":
            cast(folder, dtype)
        add_text(folder, config.model.path)
        told = {"run": run.run_id, "checkpoint": checkpoint.name, "model": config.model.path, "dtype": dtype}
        (folder / "training.json").write_text(json.dumps(told, indent=1) + "\n")

    try:
        publish_directory(out, write)
    except OSError as error:
        raise CheckpointError(f"{out} could not be written: {error}. Make room, or choose another") from error
    return checkpoint


def find(run: RunDirectory, which: str) -> Path:
    """The checkpoint that is meant."""
    try:
        return choose(folder_of(run), which, run.run_id)
    except NoCheckpoint as error:
        raise CheckpointError(str(error)) from error


def cast(folder: Path, dtype: str) -> None:
    """Weights, and what config.json says of them, in another number type."""
    import torch
    from safetensors.torch import load_file, save_file

    wanted = getattr(torch, dtype)
    for path in folder.glob("*.safetensors"):
        tensors = {name: tensor.to(wanted) for name, tensor in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"dtype": dtype}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def add_text(folder: Path, model: str) -> None:
    """The tokenizer of the model that training began with."""
    from trainer.model import find_model
    from trainer.preflight import TINY

    if model == TINY:
        byte_tokenizer().save_pretrained(folder)
        return
    origin = find_model(model)
    for path in sorted(path for pattern in TEXT_FILES for path in origin.glob(pattern)):
        shutil.copy(path, folder / path.name)


def byte_tokenizer() -> Any:
    """The built-in model's tokenizer as transformers has them: an id for each byte, <eos> and <pad>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    from trainer.model import EOS, PAD

    letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
    inner = Tokenizer(models.BPE(vocab=letters | {"<eos>": EOS, "<pad>": PAD}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>")  # noqa: S106


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.export", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("run", type=Path, help="the run directory")
    parser.add_argument("--out", type=Path, required=True, help="a directory that does not exist yet")
    parser.add_argument("--checkpoint", default="best", help="best, latest or a step (default: best)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    given = parser.parse_args(arguments)
    try:
        checkpoint = export(RunDirectory(given.run), given.out, given.checkpoint, given.dtype)
    except TrainerError as error:
        print(f"error: {error}", file=sys.stderr)
        return Exit.USAGE
    print(f"{checkpoint.name} of {given.run.name} → {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
