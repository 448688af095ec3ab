"""What a job asks its scheduler about itself, from inside: will it live again, and where may it run?

What it is
    `Inside` has the questions and requests that only make sense within a running job; `open_inside` finds
    the class for a scheduler. They come when the job has seconds left, so each has little patience.

How to use it
    inside = open_inside(scheduler); inside.returns(job_id, restarts=0)

What it does not do
    It submits, cancels and queries no other job (`Scheduler` does).
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from typing import Protocol

from orchestrator.schedulers import QUEUED, JobState, Scheduler
from orchestrator.schedulers.local import LocalScheduler
from orchestrator.schedulers.slurm import SlurmScheduler
from orchestrator.schedulers.slurm_commands import Commands, job_details
from orchestrator.schedulers.slurm_text import base, state_of

ASK_S = 6.0
"""The longest wait for one answer: after TERM a job has 30 s."""


class Inside(Protocol):
    """Questions of a running job about itself."""

    def returns(self, job_id: str, restarts: int) -> bool | None:
        """Whether this life, the one after so many restarts, has another one coming: the job is being
        requeued, or tasks of its array are still to come. None without an answer."""
        ...

    def preempted(self, job_id: str) -> bool:
        """Whether the job runs on borrowed time: it was preempted, and is not being ended yet."""
        ...

    def cancel_pending(self, job_id: str) -> None:
        """Cancel the tasks of this task's array that have not started."""
        ...

    def hosts(self) -> list[str]:
        """Names of the nodes of this job, the batch script's own first."""
        ...

    def on_every_node(self, nodes: int, cpus: int) -> list[str]:
        """The beginning of a command line that starts the rest of it once on each node of this job."""
        ...

    def one_on_each_node(self, nodes: int, cpus: int) -> list[list[str]]:
        """For each node of this job such a beginning of its own, so that what runs there ends by itself.
        Empty where the rest needs nothing before it: on this node. At most `nodes`."""
        ...


def open_inside(scheduler: Scheduler | None) -> Inside | None:
    if isinstance(scheduler, SlurmScheduler):
        return SlurmInside(scheduler.commands)
    return LocalInside(scheduler) if isinstance(scheduler, LocalScheduler) else None


class LocalInside:
    """A job of the local scheduler: one machine, no arrays."""

    def __init__(self, scheduler: LocalScheduler) -> None:
        self.scheduler = scheduler

    def returns(self, job_id: str, restarts: int) -> bool | None:
        info = self.scheduler.query([job_id])[job_id]
        return info.state == JobState.PENDING or (info.raw == "COMPLETING" and info.reason == "requeued")

    def preempted(self, job_id: str) -> bool:
        return False

    def cancel_pending(self, job_id: str) -> None:
        pass

    def hosts(self) -> list[str]:
        return ["127.0.0.1"]

    def on_every_node(self, nodes: int, cpus: int) -> list[str]:
        return []

    def one_on_each_node(self, nodes: int, cpus: int) -> list[list[str]]:
        """One machine plays them all."""
        return [[] for _ in range(nodes)]


class SlurmInside:
    """A job of Slurm, asked about through the same commands as everything else."""

    def __init__(self, commands: Commands, environ: Mapping[str, str] = os.environ) -> None:
        self.commands, self.environ = commands, environ

    def returns(self, job_id: str, restarts: int) -> bool | None:
        """Measured on 22.05: a job that is being requeued is COMPLETING like a cancelled one, but its
        restarts are counted already while its present life still ends."""
        if "_" in job_id:
            return self._tasks_to_come(job_id)
        said = job_details(self.commands, job_id, ASK_S)
        if not said:
            return None
        if state_of(said.get("JobState", "")) in QUEUED:
            return True
        counted = said.get("Restarts", "")
        return int(counted) > restarts if counted.isdigit() else None

    def _tasks_to_come(self, job_id: str) -> bool | None:
        argv = ["squeue", "-h", "-r", "-t", "PENDING", "-o", "%i", "-j", base(job_id)]
        answer = self.commands.run(argv, timeout=ASK_S)
        return (
            None
            if answer.rc
            else any(line.strip() != job_id for line in answer.out.splitlines() if line.strip())
        )

    def preempted(self, job_id: str) -> bool:
        said = job_details(self.commands, job_id, ASK_S)
        return said.get("JobState") == "RUNNING" and said.get("PreemptTime", "None") not in ("None", "N/A")

    def cancel_pending(self, job_id: str) -> None:
        """By the base id and the state: the id of a task alone would not say the others."""
        if re.fullmatch(r"\d+_\d+", job_id):
            self.commands.run(["scancel", "--state=PENDING", base(job_id)], timeout=ASK_S)

    def hosts(self) -> list[str]:
        nodes = self.environ.get("SLURM_JOB_NODELIST", "")
        answer = self.commands.run(["scontrol", "show", "hostnames", nodes], timeout=ASK_S) if nodes else None
        names = answer.out.split() if answer and answer.rc == 0 else []
        return names or [socket.gethostname()]

    def on_every_node(self, nodes: int, cpus: int) -> list[str]:
        """The memory and the GPUs of the job are the step's, its CPUs are not from 22.05 to 23.02, hence
        the explicit number. One process that fails ends all; one that ends well leaves the others 60 s."""
        if nodes == 1:
            return []
        each = [f"--cpus-per-task={cpus}"] if cpus else []
        fate = ["--kill-on-bad-exit=1", "--wait=60"]
        return ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", *each, *fate]

    def one_on_each_node(self, nodes: int, cpus: int) -> list[list[str]]:
        """What the batch script's node runs needs no step. A step of its own for every other node may fail
        and be started again; it shares what the job has there with whatever is left of the step before, for
        which it would otherwise wait."""
        each = [f"--cpus-per-task={cpus}"] if cpus else []
        alone = ["srun", "--overlap", "--nodes=1", "--ntasks=1", "--ntasks-per-node=1", *each]
        return [[], *([*alone, f"--nodelist={host}"] for host in self.hosts()[1:nodes])]
