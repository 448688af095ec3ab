"""Checkpoints: everything that a run needs to go on as if it had never stopped.

What it is
    One directory per checkpoint, `step-000040` = 40 steps done:
        policy/                      the policy as Hugging Face saves it: loads into vLLM and transformers
        critic.safetensors           and its optimizer: only where the estimator learns a critic
        policy_optimizer.safetensors, critic_optimizer.safetensors      Adam's moments and step counts
        rng.safetensors              torch's generators
        state.json                   step, data cursor, python's and NumPy's generators, configuration,
                                     and the size of every other file; written last
    `latest` beside them names the newest. No pickle anywhere: reading a checkpoint executes nothing.

How to use it
    store = Checkpoints(run.checkpoints, keep=2)
    store.save(learner, capture(step, sampler.state_dict(), config))
    if (found := store.newest()) is not None:
        progress = restore(found, learner); sampler.load_state_dict(progress.cursor)

What it does not do
    One writer. A checkpoint is written beside, made durable, then renamed: a kill at any instant leaves
    the previous one whole, and `newest` skips a directory whose files are not all there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from orchestrator.durable import fsync_directory, publish_bytes, read_bytes
from trainer.data import Cursor
from trainer.errors import CheckpointError
from trainer.learner import Learner

if TYPE_CHECKING:
    from orchestrator.schema import Config

STATE = "state.json"
LATEST = "latest"
POLICY = "policy"
_SAVING = ".saving-"

# --- small state -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Progress:
    """Where a run stands between two steps, without its weights. `generators` are as `capture` took them."""

    step: int
    cursor: Cursor
    config: dict[str, Any]
    generators: dict[str, Any]
    torch_generators: dict[str, Tensor]

    @property
    def digest(self) -> str:
        """A short name of the configuration."""
        return hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()[:16]


def capture(step: int, cursor: Cursor, config: Config) -> Progress:
    """The present state of all generators, with the step count and the data cursor. Cheap."""
    kind, *rest = random.getstate()
    legacy: Any = np.random.get_state(legacy=False)
    inner = {"key": legacy["state"]["key"].tolist(), "pos": legacy["state"]["pos"]}
    generators = {"python": [kind, list(rest[0]), rest[1]], "numpy": {**legacy, "state": inner}}
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    of_torch = {"cpu": torch.get_rng_state(), **{f"cuda{i}": state for i, state in enumerate(cuda)}}
    return Progress(step, cursor, config.model_dump(mode="json"), generators, of_torch)


def rewind(progress: Progress) -> None:
    """Set all generators to what they were when `progress` was captured."""
    kind, numbers, gauss = progress.generators["python"]
    random.setstate((kind, tuple(numbers), gauss))
    legacy = progress.generators["numpy"]
    inner = {**legacy["state"], "key": np.array(legacy["state"]["key"], dtype=np.uint32)}
    np.random.set_state({**legacy, "state": inner})
    torch.set_rng_state(progress.torch_generators["cpu"])
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if (state := progress.torch_generators.get(f"cuda{i}")) is not None:
            torch.cuda.set_rng_state(state, i)


def changed_keys(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Keys "section.name" whose values differ between two dumped configurations."""
    names = {(section, key) for data in (before, after) for section in data for key in data[section]}
    return sorted(
        f"{section}.{key}"
        for section, key in names
        if before.get(section, {}).get(key) != after.get(section, {}).get(key)
    )


# --- the store ---------------------------------------------------------------------------------------


class Checkpoints:
    """The checkpoints of one run, under `root`; this process is the only writer."""

    def __init__(self, root: Path, keep: int = 2) -> None:
        self.root, self.keep = root, keep

    def path(self, step: int) -> Path:
        return self.root / f"step-{step:06d}"

    def save(self, learner: Learner, progress: Progress) -> Path:
        """Write a checkpoint, point `latest` at it, prune. Raises CheckpointError; nothing is lost."""
        target = self.path(progress.step)
        if self.newest() == target:
            return target
        try:
            publish_directory(target, lambda folder: _write(folder, learner, progress))
            publish_bytes(self.root / LATEST, f"{target.name}\n".encode())
            self.prune()
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{target} could not be written: {error}. The checkpoints before it are intact; "
                "make room, or set trainer.checkpoint_dir"
            ) from error
        return target

    def newest(self) -> Path | None:
        """What `latest` names if it is whole, else the newest one that is; None without any."""
        named = read_bytes(self.root / LATEST).decode(errors="replace").strip()
        first = [path for path in self.all() if path.name == named]
        return next(filter(is_whole, [*first, *reversed(self.all())]), None)

    def all(self) -> list[Path]:
        """Every checkpoint, whole or not, oldest first."""
        numbered = [path for path in self.root.glob("step-*") if path.name.rpartition("-")[2].isdigit()]
        return sorted(numbered, key=lambda path: int(path.name.rpartition("-")[2]))

    def prune(self) -> None:
        """Remove all but `keep` up to the newest, and what a killed save left behind.

        Later ones, of a line that was given up by going back, are nobody's but the user's to remove.
        """
        whole, newest = self.all(), self.newest()
        line = whole[: whole.index(newest) + 1] if newest else []
        for path in [*line[: -self.keep], *self.root.glob(f"{_SAVING}*")]:
            shutil.rmtree(path, ignore_errors=True)


def publish_directory(target: Path, write: Callable[[Path], None]) -> None:
    """Fill a directory beside `target`, make all of it durable, and rename it into place. Raises OSError."""
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.parent / f"{_SAVING}{target.name}.{secrets.token_hex(4)}"
    beside.mkdir()
    try:
        write(beside)
        _make_durable(beside)
        if target.exists():  # steps that are done again after an older checkpoint was chosen
            target.rename(target.parent / f"{_SAVING}{target.name}.old.{secrets.token_hex(4)}")
        beside.rename(target)
    except BaseException:  # an interrupt too: no half-written checkpoint stays
        shutil.rmtree(beside, ignore_errors=True)
        raise
    fsync_directory(target.parent)


def is_whole(checkpoint: Path) -> bool:
    """True when the last file was written and every file has the size that it says."""
    try:
        sizes = json.loads((checkpoint / STATE).read_text())["sizes"]
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _make_durable(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        if path.is_dir():
            fsync_directory(path)
            continue
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# --- one checkpoint ----------------------------------------------------------------------------------


def _write(folder: Path, learner: Learner, progress: Progress) -> None:
    save_model(learner.policy, folder / POLICY)
    if learner.critic is not None:
        save_file(_tensors(learner.critic.state_dict()), folder / "critic.safetensors")
    for name, optimizer in _optimizers(learner).items():
        save_file(_optimizer_tensors(optimizer), folder / f"{name}.safetensors")
    save_file(progress.torch_generators, folder / "rng.safetensors")
    data = asdict(replace(progress, torch_generators={})) | {"digest": progress.digest}
    del data["torch_generators"]
    files = [path for path in folder.rglob("*") if path.is_file()]
    data["sizes"] = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    (folder / STATE).write_text(json.dumps(data))


def read_progress(checkpoint: Path) -> Progress:
    """The small state of a checkpoint. Raises CheckpointError."""
    with _explained(checkpoint):
        data = json.loads((checkpoint / STATE).read_text())
        names = ("step", "cursor", "config", "generators")
        return Progress(
            **{name: data[name] for name in names},
            torch_generators=load_file(checkpoint / "rng.safetensors"),
        )


def restore(checkpoint: Path, learner: Learner) -> Progress:
    """Load weights and moments into `learner`, in place, and rewind the generators. Raises CheckpointError.

    Learning rates and the like come from the present configuration, not from the checkpoint.
    """
    progress = read_progress(checkpoint)
    with _explained(checkpoint):
        load_weights(learner.policy, checkpoint / POLICY)
        if learner.critic is not None:
            learner.critic.load_state_dict(load_file(checkpoint / "critic.safetensors"))
        for name, optimizer in _optimizers(learner).items():
            _load_optimizer(optimizer, load_file(checkpoint / f"{name}.safetensors"))
    rewind(progress)
    return progress


def save_model(model: nn.Module, folder: Path) -> None:
    """As Hugging Face saves it: config.json and safetensors, readable by vLLM."""
    model.save_pretrained(folder)  # type: ignore[operator]  # a transformers model has it


def load_weights(model: nn.Module, folder: Path) -> None:
    """Weights of a saved model into a live one; tied ones are stored once."""
    found = {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}
    report = model.load_state_dict(found, strict=False)
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tied -= {name for name, _ in model.named_parameters()}
    if report.unexpected_keys or set(report.missing_keys) - tied:
        raise KeyError(f"weights do not fit: {report.unexpected_keys + report.missing_keys}")


@contextlib.contextmanager
def _explained(checkpoint: Path) -> Any:
    """Whatever is wrong with the files of a checkpoint, as one kind of error that says what to do."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"{checkpoint} cannot be used: {error}. It may belong to another model; "
            "set trainer.resume=never, or write an older one's name into `latest` beside it"
        ) from error


def _optimizers(learner: Learner) -> dict[str, Optimizer]:
    found = {"policy_optimizer": learner.policy_optimizer}
    if learner.critic_optimizer is not None:
        found["critic_optimizer"] = learner.critic_optimizer
    return found


def _tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def _optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """`NUMBER.NAME` → tensor, numbered in the order of the parameters; empty before the first step."""
    state = optimizer.state_dict()["state"]
    return _tensors({f"{i}.{name}": x for i, inner in state.items() for name, x in inner.items()})


def _load_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
