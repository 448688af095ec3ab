"""Kills a part of a running run on purpose, and watches whether and how fast it recovers.

What it is
    `find` says which process (or job) a part is, by the run's own records; `strike` kills it; `Watch` looks
    until training has made a step again, or the run is over, or the time is up.

How to use it
    target = find(run, scheduler, "server"); watch = Watch(run, scheduler, target)
    strike(target, scheduler); watch.follow(300).recovered

What it does not do
    It never looks for a process by its name. A process is killed only on this node, and only if its
    environment carries the label of this run; a whole job is killed through its scheduler, wherever it is.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from orchestrator import runs
from orchestrator.contract import Env, JobStatus, ReadyFlag, Role, RunDirectory, read_json_lines
from orchestrator.errors import OrchestrateError
from orchestrator.identity import start_time
from orchestrator.peer import runtime_health
from orchestrator.processes import labels
from orchestrator.schedulers import JobState, Scheduler

PARTS = {
    "server": "the sandbox server",
    "sandbox": "one sandbox (the first process in it)",
    "trainer": "the training command",
    "runtime-wrapper": "the wrapper around the server",
    "training-wrapper": "the wrapper around the trainer",
    "runtime": "the batch shell of the runtime job",
    "training": "the batch shell of the training job",
}
"""What may be killed; the last two go through the scheduler."""
_LOOK_EVERY_S = 0.2


class CannotDrill(OrchestrateError):
    """This part cannot be killed from here, or now; the message says why and what can."""


@dataclass(frozen=True)
class Target:
    """What will be killed: a process of this node, or a job's batch shell."""

    part: str
    about: str
    role: str
    pid: int = 0
    job_id: str = ""


# --- finding -----------------------------------------------------------------------------------------


def find(run: RunDirectory, scheduler: Scheduler, part: str) -> Target:
    """Raises CannotDrill."""
    if part == "launcher":
        raise CannotDrill("a launcher is not needed once it has submitted: there is nothing of it to kill")
    if part not in PARTS:
        raise CannotDrill(f"there is no part {part!r}; choose one of {', '.join(PARTS)}")
    look = runs.view(run, scheduler)
    role = Role.TRAINING.value if part.startswith("train") else Role.RUNTIME.value
    job = next((job for job in look.jobs if job.role == role), None)
    if job is None or job.state != JobState.RUNNING:
        state = job.state if job is not None else "not there"
        raise CannotDrill(
            f"the {role} job of {run.run_id} does not run ({state}); a drill needs a run at work"
        )
    if part in (Role.RUNTIME, Role.TRAINING):
        return Target(part, f"{PARTS[part]} ({job.job_id}) on {job.host or '?'}", role, job_id=job.job_id)
    pid = _pid(run, part, role, job.host)
    return Target(part, f"{PARTS[part]}: process {pid} on {socket.gethostname()}", role, pid)


def _pid(run: RunDirectory, part: str, role: str, host: str) -> int:
    here = socket.gethostname()
    if host != here:
        raise CannotDrill(
            f"the {role} job is on {host} and this is {here}: run the drill there, or kill the whole job "
            f"from here with --kill {role}"
        )
    ours = {pid for pid, root in labels(Env.RUN_DIR).items() if root == str(run.root)}
    found = _candidates(run, part, role, ours)
    if not found:
        raise CannotDrill(f"there is no {PARTS[part]} of {run.run_id} now; try again in a moment")
    return found[-1]


def _candidates(run: RunDirectory, part: str, role: str, ours: set[int]) -> list[int]:
    """Pids that are this part, the youngest last; only processes that carry the label of the run."""
    if part == "sandbox":
        first = [pid for pid in _below(ours) if is_first_of_namespace(_status(pid))]
        return sorted(first, key=start_time)
    status = run.read(run.status(role), JobStatus)
    wrapper = status.pid if status is not None else 0
    if part.endswith("-wrapper"):
        return [wrapper] if wrapper in ours else []
    if part == "server":
        flag = run.read(run.ready_flag, ReadyFlag)
        return [flag.pid] if flag is not None and flag.pid in ours else []
    # the wrapper adopts what the trainer leaves behind: its own child is the oldest one
    children = [pid for pid in _children(wrapper) if pid in ours] if wrapper in ours else []
    return sorted(children, key=start_time)[:1]


def _children(pid: int) -> list[int]:
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return sorted(int(word) for task in tasks for word in (task / "children").read_text().split())
    except OSError:
        return []


def _below(pids: set[int]) -> set[int]:
    """These processes and all below them: the first process of a sandbox has an environment of its own."""
    found, ahead = set(pids), list(pids)
    while ahead:
        new = [child for child in _children(ahead.pop()) if child not in found]
        found.update(new)
        ahead += new
    return found


def _status(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return ""


def is_first_of_namespace(status: str) -> bool:
    """Whether /proc/PID/status is that of process 1 of a pid namespace below ours."""
    line = next((line for line in status.splitlines() if line.startswith("NSpid:")), "")
    numbers = line.split()[1:]
    return len(numbers) > 1 and numbers[-1] == "1"


# --- striking and watching ---------------------------------------------------------------------------


def strike(target: Target, scheduler: Scheduler) -> None:
    """Kill it, with the signal that nobody can handle. Raises CannotDrill, SchedulerError."""
    if target.job_id:
        scheduler.signal(target.job_id, "KILL")
        return
    try:
        os.kill(target.pid, signal.SIGKILL)
    except OSError as error:
        raise CannotDrill(f"{target.about} cannot be killed: {error.strerror}") from error


@dataclass(frozen=True)
class Report:
    """What came of it; seconds since the kill, None for what was not seen."""

    part: str
    recovered: bool
    verdict: str
    noticed_s: float | None
    """Until a record or the server's health showed that something was lost."""
    back_s: float | None
    """Until a new life of the part was up."""
    next_step_s: float | None
    """Until training had made another step."""
    steps_twice: int
    """Steps that were trained on twice."""


class Watch:
    """Takes a picture before the strike, then looks for what changes."""

    def __init__(self, run: RunDirectory, scheduler: Scheduler, target: Target) -> None:
        self.run, self.scheduler, self.target = run, scheduler, target
        self.mode = runs.manifest_of(run).mode
        self.before = self._picture()
        self.steps = self._steps()
        self.noticed: float | None = None
        self.back: float | None = None
        self.next_step: float | None = None
        self.counted = len(self.steps)

    def _picture(self) -> tuple[str, int, str]:
        """What changes when the part lives again: the server's nonce, the attempt, the job's id."""
        flag = self.run.read(self.run.ready_flag, ReadyFlag)
        manifest = runs.manifest_of(self.run)
        attempt = self.run.latest_attempt(self.target.role)
        nonce = flag.nonce if flag is not None and self.target.role == Role.RUNTIME else ""
        return nonce, attempt, manifest.job_id(self.target.role)

    def _steps(self) -> list[int]:
        return [int(row.get("step", -1)) for row in read_json_lines(self.run.metrics)]

    def follow(self, timeout_s: float, say: Callable[[str], object] = bool) -> Report:
        """Until it recovered, is over, or the time is up."""
        start = time.monotonic()
        while True:
            now = time.monotonic() - start
            look = runs.view(self.run, self.scheduler)
            self._see(now, say)
            done = self.next_step is not None and (self.back is not None or self.target.part == "sandbox")
            if done or look.state == "success":
                return self._report(True, "the run goes on" if done else "the run ended with success")
            if look.is_over:
                return self._report(False, f"the run ended as {look.state}: {look.reason}")
            if now >= timeout_s:
                return self._report(False, f"no recovery was seen within {timeout_s:g} s")
            time.sleep(_LOOK_EVERY_S)

    def _see(self, now: float, say: Callable[[str], object]) -> None:
        problem = runtime_health(self.run, self.mode).problem if self.target.role == Role.RUNTIME else ""
        changed = self._picture() != self.before
        if self.noticed is None and (problem or changed):
            self.noticed = now
            say(f"noticed: {problem or 'a new life begins'}")
        if self.back is None and changed and not problem and self._runs():
            self.back, self.counted = now, len(self._steps())
            say(f"the {self.target.role} job is up again")
        ready = self.back is not None or self.target.part == "sandbox"
        if self.next_step is None and ready and len(self._steps()) > self.counted:
            self.next_step = now
            say("training made a step")

    def _runs(self) -> bool:
        status = self.run.read(self.run.status(self.target.role), JobStatus)
        latest = self.run.latest_attempt(self.target.role)
        return status is not None and status.attempt >= latest and status.phase == "running"

    def _report(self, recovered: bool, verdict: str) -> Report:
        new = self._steps()[len(self.steps) :]
        twice = len(new) - len(set(new) - set(self.steps))
        times = (self.noticed, self.back, self.next_step)
        return Report(self.target.part, recovered, verdict, *times, steps_twice=max(0, twice))
