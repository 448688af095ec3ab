"""Why a run stands as it stands: facts in, findings out, the most important first.

What it is
    `diagnose` is pure: a table of small rules, each from `Facts` to `Finding`s. `orchestrator.why_facts`
    collects the facts. A finding says how bad it is, what was seen, and what to type next.

How to use it
    findings = diagnose(collect(run, scheduler)); findings[0].command

What it does not do
    It reads nothing, asks nobody and changes nothing. What nobody answered is never taken for a death.
"""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from orchestrator.contract import Outcome, Role
from orchestrator.schedulers import OVER, QUEUED, JobState
from orchestrator.slurm_reasons import explain, normal
from orchestrator.why_logs import read_log

SEVERITIES = ("problem", "warning", "note", "ok")
_SLURM_WORDS = ("squeue", "scontrol", "sinfo", "sacctmgr", "sacct", "sbatch")
_FULL_SHARE, _FULL_BYTES = 0.02, 1 << 30


@dataclass(frozen=True)
class Finding:
    """One thing that was found. `command` is what to type next, "" when there is nothing to do."""

    severity: str
    about: str
    text: str
    command: str = ""
    evidence: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class JobFacts:
    """One job. `state`, `reason` and `raw` are the scheduler's words; phase, outcome and said its own."""

    role: str
    job_id: str = ""
    state: str = JobState.GONE
    reason: str = ""
    raw: str = ""
    exit_code: int | None = None
    host: str = ""
    partition: str = ""
    phase: str = ""
    outcome: str = ""
    said: str = ""
    attempt: int = 0
    still_s: float | None = None
    """How long its heartbeat was watched without a change; None when nobody watched, 0 when it beats."""
    tail: tuple[str, ...] = ()
    """The end of its standard error and output."""

    @property
    def over(self) -> bool:
        return self.state in OVER

    @property
    def waits(self) -> bool:
        return self.state in QUEUED


@dataclass(frozen=True, kw_only=True)
class Disk:
    """The filesystem of the run directory, as this machine sees it."""

    free: int = 1 << 40
    total: int = 1 << 41
    free_inodes: int = 1 << 20
    inodes: int = 1 << 21
    problem: str = ""
    """Why a file could not be written there; "" when it could."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """All that was seen of a run at one moment."""

    run_id: str
    name: str
    """What to call the run on the command line."""
    scheduler: str
    mode: str = "run"
    start_policy: str = "release-on-ready"
    state: str = "running"
    reason: str = ""
    jobs: tuple[JobFacts, ...] = ()
    scheduler_problem: str = ""
    health: str | None = None
    """Problem of the server's `/health`, "" when it answers as this run's; None when nobody asked."""
    ready: bool = False
    complete: bool = False
    cancelled: bool = False
    checkpoint: str = ""
    step: int = 0
    heartbeat_every: float = 10.0
    disk: Disk = field(default_factory=Disk)

    def job(self, role: str) -> JobFacts | None:
        return next((job for job in self.jobs if job.role == role), None)

    @property
    def over(self) -> bool:
        return bool(self.jobs) and all(job.over for job in self.jobs)


Rule = Callable[[Facts], Iterator[Finding]]


def diagnose(facts: Facts) -> list[Finding]:
    """Every finding, the worst first; among equals in the order of the rules. Never empty."""
    found = [finding for rule in RULES for finding in rule(facts)]
    found = [_fill(finding, facts) for finding in found or [_nothing(facts)]]
    unique = {(f.about, f.text): f for f in reversed(found)}
    kept = [f for f in found if unique[f.about, f.text] is f]
    return sorted(kept, key=lambda f: SEVERITIES.index(f.severity))


def _fill(finding: Finding, facts: Facts) -> Finding:
    """Put names into the command; a command of another scheduler's is left out."""
    job = facts.job(finding.about)
    partition = job.partition if job is not None else ""
    command = finding.command.replace("sinfo -p {partition} ", "sinfo ") if not partition else finding.command
    if facts.scheduler != "slurm" and command.startswith(_SLURM_WORDS):
        command = ""
    names = {"run": facts.name, "role": finding.about, "partition": partition}
    for name, value in {**names, "job": job.job_id if job else ""}.items():
        command = command.replace(f"{{{name}}}", value)
    return dataclasses.replace(finding, command=command)


def _nothing(facts: Facts) -> Finding:
    where = f"; step {facts.step}" if facts.step else ""
    return Finding("ok", "run", f"nothing is wrong with it: {facts.state}{where}", "orchestrate status {run}")


# --- the rules ---------------------------------------------------------------------------------------


def disk(facts: Facts) -> Iterator[Finding]:
    seen = facts.disk
    if seen.problem:
        yield Finding("problem", "disk", f"the run directory cannot be written: {seen.problem}", "df -h .")
    elif seen.free < min(_FULL_BYTES, _FULL_SHARE * seen.total):
        free = f"{seen.free / (1 << 20):,.0f} MiB"
        yield Finding("problem", "disk", f"its filesystem is full: {free} are left", "df -h .")
    elif seen.inodes and seen.free_inodes < _FULL_SHARE * seen.inodes:
        left = f"{seen.free_inodes:,} files"
        yield Finding("problem", "disk", f"its filesystem is nearly out of inodes: {left} left", "df -i .")


def silent_scheduler(facts: Facts) -> Iterator[Finding]:
    if facts.scheduler_problem:
        text = f"it does not answer, so nothing is concluded about the jobs: {facts.scheduler_problem}"
        yield Finding("warning", "scheduler", text, "scontrol ping")


def never_submitted(facts: Facts) -> Iterator[Finding]:
    if not facts.jobs:
        yield Finding(
            *("problem", "run", "the launcher died before it submitted a job"), "orchestrate reap {run}"
        )
    for job in facts.jobs:
        if not job.job_id and not facts.scheduler_problem:
            text = "it never reached the scheduler: the launcher died, or the scheduler refused it"
            yield Finding("problem", job.role, text, "orchestrate cancel {run}")


def queued(facts: Facts) -> Iterator[Finding]:
    """A job that waits: for what, and whether that can ever come."""
    for job in facts.jobs:
        if not job.waits:
            continue
        if (peer := _dead_peer(facts, job)) is not None:
            text = f"it waits for the {peer.role} job, which is over: nobody will start it"
            yield Finding("problem", job.role, text, "orchestrate cancel {run}")
        elif (
            job.role == Role.TRAINING and job.state == JobState.HELD and normal(job.reason) != "jobheldadmin"
        ):
            yield from _held(facts, job)
        else:
            meaning = explain(job.reason)
            text = f"it waits in the queue ({job.reason or 'no reason given'}): {meaning.text}"
            yield Finding(meaning.severity, job.role, text, meaning.command)


def _dead_peer(facts: Facts, job: JobFacts) -> JobFacts | None:
    runtime = facts.job(Role.RUNTIME)
    if job.role != Role.TRAINING or runtime is None or not runtime.over:
        return None
    return runtime


def _held(facts: Facts, job: JobFacts) -> Iterator[Finding]:
    runtime = facts.job(Role.RUNTIME)
    if facts.start_policy != "release-on-ready" or runtime is None:
        yield Finding("problem", job.role, "it is held by its owner", "scontrol release {job}")
    elif facts.health == "":
        text = "it is still held although the runtime answers; the runtime job releases it within seconds"
        yield Finding("warning", job.role, text, "scontrol release {job}")
    elif runtime.state == JobState.RUNNING:
        yield Finding("note", job.role, "it is held, as meant: the runtime is starting and will release it")
    else:
        yield Finding("note", job.role, "it is held, as meant, until the runtime is ready")


def not_beating(facts: Facts) -> Iterator[Finding]:
    for job in facts.jobs:
        if job.state != JobState.RUNNING or job.still_s is None or job.phase == "ended":
            continue
        if job.still_s > facts.heartbeat_every:
            text = (
                f"the scheduler says that it runs, but for {job.still_s:.0f} s it gave no sign of life "
                f"(it should every {facts.heartbeat_every:g} s): it hangs, its node died, "
                "or the filesystem lags"
            )
            yield Finding("warning", job.role, text, "orchestrate logs {run} --role {role}", job.tail[-3:])


def unhealthy(facts: Facts) -> Iterator[Finding]:
    runtime = facts.job(Role.RUNTIME)
    lives = runtime is None or runtime.state == JobState.RUNNING
    if facts.health and lives and not facts.complete:
        severity = "warning" if facts.ready else "note"
        yield Finding(severity, Role.RUNTIME, facts.health, "orchestrate logs {run} --role runtime")


def lost_results(facts: Facts) -> Iterator[Finding]:
    """Jobs that are over although they did not say so: something killed them from outside."""
    for job in facts.jobs:
        killed = job.over and job.job_id and job.attempt and job.phase != "ended"
        if killed and not (job.role == Role.TRAINING and facts.complete):
            text = (
                f"it ended without a word in phase {job.phase or 'starting'}: killed from outside, "
                f"or its node died{_because(job)}"
            )
            yield Finding("problem", job.role, text, _go_on(facts), job.tail[-3:])


def _because(job: JobFacts) -> str:
    return f" ({job.reason or job.raw})" if job.reason or job.raw else ""


def launch_failures(facts: Facts) -> Iterator[Finding]:
    for job in facts.jobs:
        if job.over and job.job_id and not job.attempt and not facts.cancelled:
            if job.raw.startswith("CANCELLED") or facts.complete:
                continue
            meaning = explain(job.reason) if job.reason else explain("JobLaunchFailure")
            text = f"it ended before it did anything{_because(job)}: {meaning.text}"
            yield Finding(
                "problem", job.role, text, meaning.command or "orchestrate logs {run}", job.tail[-3:]
            )


def killed(facts: Facts) -> Iterator[Finding]:
    """What the scheduler's word or the exit code says of a job that failed."""
    for job in facts.jobs:
        if not job.over or facts.cancelled or facts.state == Outcome.SUCCESS:
            continue
        if text := _RAW.get(job.raw.split(" ")[0].rstrip("+")):
            more = f"raise {job.role}.memory" if "OUT_OF_MEMORY" in job.raw else ""
            yield Finding("problem", job.role, f"{text}{more and ': '}{more}", _go_on(facts), job.tail[-3:])
        elif text := by_signal(job.exit_code):
            yield Finding("problem", job.role, text, "orchestrate logs {run} --role {role}", job.tail[-3:])


_RAW = {
    "OUT_OF_MEMORY": "it used more memory than it asked for and was killed",
    "TIMEOUT": "it reached its time limit",
    "NODE_FAIL": "its node failed",
    "PREEMPTED": "a job with a higher priority took its place",
    "BOOT_FAIL": "its node could not be booted",
    "DEADLINE": "its deadline passed",
}
_SIGNALS = {
    signal.SIGKILL: "it was killed (SIGKILL): most often the memory was used up, else somebody did",
    signal.SIGSEGV: "it crashed (segmentation fault) in native code",
    signal.SIGBUS: "it crashed (SIGBUS): /dev/shm or a disk is full, or a mapped file was cut short",
    signal.SIGABRT: "it aborted itself (SIGABRT): an assertion in native code, NCCL's watchdog often",
    signal.SIGILL: "it used an instruction that this CPU does not have (SIGILL): built for another machine",
    signal.SIGFPE: "it divided by zero in native code (SIGFPE)",
}


def by_signal(code: int | None) -> str:
    """What an exit code above 128 says; "" for any other."""
    if code is None or code <= 128:
        return ""
    with_name = {int(number): text for number, text in _SIGNALS.items()}
    return with_name.get(code - 128, "")


def outcomes(facts: Facts) -> Iterator[Finding]:
    """How the run ended, by its own word."""
    if facts.state == Outcome.SUCCESS:
        yield Finding("ok", "run", f"it ended well: {facts.reason or 'success'}")
    elif facts.state == Outcome.CANCELLED:
        yield Finding("note", "run", f"it was cancelled: {facts.reason}", _go_on(facts))
    elif facts.state in (Outcome.FAILED, Outcome.TIMEOUT, Outcome.PEER_GONE):
        yield Finding("problem", "run", f"it ended as {facts.state}: {facts.reason}", _go_on(facts))
    elif facts.state == "ending":
        yield Finding("note", "run", f"the result is written, its jobs wind up: {facts.reason}")


def _go_on(facts: Facts) -> str:
    if not facts.over:
        return "orchestrate logs {run}"
    return "orchestrate resume {run}" if facts.checkpoint else "orchestrate logs {run}"


def logs(facts: Facts) -> Iterator[Finding]:
    """Known sentences in the last lines of a job that did not end well."""
    if facts.state == Outcome.SUCCESS:
        return
    for job in facts.jobs:
        for sign in read_log(job.tail):
            if job.over or sign.while_running:
                yield Finding("problem", job.role, sign.text, sign.command, (sign.line,))


RULES: tuple[Rule, ...] = (
    disk,
    queued,
    never_submitted,
    logs,
    killed,
    launch_failures,
    lost_results,
    silent_scheduler,
    not_beating,
    unhealthy,
    outcomes,
)
