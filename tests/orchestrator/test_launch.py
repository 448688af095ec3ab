"""Launching and reading runs, against a scheduler in memory: journal, snapshot, secrets, every ending."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from memory_scheduler import MemoryScheduler
from slurm_fakes import Fakes, Reply, row

from orchestrator import runs
from orchestrator.attach import Attached
from orchestrator.contract import (
    CompleteFlag,
    JobStatus,
    Manifest,
    NotARun,
    ReadyFlag,
    Result,
    RunDirectory,
    WaitTimeout,
)
from orchestrator.dotenv import parse_dotenv
from orchestrator.errors import ConfigError, LaunchError, RunNotFound
from orchestrator.launch import Launched, Request, launch, preview
from orchestrator.schedulers import JobState
from orchestrator.schedulers.slurm import SlurmScheduler

Make = Callable[..., Request]


def manifest(run: RunDirectory) -> Manifest:
    found = run.read(run.manifest, Manifest)
    assert found is not None
    return found


def journal(run: RunDirectory) -> list[str]:
    return [f"{s['role']} {s['state']} {s['job_id']}".strip() for s in manifest(run).submissions]


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def the_run(runs_dir: Path) -> RunDirectory:
    (run,) = runs.list_runs(runs_dir)
    return run


# --- a launch ----------------------------------------------------------------------------------------


def test_a_launch_writes_everything_down(request_of: Make, memory: MemoryScheduler) -> None:
    launched = launch(request_of("training.cpus=3"), memory)
    run = launched.run
    assert launched.jobs == {"training": "101", "runtime": "102"}
    assert journal(run) == [
        "training intent",
        "training submitted 101",
        "runtime intent",
        "runtime submitted 102",
        "training confirmed 101",
        "runtime confirmed 102",
    ]
    about = manifest(run)
    assert (about.mode, about.scheduler, about.config_name) == ("run", "local", "local")
    assert about.job_settings().ready_timeout == 120
    assert json.loads(run.provenance.read_text())["training.cpus"]["layer"] == "command line"
    assert next(event.what for event in run.timeline()) == "launcher.created"
    assert {mode_of(run.root), mode_of(run.config), mode_of(run.env_file)} == {0o700, 0o600}
    assert memory.jobs["101"].state == JobState.HELD
    assert memory.specs["101"].script == run.script("training")


def test_a_plain_dependency_names_the_runtime_job(request_of: Make, memory: MemoryScheduler) -> None:
    launched = launch(request_of("scheduler.start_policy=after"), memory)
    assert memory.specs[launched.jobs["training"]].after == launched.jobs["runtime"]


def test_the_code_is_frozen(request_of: Make, memory: MemoryScheduler) -> None:
    run = launch(request_of(), memory).run
    assert (run.code / "orchestrator" / "plan.py").is_file()
    assert f"exec bash {run.code}/jobs/runtime.sh" in run.script("runtime").read_text()
    assert f"PYTHONPATH={run.code}" in run.env_file.read_text()
    assert not list(run.code.rglob(".git")) and not list(run.code.rglob("__pycache__"))


def test_a_preview_leaves_nothing(request_of: Make, runs_dir: Path) -> None:
    assert preview(request_of()).run_dir.startswith(str(runs_dir))
    assert not runs_dir.exists()


def test_relative_paths_are_those_of_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request_of: Make
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tasks.parquet").touch()
    config = request_of("data.train=tasks.parquet", "trainer.checkpoint_dir=../x", "model.path=a/b").config
    assert config.data.train == f"{tmp_path}/tasks.parquet"
    assert config.trainer.checkpoint_dir == f"{tmp_path.parent}/x"
    assert config.model.path == "a/b"  # a name on the hub


@pytest.mark.parametrize("key", ["environment.env_file", "data.train", "data.validation", "model.path"])
def test_a_missing_file_is_named(key: str, request_of: Make, runs_dir: Path) -> None:
    with pytest.raises(ConfigError, match=rf"{key}: there is no /nowhere/x; give a path that exists"):
        preview(request_of(f"{key}=/nowhere/x"))
    assert not runs_dir.exists()


# --- secrets -----------------------------------------------------------------------------------------


def test_secrets_are_in_one_private_file_only(
    tmp_path: Path, request_of: Make, memory: MemoryScheduler
) -> None:
    env_file = tmp_path / "my.env"
    env_file.write_text("# mine\nexport HF_TOKEN='tok3n s'  # why\nWANDB=\"w\"\n\n")
    run = launch(request_of(f"environment.env_file={env_file}"), memory).run
    found = [p for p in run.root.rglob("*") if p.is_file() and b"tok3n" in p.read_bytes()]
    assert [p for p in found if run.code not in p.parents] == [run.env_file]
    assert mode_of(run.env_file) == 0o600
    assert not any("tok3n" in value for spec in memory.specs.values() for value in spec.env.values())


def test_an_env_file_is_read_as_a_shell_would() -> None:
    text = 'A=1\n B = x y # c\nexport C=\'a # $b\'\nD="q\\"q"\nE=\nF=a#b\n'
    found = parse_dotenv(text, ".env")
    assert found == {"A": "1", "B": "x y", "C": "a # $b", "D": 'q"q', "E": "", "F": "a#b"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("A=1\noops s3cret", ".env:2: expected NAME=value"),
        ("A='s3cret", ".env:1: the quotes of A do not match"),
        ("ORCHESTRATE_NONCE=s3cret", ".env:1: ORCHESTRATE_NONCE is set by the launcher"),
    ],
)
def test_a_wrong_env_file_is_named_but_never_quoted(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_dotenv(text, ".env")
    assert says in str(caught.value) and "s3cret" not in str(caught.value)


def test_variables_of_ours_are_refused(request_of: Make) -> None:
    with pytest.raises(ConfigError, match="ORCHESTRATE_NONCE is set by the launcher"):
        preview(request_of("environment.variables.ORCHESTRATE_NONCE=x"))
    with pytest.raises(ConfigError, match="a name is letters, digits and _"):
        preview(request_of("environment.variables.A-B=x"))


# --- submissions that go wrong -----------------------------------------------------------------------


def test_a_refused_second_job_takes_the_first_with_it(
    request_of: Make, memory: MemoryScheduler, runs_dir: Path
) -> None:
    memory.refuses = "runtime"
    with pytest.raises(LaunchError, match="the runtime job was not submitted: invalid partition"):
        launch(request_of(), memory)
    run = the_run(runs_dir)
    assert journal(run)[-1] == "runtime failed"
    assert memory.jobs["101"].state == JobState.ENDED
    look = runs.view(run, memory)
    assert look.state == "failed" and look.is_over


def test_a_lost_answer_doubles_no_job(request_of: Make, memory: MemoryScheduler) -> None:
    memory.loses_answer = "training"
    launched = launch(request_of(), memory)
    assert launched.jobs == {"training": "101", "runtime": "102"} and len(memory.jobs) == 2


def test_a_launcher_killed_before_the_answer_left_a_token(request_of: Make, memory: MemoryScheduler) -> None:
    """Between the scheduler's acceptance and the journal's entry: the job is found by its token."""
    run = launch(request_of(), memory).run
    about = json.loads(run.manifest.read_text())
    about["submissions"] = about["submissions"][:1]  # as it was at that instant
    run.manifest.write_text(json.dumps(about))
    (job,) = runs.view(run, memory).jobs
    assert (job.role, job.job_id, job.state) == ("training", "101", "held")


def test_a_failed_preparation_leaves_no_directory(
    request_of: Make, memory: MemoryScheduler, runs_dir: Path
) -> None:
    runs_dir.mkdir()
    (runs_dir / "file").touch()
    request = request_of(f"run.runs_dir={runs_dir}/file/below")
    with pytest.raises(OSError):
        launch(request, memory)
    assert memory.jobs == {}


# --- how a run stands --------------------------------------------------------------------------------


def say(
    run: RunDirectory, role: str, phase: str, outcome: str = "", reason: str = "", attempt: int = 1
) -> None:
    status = JobStatus(
        run_id=run.run_id,
        role=role,
        attempt=attempt,
        job_id="1",
        nonce="n",
        host="node7",
        pid=1,
        phase=phase,
        outcome=outcome,
        reason=reason,
    )
    run.publish(run.status(role), status)


def result(run: RunDirectory, outcome: str, code: int = 0, reason: str = "") -> None:
    record = Result(
        run_id=run.run_id, attempt=1, job_id="101", outcome=outcome, reason=reason, exit_code=code
    )
    run.publish(run.result, record)


@pytest.fixture
def launched(request_of: Make, memory: MemoryScheduler) -> Launched:
    return launch(request_of(), memory)


def test_states_of_a_run_that_goes_well(launched: Launched, memory: MemoryScheduler) -> None:
    run = launched.run
    assert runs.view(run, memory).state == "pending"
    memory.set("runtime", JobState.RUNNING)
    assert runs.view(run, memory).state == "running"
    memory.set("training", JobState.RUNNING)
    run.metrics.write_text('{"step": 0, "success_rate": 0.25}\n{"step": 1, "success_rate": 0.5}\n{"step"')
    look = runs.view(run, memory)
    assert (look.success_rates, look.metrics["step"]) == ([0.25, 0.5], 1)
    result(run, "success")
    assert runs.view(run, memory).state == "ending"
    memory.set("training", JobState.ENDED, 0)
    memory.set("runtime", JobState.ENDED, 0)
    look = runs.view(run, memory)
    assert look.state == "success" and look.is_over and runs.exit_code_of(look) == 0


def test_nothing_is_concluded_from_silence(launched: Launched, memory: MemoryScheduler) -> None:
    memory.set("runtime", JobState.UNKNOWN)
    memory.set("training", JobState.UNKNOWN)
    look = runs.view(launched.run, memory)
    assert look.state == "unknown" and not look.is_over
    assert runs.view(launched.run, None).state == "unknown"


def test_a_held_training_job_without_a_runtime_never_starts(
    launched: Launched, memory: MemoryScheduler
) -> None:
    say(launched.run, "runtime", "ended", "failed", "no room for images")
    memory.set("runtime", JobState.ENDED, 70)
    look = runs.view(launched.run, memory)
    assert look.state == "stranded" and not look.is_over
    assert "will never start: the runtime job is over (no room for images)" in look.reason
    memory.set("runtime", JobState.UNKNOWN)
    assert runs.view(launched.run, memory).state != "stranded"


def test_a_stranded_run_shows_no_reason_from_before_the_end(
    launched: Launched, slurm: SlurmScheduler, fakes: Fakes
) -> None:
    """A runtime job that waited after a requeue when it was cancelled says BeginTime for good."""
    rows = row("101", "PENDING", "JobHeldUser") + row("102", "CANCELLED", "BeginTime")
    fakes.answers("squeue", Reply(out=rows))
    look = runs.view(launched.run, slurm)
    assert look.state == "stranded" and "BeginTime" not in look.reason
    assert [(job.state, job.reason) for job in look.jobs] == [
        (JobState.ENDED, ""),
        (JobState.HELD, "JobHeldUser"),
    ]


def test_the_end_without_a_result_is_no_success(launched: Launched, memory: MemoryScheduler) -> None:
    memory.set("runtime", JobState.GONE)
    memory.set("training", JobState.ENDED, 0)
    look = runs.view(launched.run, memory)
    assert look.state == "failed" and "without a result" in look.reason and runs.exit_code_of(look) != 0


def test_the_jobs_own_word_counts(launched: Launched, memory: MemoryScheduler) -> None:
    say(launched.run, "training", "ended", "peer_gone", "the runtime never became ready")
    memory.set("runtime", JobState.ENDED, 70)
    memory.set("training", JobState.ENDED, 69)
    look = runs.view(launched.run, memory)
    assert (look.state, look.reason) == ("peer_gone", "training: the runtime never became ready")


def test_a_step_done_again_counts_once() -> None:
    rows = [
        {"step": 1, "success_rate": 0.1},
        {"step": 2, "success_rate": 0.2},
        {"step": 2, "success_rate": 0.3},
    ]
    assert runs.success_rates(rows) == [0.1, 0.3]


# --- finding and cancelling --------------------------------------------------------------------------


def test_runs_are_found_by_any_unique_part(request_of: Make, memory: MemoryScheduler, runs_dir: Path) -> None:
    with pytest.raises(RunNotFound, match="orchestrate launch --config local"):
        runs.find_run(runs_dir, None)
    first, second = (launch(request_of(), MemoryScheduler()).run for _ in range(2))
    latest = max(first.run_id, second.run_id)
    assert runs.find_run(runs_dir, None).run_id == latest
    assert runs.find_run(runs_dir, first.run_id[-6:]).root == first.root
    assert runs.find_run(runs_dir, str(second.root)).root == second.root
    with pytest.raises(RunNotFound, match="is the name of 2 runs"):
        runs.find_run(runs_dir, "20")
    with pytest.raises(RunNotFound, match="begins or ends with 'zzz'"):
        runs.find_run(runs_dir, "zzz")
    with pytest.raises(NotARun):
        runs.find_run(runs_dir, str(runs_dir))


def test_cancelling_before_the_start_leaves_a_result(launched: Launched, memory: MemoryScheduler) -> None:
    run = launched.run
    after = runs.cancel(run, memory, 5)
    assert after.state == "cancelled" and {job.state for job in memory.jobs.values()} == {JobState.ENDED}
    found, flag = run.read(run.result, Result), run.read(run.complete_flag, CompleteFlag)
    assert found is not None and (found.outcome, found.exit_code) == ("cancelled", 143)
    assert flag is not None and flag.outcome == "cancelled"
    assert "launcher.cancel" in [event.what for event in run.timeline()]


def test_cancelling_never_overwrites_a_result(launched: Launched, memory: MemoryScheduler) -> None:
    memory.set("training", JobState.RUNNING)
    result(launched.run, "success", reason="all steps done")
    after = runs.cancel(launched.run, memory, 5)
    assert (after.state, after.reason) == ("success", "all steps done")
    assert runs.cancel(launched.run, memory, 5).state == "success"


def test_jobs_that_do_not_end_are_named(launched: Launched, memory: MemoryScheduler) -> None:
    memory.deaf = True
    with pytest.raises(WaitTimeout, match=r"still runtime 102 \(pending\), training 101"):
        runs.cancel(launched.run, memory, 0.3)
    assert launched.run.read(launched.run.result, Result) is None


# --- a server that already runs ----------------------------------------------------------------------


def test_an_attached_server_is_published_privately(request_of: Make, memory: MemoryScheduler) -> None:
    server = Attached("http://node7:8000", "k3y", "other-run", 2, "nonce7")
    request = Request(request_of().resolved, "runtime-url", server)
    run = launch(request, memory).run
    flag = run.read(run.ready_flag, ReadyFlag)
    assert flag is not None and (flag.run_id, flag.nonce, flag.url) == ("other-run", "nonce7", server.url)
    assert run.read_text(run.runtime_api_key) == "k3y" and mode_of(run.runtime_api_key) == 0o600
    assert [spec.role for spec in memory.specs.values()] == ["training"]
    assert not next(iter(memory.specs.values())).held


def test_a_typed_variable_is_not_written_down(request_of: Make, memory: MemoryScheduler) -> None:
    request = request_of()
    command = ["launch", "environment.variables.TOKEN=s3cret", "training.cpus=1"]
    run = launch(Request(request.resolved, command=command), memory).run
    assert manifest(run).command == ["launch", "environment.variables.TOKEN=***", "training.cpus=1"]
