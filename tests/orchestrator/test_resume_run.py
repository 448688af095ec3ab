"""`orchestrate resume`: what is refused, what is kept, and real runs that go on where they were."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jobkit import python_with
from memory_scheduler import MemoryScheduler

from orchestrator import resume, runs
from orchestrator.contract import (
    CompleteFlag,
    JobStatus,
    Manifest,
    Outcome,
    ReadyFlag,
    Result,
    Role,
    RunDirectory,
    Superseded,
)
from orchestrator.errors import OrchestrateError
from orchestrator.identity import Process
from orchestrator.launch import Request, launch
from orchestrator.resume import CannotResume, may_change, prepare
from orchestrator.runs import list_runs
from orchestrator.schedulers import JobState

REPOSITORY = Path(__file__).resolve().parents[2]
Make = Callable[..., Request]


def ended(
    request_of: Make, memory: MemoryScheduler, outcome: Outcome = Outcome.TIMEOUT, *assignments: str
) -> RunDirectory:
    """A run of a scheduler in memory that is over, with a checkpoint of step 20."""
    run = launch(request_of("trainer.total_steps=50", *assignments), memory).run
    for role in ("runtime", "training"):
        memory.set(role, JobState.ENDED)
        run.take_attempt(role, f"first {role}")
    (run.checkpoints / "step-000020").mkdir(parents=True)
    result = Result(
        run_id=run.run_id, attempt=1, job_id="1", outcome=outcome, reason="walltime", exit_code=85
    )
    run.publish(run.result, result)
    run.publish(run.complete_flag, CompleteFlag(run_id=run.run_id, attempt=1, nonce="n", outcome=outcome))
    flag = ReadyFlag(run_id=run.run_id, attempt=1, job_id="2", nonce="n", host="h", pid=1, url="http://h:1")
    run.publish(run.ready_flag, flag)
    return run


def test_a_run_is_opened_again_without_a_lie(request_of: Make, memory: MemoryScheduler) -> None:
    run = ended(request_of, memory)
    jobs = resume.resume(prepare(run, memory, ["training.time_limit=40m"]), memory)
    assert run.read(run.result, Result) is None and run.read(run.complete_flag, CompleteFlag) is None
    assert run.read(run.ready_flag, ReadyFlag) is None
    kept = RunDirectory(run.earlier(1))
    old = run.read(kept.result, Result)
    assert (
        old is not None and old.outcome == Outcome.TIMEOUT and "time_limit: 1800" in kept.config.read_text()
    )
    assert "time_limit: 2400" in run.config.read_text()
    look = runs.view(run, memory)
    assert look.state == "pending" and {job.role: job.job_id for job in look.jobs} == jobs
    assert {job.attempt for job in look.jobs} == {2}
    manifest = run.read_manifest()
    assert manifest is not None and manifest.attempt == 2
    assert manifest.lives_before == {"runtime": 2, "training": 2}
    tokens = {spec.token for spec in memory.specs.values()}
    assert {f"{run.run_id}.training", f"{run.run_id}.training.2"} < tokens
    origin = json.loads(run.provenance.read_text())["training.time_limit"]
    assert origin == {"layer": "command line", "where": "command line"}
    assert not run.earlier(1).joinpath("owner.json").exists()


def test_what_still_writes_of_the_earlier_life_is_fenced_out(
    request_of: Make, memory: MemoryScheduler
) -> None:
    run = ended(request_of, memory)
    run.check_attempt(Role.TRAINING, 1)
    resume.resume(prepare(run, memory), memory)
    with pytest.raises(Superseded):
        run.check_attempt(Role.TRAINING, 1)
    status = run.read(run.status(Role.RUNTIME), JobStatus)
    assert status is not None and status.outcome == Outcome.REQUEUED  # its peer waits for it


def test_a_cancelled_run_that_is_resumed_is_not_cancelled_any_more(
    request_of: Make, memory: MemoryScheduler
) -> None:
    run = ended(request_of, memory, Outcome.CANCELLED)
    run.events_of(Role.LAUNCHER, "cancel-1").add("cancel")
    assert run.cancel_asked()
    resume.resume(prepare(run, memory), memory)
    assert not run.cancel_asked()
    for role in ("runtime", "training"):
        memory.set(role, JobState.ENDED)
    assert runs.view(run, memory).state == "failed"


def test_a_resume_that_died_can_be_resumed(request_of: Make, memory: MemoryScheduler) -> None:
    run = ended(request_of, memory)
    prepared = prepare(run, memory)
    run.earlier(1).mkdir(parents=True)
    owner = run.earlier(1) / "owner.json"
    me = Process.of(os.getpid())
    owner.write_text(json.dumps(dataclasses.asdict(me)))
    with pytest.raises(CannotResume, match="is being resumed by process"):
        resume.resume(prepared, memory)
    assert run.read(run.result, Result) is not None
    owner.write_text(json.dumps(dataclasses.asdict(dataclasses.replace(me, start=1))))
    resume._keep(run, 1)
    run.result.write_bytes(b"")  # as far as it came
    resume.resume(prepared, memory)
    kept = RunDirectory(run.earlier(1))
    assert run.read(kept.result, Result) is not None


@pytest.mark.parametrize(
    ("case", "assignments", "says"),
    [
        ("live", [], "not over, or cannot be seen: training"),
        ("unknown", [], "cannot be seen"),
        ("no checkpoint", [], "--from-scratch starts it over"),
        ("", ["rollout.temperature=2"], "rollout.temperature may not change within a run"),
        ("", ["scheduler.kind=slurm"], "scheduler.kind may not change"),
        ("", ["trainer.total_steps=20"], "has done all of its 20 steps; give trainer.total_steps=40"),
        ("", ["trainer.total_stops=3"], "did you mean trainer.total_steps"),
        ("success", [], "ended with success; to train longer"),
    ],
)
def test_refusals_change_nothing(
    request_of: Make, memory: MemoryScheduler, case: str, assignments: list[str], says: str
) -> None:
    run = ended(request_of, memory, Outcome.SUCCESS if case == "success" else Outcome.TIMEOUT)
    if case in ("live", "unknown"):
        memory.set("training", JobState.RUNNING if case == "live" else JobState.UNKNOWN)
    if case == "no checkpoint":
        (run.checkpoints / "step-000020").rmdir()
    before = {path: path.read_bytes() for path in run.root.rglob("*") if path.is_file()}
    with pytest.raises(OrchestrateError, match=says):
        prepare(run, memory, assignments)
    assert {path: path.read_bytes() for path in run.root.rglob("*") if path.is_file()} == before
    assert len(memory.specs) == 2


def test_what_may_change() -> None:
    assert may_change("training.time_limit") and may_change("runtime.sandbox.memory")
    assert not may_change("algorithm.kl_coef") and not may_change("run.seed")
    assert not may_change("training.command")


def test_from_scratch_needs_no_checkpoint(request_of: Make, memory: MemoryScheduler) -> None:
    run = ended(request_of, memory)
    (run.checkpoints / "step-000020").rmdir()
    assert prepare(run, memory, from_scratch=True).checkpoint == ""


def test_secrets_stay_when_their_file_is_gone(
    request_of: Make, memory: MemoryScheduler, tmp_path: Path
) -> None:
    (tmp_path / "my.env").write_text("TOKEN=s3cret\n")
    run = ended(request_of, memory, Outcome.TIMEOUT, f"environment.env_file={tmp_path}/my.env")
    resume.resume(prepare(run, memory, ["training.time_limit=1h"]), memory)
    assert "s3cret" in run.env_file.read_text()
    assert run.env_file.stat().st_mode & 0o777 == 0o600


# --- real jobs ---------------------------------------------------------------------------------------

TRAINER = """
import json, os, sys, yaml
from orchestrator.contract import RunDirectory, append_line
run = RunDirectory(sys.argv[sys.argv.index("--run-dir") + 1])
total = yaml.safe_load(run.config.read_text())["trainer"]["total_steps"]
done = max([int(p.name[5:]) for p in run.checkpoints.glob("step-*")], default=0)
for step in range(done, total):
    life = os.environ["ORCHESTRATE_ATTEMPT"]
    append_line(run.metrics, json.dumps({"step": step, "success_rate": 0.5, "life": life}))
    (run.checkpoints / f"step-{step + 1:06d}").mkdir(parents=True)
    if step == 2 and not done:
        os._exit(9)
"""


@pytest.fixture
def python(tmp_path: Path) -> Path:
    return python_with(tmp_path, TRAINER)


@pytest.mark.slow
def test_a_failed_run_goes_on_to_its_end(tmp_path: Path, python: Path) -> None:
    runs_dir = tmp_path / "runs"

    def orchestrate(*arguments: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-m", "orchestrator", *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=REPOSITORY,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    python_of = [f"{role}.python={python}" for role in ("runtime", "training")]
    code, output = orchestrate(
        *("launch", "-c", "local", "-f", f"run.runs_dir={runs_dir}", "trainer.total_steps=5", *python_of)
    )
    assert code == 9, output
    (run,) = list_runs(runs_dir)
    where = ["--runs-dir", str(runs_dir)]
    code, output = orchestrate("resume", *where, "--dry-run", "--json")
    about: dict[str, Any] = json.loads(output)
    assert code == 0 and about["checkpoint"] == "step-000003" and not run.history.exists()
    code, output = orchestrate("resume", *where, "training.time_limit=20m")
    assert code == 0 and "training.time_limit: 1800 → 1200" in output, output
    code, output = orchestrate("logs", "-f", *where)
    result = run.read(run.result, Result)
    assert result is not None and result.outcome == "success", output
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["life"] for row in rows] == ["1", "1", "1", "3", "3"]
    manifest = run.read(run.manifest, Manifest)
    assert manifest is not None and manifest.attempt == 2
