"""Checkpoints: everything that a run needs to go on as if it had never stopped.

What it is
    One directory per checkpoint, `step-000040` = 40 steps done:
        policy/                      the policy as Hugging Face saves it: loads into vLLM and transformers
        state/                       critic, adapters, Adam's moments and step counts: a file from each rank,
                                     readable by any number of ranks (`trainer.state_files`)
        rng.safetensors              torch's generators
        state.json                   step, data cursor, python's and NumPy's generators, configuration,
                                     and the size of every other file; written last
    `latest` beside them names the newest, `best` the one with the best validation. No pickle anywhere:
    reading a checkpoint executes nothing.

How to use it
    store = Checkpoints(run.checkpoints, keep=2)
    store.save(learner, capture(step, sampler.state_dict(), config), wait=False); …; store.close()
    if (found := store.newest()) is not None:
        progress = restore(found, learner); sampler.load_state_dict(progress.cursor)

What it does not do
    One training writes. A checkpoint is written beside, made durable, then renamed, and only then does
    `latest` name it: a kill at any instant leaves the previous one whole, and `newest` skips a directory
    whose files are not all there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import random
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from orchestrator.checkpoints import BEST, LATEST, POLICY, STATE, all_in, best_in, newest_in
from orchestrator.checkpoints import is_whole as is_whole
from orchestrator.durable import fsync_directory, publish_bytes
from trainer.data import Cursor
from trainer.errors import CheckpointError
from trainer.learner import Learner
from trainer.ranks import ALONE, Ranks, another_voice
from trainer.state_files import State, copied, learner_state, read_policy, read_state, write_state
from trainer.weights import named_weights, write_model

if TYPE_CHECKING:
    from orchestrator.schema import Config

STATE_FOLDER = "state"
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
    """The checkpoints of one run, under `root`; these ranks together are the only writer."""

    def __init__(self, root: Path, keep: int = 2, keep_best: bool = True, ranks: Ranks = ALONE) -> None:
        """Collective: what is written in the background has a voice of its own."""
        self.root, self.keep, self.keep_best = root, keep, keep_best
        self.timings: dict[str, float] = {}
        """Of the last save: `time/save_stall`, that training waited for it, and `time/save`, all in all."""
        self._ranks, self._voice = ranks, another_voice(ranks)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def path(self, step: int) -> Path:
        return self.root / f"step-{step:06d}"

    def save(
        self,
        learner: Learner,
        progress: Progress,
        score: float | None = None,
        wait: bool = True,
        say: Callable[[Path, float], None] = lambda path, seconds: None,
    ) -> Path:
        """Write a checkpoint, point `latest` at it, prune. Collective.

        With `wait` it lies there when this returns. Without, a copy of the state is written while training
        goes on; the next `save` or `wait` says what came of it. `score` is its validation, more is better.
        `say` is called when it lies there, on rank 0, with the seconds that it took.
        Raises CheckpointError; nothing is lost.
        """
        self.wait()
        start, target = time.perf_counter(), self.path(progress.step)
        if self._ranks.broadcast_object(self._ranks.first and self.newest() == target):
            return target
        keep = (lambda state: state) if wait else copied
        whole, state = _whole(learner.policy, keep, self._ranks), keep(learner_state(learner))
        content = _Content(whole, state, progress, score)
        self._writing = self._thread.submit(self._write, learner.policy, target, content, start, say)
        if wait:
            self.wait()
        self.timings["time/save_stall"] = time.perf_counter() - start
        return target

    def wait(self) -> None:
        """Until nothing is being written. Raises CheckpointError when what was could not be."""
        work, self._writing = self._writing, None
        if work is not None:
            work.result()

    def close(self) -> None:
        """Let what is being written end, whatever comes of it."""
        self._thread.shutdown()

    def newest(self) -> Path | None:
        """What `latest` names if it is whole, else the newest one that is; None without any."""
        return newest_in(self.root)

    def best(self) -> Path | None:
        """The one with the highest score, which `best` names; None without any."""
        return best_in(self.root)

    def all(self) -> list[Path]:
        """Every checkpoint, whole or not, oldest first."""
        return all_in(self.root)

    def prune(self) -> None:
        """Remove all but `keep` up to the newest, but not the best, and what a killed save left behind.

        Later ones, of a line that was given up by going back, are nobody's but the user's to remove.
        """
        whole, newest = self.all(), self.newest()
        line = whole[: whole.index(newest) + 1] if newest else []
        old = [path for path in line[: -self.keep] if not (self.keep_best and path == self.best())]
        for path in [*old, *self.root.glob(f"{_SAVING}*")]:
            shutil.rmtree(path, ignore_errors=True)

    def _write(
        self,
        policy: nn.Module,
        target: Path,
        content: _Content,
        start: float,
        say: Callable[[Path, float], None],
    ) -> None:
        """On every rank, perhaps in the background: all of them fail, or none."""
        trouble = ""
        try:
            beside = self._beside(target)
            write_state(content.state, beside / STATE_FOLDER, self._voice)
            if self._voice.first:
                _write(beside, policy, content)
                _publish(beside, target)
                self._point_at(target, content.score)
                say(target, time.perf_counter() - start)
        except (OSError, SafetensorError) as error:
            trouble = str(error) or type(error).__name__
        self.timings["time/save"] = time.perf_counter() - start
        if troubles := [text for text in self._voice.gather_objects(trouble) if text]:
            if self._voice.first:
                self._clear()
            raise CheckpointError(
                f"{target} could not be written: {troubles[0]}. The checkpoints before it are intact; "
                "make room, or set trainer.checkpoint_dir"
            )

    def _beside(self, target: Path) -> Path:
        """A new folder that all ranks write to. Raises OSError on all of them, or on none."""
        made: Path | str = ""
        if self._voice.first:
            try:
                made = _new_folder(target)
            except OSError as error:
                made = str(error)
        made = self._voice.broadcast_object(made)
        if isinstance(made, str):
            raise OSError(made)
        return made

    def _point_at(self, target: Path, score: float | None) -> None:
        publish_bytes(self.root / LATEST, f"{target.name}\n".encode())
        best = self.best()
        if score is not None and (best is None or score > score_of(best)):
            publish_bytes(self.root / BEST, f"{target.name}\n".encode())
        self.prune()

    def _clear(self) -> None:
        for path in self.root.glob(f"{_SAVING}*"):
            shutil.rmtree(path, ignore_errors=True)


def score_of(checkpoint: Path) -> float:
    """The validation that a checkpoint was saved with; -∞ without."""
    try:
        score = json.loads((checkpoint / STATE).read_text()).get("score")
    except (OSError, ValueError):
        score = None
    return -math.inf if score is None else float(score)


def publish_directory(target: Path, write: Callable[[Path], None]) -> None:
    """Fill a directory beside `target`, make all of it durable, and rename it into place. Raises OSError."""
    beside = _new_folder(target)
    try:
        write(beside)
        _publish(beside, target)
    except BaseException:  # an interrupt too: no half-written checkpoint stays
        shutil.rmtree(beside, ignore_errors=True)
        raise


def _new_folder(target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.parent / f"{_SAVING}{target.name}.{secrets.token_hex(4)}"
    beside.mkdir()
    return beside


def _publish(beside: Path, target: Path) -> None:
    _make_durable(beside)
    if target.exists():  # steps that are done again after an older checkpoint was chosen
        target.rename(target.parent / f"{_SAVING}{target.name}.old.{secrets.token_hex(4)}")
    beside.rename(target)
    fsync_directory(target.parent)


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


@dataclass
class _Content:
    """What is written: the whole policy (on rank 0), this rank's part of the rest, where the run stands."""

    policy: State
    state: State
    progress: Progress
    score: float | None = None


def _whole(policy: nn.Module, keep: Callable[[State], State], ranks: Ranks) -> State:
    """The policy's weights as an export has them, on rank 0; a layer at a time on the others."""
    found: State = {}
    for name, tensor in named_weights(policy):
        if ranks.first:
            found |= keep({name: tensor.detach()}) if ranks.size == 1 else copied({name: tensor.detach()})
    return found


def _write(folder: Path, policy: nn.Module, content: _Content) -> None:
    """All but the state's folder, which the ranks have written."""
    progress = content.progress
    write_model(policy, content.policy, folder / POLICY)
    save_file(progress.torch_generators, folder / "rng.safetensors")
    data = asdict(replace(progress, torch_generators={})) | {
        "digest": progress.digest,
        "score": content.score,
    }
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


def restore(checkpoint: Path, learner: Learner, ranks: Ranks = ALONE) -> Progress:
    """Load weights and moments into `learner`, in place, and rewind the generators. Collective. Raises
    CheckpointError.

    Learning rates and the like come from the present configuration, not from the checkpoint.
    """
    progress = read_progress(checkpoint)
    with _explained(checkpoint):
        read_policy(learner.policy, checkpoint / POLICY, ranks)
        read_state(learner, checkpoint / STATE_FOLDER, ranks)
    rewind(progress)
    return progress


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
