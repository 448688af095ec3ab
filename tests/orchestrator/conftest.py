"""What the orchestrator's tests share: a scheduler in memory, and a user without settings of their own."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from jobkit import HANG, Pair, program
from memory_scheduler import MemoryScheduler
from slurm_fakes import Fakes

from orchestrator.config import load
from orchestrator.launch import Request
from orchestrator.schedulers.slurm import SlurmScheduler
from orchestrator.schedulers.slurm_commands import LocalCommands


@pytest.fixture
def memory() -> MemoryScheduler:
    return MemoryScheduler()


@pytest.fixture(autouse=True)
def no_settings_of_the_user(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """An empty XDG_CONFIG_HOME, and no ORCHESTRATE variables. Returns the folder."""
    for name in [n for n in os.environ if n.startswith("ORCHESTRATE")]:
        monkeypatch.delenv(name)
    folder = tmp_path_factory.mktemp("xdg")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder))
    return folder


@pytest.fixture
def runs_dir(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def request_of(runs_dir: Path) -> Callable[..., Request]:
    """`request_of("training.cpus=3", mode="run")`: a request for the local configuration."""

    def make(*assignments: str, mode: str = "run", config: str = "local") -> Request:
        return Request(load(config, [f"run.runs_dir={runs_dir}", *assignments]), mode)

    return make


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Pair]]:
    """Makes runs of two real jobs, each in a folder of its own, and ends them afterwards."""
    pairs: list[Pair] = []

    def made(body: str = HANG, **options: Any) -> Pair:
        pair = Pair(Path(tempfile.mkdtemp(dir=tmp_path)), trainer=program(body), **options)
        pairs.append(pair)
        return pair

    yield made
    for pair in pairs:
        pair.clean()


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fakes:
    """Slurm's commands as executables, first on PATH, that replay what a test tells them."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    made = Fakes(folder)
    monkeypatch.setenv("PATH", f"{made.bin}:/usr/bin:/bin")
    return made


@pytest.fixture
def slurm(fakes: Fakes) -> SlurmScheduler:
    return SlurmScheduler(LocalCommands(), patience_s=20, timeout_s=20)


@pytest.fixture
def hasty(fakes: Fakes) -> SlurmScheduler:
    """For what fails in the end."""
    return SlurmScheduler(LocalCommands(), patience_s=1.2, timeout_s=20)
