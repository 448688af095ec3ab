"""A scheduler in memory, for tests of what surrounds a scheduler."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from orchestrator.schedulers import OVER, JobInfo, JobSpec, JobState, OwnJob, SchedulerError


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

    def query(self, job_ids: Sequence[str], *, fresh: bool = False) -> dict[str, JobInfo]:
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

    def mine(self) -> list[OwnJob]:
        return [
            OwnJob(self.jobs[i], spec.run_dir.name, spec.role, spec.token, str(spec.run_dir))
            for i, spec in self.specs.items()
            if self.jobs[i].state not in OVER
        ]
