"""What the orchestrator's tests share: a scheduler in memory, and a user without settings of their own."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from orchestrator.config import load
from orchestrator.launch import Request
from orchestrator.schedulers import JobInfo, JobSpec, JobState, SchedulerError


@dataclass
class MemoryScheduler:
    """A whole scheduler without processes: jobs change state when a test says so.

    `script` is called before each query with the number of queries so far; it plays the cluster.
    """

    name: str = "local"
    jobs: dict[str, JobInfo] = field(default_factory=dict)
    specs: dict[str, JobSpec] = field(default_factory=dict)
    refuses: str = ""  # role that submit refuses
    loses_answer: str = ""  # role whose job is made although submit fails
    script: Callable[[int], None] = lambda _: None
    deaf: bool = False  # cancel is accepted, and nothing ends
    queries: int = 0
    _ids: itertools.count[int] = field(default_factory=lambda: itertools.count(101))

    def submit(self, spec: JobSpec) -> str:
        if spec.role == self.refuses:
            raise SchedulerError("invalid partition")
        job_id = str(next(self._ids))
        self.specs[job_id] = spec
        self.jobs[job_id] = JobInfo(job_id, JobState.HELD if spec.held else JobState.PENDING)
        if spec.role == self.loses_answer:
            raise SchedulerError("socket timed out")
        return job_id

    def set(self, role: str, state: JobState, exit_code: int | None = None) -> None:
        for job_id, spec in self.specs.items():
            if spec.role == role:
                self.jobs[job_id] = replace(self.jobs[job_id], state=state, exit_code=exit_code)

    def release(self, job_id: str) -> None:
        self.jobs[job_id] = replace(self.jobs[job_id], state=JobState.PENDING)

    def query(self, job_ids: Sequence[str]) -> dict[str, JobInfo]:
        self.queries += 1
        self.script(self.queries)
        return {i: self.jobs.get(i, JobInfo(i, JobState.GONE)) for i in job_ids}

    def cancel(self, job_ids: Sequence[str]) -> None:
        for job_id in () if self.deaf else job_ids:
            self.jobs[job_id] = replace(self.jobs[job_id], state=JobState.ENDED, exit_code=143)

    def signal(self, job_id: str, name: str) -> None:
        self.jobs[job_id] = replace(self.jobs[job_id], raw=name)

    def requeue(self, job_id: str) -> None:
        self.jobs[job_id] = replace(self.jobs[job_id], state=JobState.PENDING)

    def find(self, token: str) -> str | None:
        return next((i for i, spec in self.specs.items() if spec.token == token), None)


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
