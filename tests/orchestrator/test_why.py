"""`orchestrate why`: every rule on made-up facts, and the facts of real runs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from jobkit import Pair, each, training_up
from memory_scheduler import MemoryScheduler

from orchestrator.cli_commands import cli
from orchestrator.contract import JobStatus, Outcome, Role, RunDirectory
from orchestrator.launch import Request, launch
from orchestrator.schedulers import JobInfo, JobState, SchedulerError
from orchestrator.slurm_reasons import explain
from orchestrator.why import Disk, Facts, Finding, JobFacts, diagnose
from orchestrator.why_facts import collect, watch

RUNTIME = JobFacts(role="runtime", job_id="8", state=JobState.RUNNING, phase="running", attempt=1)
TRAINING = JobFacts(role="training", job_id="7", state=JobState.RUNNING, phase="running", attempt=1)
FACTS = Facts(
    run_id="r_1", name="1", scheduler="slurm", jobs=(RUNTIME, TRAINING), health="", ready=True, step=4
)


def first(
    *, runtime: dict[str, Any] | None = None, training: dict[str, Any] | None = None, **changes: Any
) -> Finding:
    jobs = (dataclasses.replace(RUNTIME, **runtime or {}), dataclasses.replace(TRAINING, **training or {}))
    return diagnose(dataclasses.replace(FACTS, **{"jobs": jobs, **changes}))[0]


def waiting(reason: str, state: JobState = JobState.PENDING) -> dict[str, Any]:
    return {"state": state, "reason": reason, "phase": "", "attempt": 0}


def gone(**more: Any) -> dict[str, Any]:
    return {"state": JobState.ENDED, **more}


def ended(code: int, raw: str = "FAILED", **more: Any) -> dict[str, Any]:
    return gone(phase="ended", outcome="failed", exit_code=code, raw=raw, **more)


CASES: list[tuple[dict[str, Any], str, str, str]] = [
    ({}, "ok", "nothing is wrong with it: running; step 4", "orchestrate status 1"),
    ({"runtime": waiting("Resources")}, "note", "waits for nodes to become free", "squeue -j 8 --start"),
    ({"training": waiting("PartitionNodeLimit")}, "problem", "more nodes than the partition", "sinfo"),
    (
        {"training": waiting("DependencyNeverSatisfied")},
        *("problem", "can never start by itself", "scontrol update JobId=7 Dependency="),
    ),
    (
        {"training": waiting("JobHeldUser", JobState.HELD), "runtime": waiting("Priority"), "health": None},
        *("note", "jobs with a higher priority", "squeue -j 8 --start"),
    ),
    (
        {"training": waiting("JobHeldUser", JobState.HELD), "runtime": gone(phase="ended")},
        *("problem", "nobody will start it", "orchestrate cancel 1"),
    ),
    (
        {"training": waiting("JobHeldUser", JobState.HELD)},
        *("warning", "still held although the runtime answers", "scontrol release 7"),
    ),
    (
        {"training": waiting("JobHeldAdmin", JobState.HELD), "runtime": waiting("Priority")},
        *("problem", "an administrator", ""),
    ),
    (
        {"runtime": {"job_id": "", "state": JobState.GONE, "attempt": 0}},
        *("problem", "never reached the scheduler", "orchestrate cancel 1"),
    ),
    ({"jobs": ()}, "problem", "died before it submitted a job", "orchestrate reap 1"),
    ({"scheduler_problem": "timed out"}, "warning", "nothing is concluded", "scontrol ping"),
    ({"training": {"still_s": 14.0}}, "warning", "for 14 s it gave no sign of life", "--role training"),
    ({"health": "http://n1:1 does not answer"}, "warning", "does not answer", "--role runtime"),
    ({"disk": Disk(problem="Read-only file system")}, "problem", "cannot be written", "df -h ."),
    ({"disk": Disk(free=1 << 20, total=1 << 40)}, "problem", "its filesystem is full: 1 MiB", "df -h ."),
    ({"disk": Disk(free_inodes=10, inodes=1 << 20)}, "problem", "out of inodes", "df -i ."),
    (
        {
            "training": gone(phase="running", raw="NODE_FAIL"),
            "runtime": gone(phase="ended"),
            "state": "failed",
        },
        *("problem", "its node failed", "orchestrate logs 1"),
    ),
    (
        {
            "training": ended(137),
            "runtime": gone(phase="ended"),
            "state": "failed",
            "checkpoint": "step-000004",
        },
        *("problem", "killed (SIGKILL): most often the memory", "orchestrate logs 1 --role training"),
    ),
    (
        {"training": ended(1, "OUT_OF_MEMORY"), "checkpoint": "step-000004", "runtime": gone(phase="ended")},
        *("problem", "raise training.memory", "orchestrate resume 1"),
    ),
    (
        {"training": gone(phase="", attempt=0, reason="JobLaunchFailure", raw="FAILED")},
        *("problem", "before it did anything (JobLaunchFailure)", "scontrol show job 7"),
    ),
    (
        {"training": ended(1, tail=("x", "RuntimeError: CUDA out of memory. Tried", "y"))},
        *("problem", "the GPU's memory was used up", "orchestrate resume 1 rollout.gpu_memory"),
    ),
    (
        {"training": ended(1, tail=("Traceback", "ValueError: no such thing"))},
        *("problem", "its log ends with an error", "orchestrate logs 1 --role training"),
    ),
    ({"state": "success", "reason": "50 steps done"}, "ok", "it ended well: 50 steps done", ""),
    (
        {"state": "cancelled", "reason": "on request", "cancelled": True, "checkpoint": "step-000002"}
        | {"runtime": gone(phase="ended"), "training": gone(phase="ended", raw="CANCELLED by 0")},
        *("note", "it was cancelled", "orchestrate resume 1"),
    ),
]


@pytest.mark.parametrize(("facts", "severity", "text", "command"), CASES, ids=[c[2] for c in CASES])
def test_each_rule(facts: dict[str, Any], severity: str, text: str, command: str) -> None:
    finding = first(**facts)
    assert (finding.severity, text in finding.text) == (severity, True), finding
    assert command in finding.command if command else not finding.command, finding


def test_a_running_job_is_not_judged_by_its_log_but_for_a_full_disk() -> None:
    assert first(training={"tail": ("ValueError: retried",)}).severity == "ok"
    assert "a disk was full" in first(training={"tail": ("OSError: No space left on device",)}).text


def test_what_belongs_to_slurm_is_not_advised_for_a_local_run() -> None:
    assert first(training=waiting("Priority"), scheduler="local").command == ""


def test_the_worst_comes_first() -> None:
    found = diagnose(
        dataclasses.replace(FACTS, health="silence", disk=Disk(problem="read-only"), state="failed")
    )
    assert [f.severity for f in found] == ["problem", "problem", "warning"]


@pytest.mark.parametrize(
    ("reason", "severity", "text"),
    [
        ("Resources", "note", "next in line"),
        ("ReqNodeNotAvail, UnavailableNodes:n[1-4]", "note", "down, drained or reserved"),
        ("(launch failed requeued held)", "problem", "failed to launch"),
        ("launch_failed_requeued_held", "problem", "failed to launch"),
        ("QOSMaxGRESPerUser", "note", "limit of the QOS is used up"),
        ("QOSMaxWallDurationPerJobLimit", "problem", "longer than the QOS allows"),
        ("QOSMaxNodePerJobLimit", "problem", "than one job may"),
        ("AssocGrpCpuLimit", "note", "limit of your account is used up"),
        ("AssocGrpCPUMinutesLimit", "problem", "compute time of your account"),
        ("AssocMaxJobsLimit", "note", "limit of your account"),
        ("BeginTime", "note", "two minutes"),
        ("Licenses", "note", "licence"),
        ("FromAnotherPlanet", "note", "does not know the reason"),
        ("", "note", "not looked at it yet"),
    ],
)
def test_reasons_in_plain_words(reason: str, severity: str, text: str) -> None:
    found = explain(reason)
    assert found.severity == severity and text in found.text


# --- facts -------------------------------------------------------------------------------------------


def test_the_facts_of_a_launched_run(request_of: Callable[..., Request], memory: MemoryScheduler) -> None:
    run = launch(request_of(), memory).run
    facts = collect(run, memory)
    assert [(j.role, j.state) for j in facts.jobs] == [("runtime", "pending"), ("training", "held")]
    assert not facts.ready and facts.health is None and not facts.disk.problem
    assert not list(run.root.glob(".why*"))
    assert diagnose(facts)[0].severity == "note"


class Silent(MemoryScheduler):
    """A scheduler that does not answer, in one of the two ways."""

    def query(self, job_ids: Any) -> dict[str, JobInfo]:
        if self.deaf:
            raise SchedulerError("connection refused")
        return {i: JobInfo(i, JobState.UNKNOWN, "timed out") for i in job_ids}


@pytest.mark.parametrize("raises", [True, False])
def test_a_silent_scheduler_is_said_to_be_silent(request_of: Callable[..., Request], raises: bool) -> None:
    memory = Silent()
    run = launch(request_of(), memory).run
    memory.deaf = raises
    found = diagnose(collect(run, memory))
    assert (found[0].about, found[0].severity) == ("scheduler", "warning")
    assert not [f for f in found if f.severity == "problem"]


def test_an_old_attempt_does_not_speak_for_a_new_one(runs_dir: Path, request_of: Any) -> None:
    memory = MemoryScheduler()
    run = launch(request_of(), memory).run
    status = JobStatus(
        run_id=run.run_id,
        role=Role.TRAINING,
        attempt=1,
        job_id="101",
        nonce="a",
        host="h",
        pid=1,
        phase="ended",
        outcome=Outcome.TIMEOUT,
    )
    run.publish(run.status(Role.TRAINING), status)
    run.take_attempt(Role.TRAINING, "a")
    assert collect(run, memory).job(Role.TRAINING).phase == "ended"  # type: ignore[union-attr]
    run.take_attempt(Role.TRAINING, "b")
    assert collect(run, memory).job(Role.TRAINING).phase == ""  # type: ignore[union-attr]


def test_heartbeats_are_judged_by_two_looks(runs_dir: Path) -> None:
    run = RunDirectory.create(runs_dir)
    run.heartbeat("runtime").write_bytes(b"old")
    still = watch({"runtime": run.heartbeat("runtime")}, 0.3)
    assert 0.25 < still["runtime"] < 5
    assert watch({}, 5) == {} and watch({"runtime": run.heartbeat("runtime")}, 0) == {}


def test_the_command_says_what_to_type_next(request_of: Any, runs_dir: Path) -> None:
    run = launch(request_of(), MemoryScheduler()).run  # ids that no local scheduler knows
    done = CliRunner().invoke(cli, ["why", "--runs-dir", str(runs_dir)])
    assert done.exit_code == 1 and run.run_id in done.output and "✗" in done.output, done.output
    answer = json.loads(CliRunner().invoke(cli, ["why", str(run.root), "--json"]).stdout)
    assert answer["findings"][0]["severity"] == "problem" and answer["facts"]["jobs"]


@pytest.mark.slow
def test_real_runs(make: Callable[..., Pair]) -> None:
    def check(case: tuple[str, str, str]) -> None:
        body, severity, text = case
        pair = make(body)
        pair.launch()
        if body.startswith("up"):
            training_up(pair)
        else:
            pair.all_over()
        found = diagnose(collect(pair.run, pair.scheduler))
        assert found[0].severity == severity and text in str(found), found

    each(
        [
            ("up()\ntime.sleep(1000)", "ok", "nothing is wrong"),
            ("sys.exit(3)", "problem", "exited with code 3"),
            ("raise RuntimeError('CUDA out of memory')", "problem", "GPU's memory was used up"),
            ("os.kill(os.getpid(), 9)", "problem", "SIGKILL"),
        ],
        check,
    )
