"""The local scheduler against what Slurm does: holds, dependencies, limits, signals, requeue, chaos."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from jobkit import REPOSITORY, Bench, until

from orchestrator.identity import Process, start_time
from orchestrator.schedulers import JobState, SchedulerError, open_scheduler
from orchestrator.schedulers.local_files import JobFiles

SLEEPER = "echo up; sleep 1000 & wait\n"
STUBBORN = (
    "trap '' TERM\nsetsid --fork bash -c 'trap \"\" TERM; sleep 1000'\necho up; while :; do sleep 1; done\n"
)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.clean()


def test_mine_lists_every_job_that_is_not_over(bench: Bench) -> None:
    over, held = bench.submit("true\n"), bench.submit("true\n", held=True, token="of.mine", role="training")
    bench.ended(over)
    (own,) = bench.scheduler.mine()
    assert (own.info.job_id, own.info.state, own.role, own.token) == (
        held,
        JobState.HELD,
        "training",
        "of.mine",
    )
    assert own.run_id == bench.root.name and own.run_dir == str(bench.root)


# --- queue -------------------------------------------------------------------------------------------


def test_held_job_starts_when_released(bench: Bench) -> None:
    job = bench.submit("echo ran\n", held=True)
    assert bench.info(job).state == JobState.HELD
    start = time.monotonic()
    bench.scheduler.release(job)
    assert bench.info(job).state != JobState.HELD
    assert time.monotonic() - start < 0.5
    assert bench.ended(job).exit_code == 0
    assert bench.out(job) == "ran\n"


def test_releasing_a_running_job_changes_nothing_and_a_finished_one_is_refused(bench: Bench) -> None:
    job = bench.submit(SLEEPER)
    bench.said(job, "up")
    bench.scheduler.release(job)
    assert bench.info(job).state == JobState.RUNNING
    bench.scheduler.cancel([job])
    bench.ended(job)
    with pytest.raises(SchedulerError, match="over"):
        bench.scheduler.release(job)


def test_dependent_waits_until_the_other_has_started(bench: Bench) -> None:
    first = bench.submit(SLEEPER, held=True)
    second = bench.submit("echo ran\n", after=first)
    info = bench.info(second)
    assert (info.state, info.reason) == (JobState.PENDING, "Dependency")
    bench.scheduler.release(first)
    assert bench.ended(second).exit_code == 0
    assert bench.info(first).state == JobState.RUNNING


@pytest.mark.parametrize("how", ["cancelled while held", "failed to launch", "unknown id"])
def test_dependency_counts_as_met_however_the_other_left_the_queue(bench: Bench, how: str) -> None:
    """As under Slurm: a dependency never proves that the other job lives."""
    first = "9999"
    if how != "unknown id":
        first = bench.submit(SLEEPER, held=True, out=str(bench.root / "no" / "such" / "folder"))
    second = bench.submit("echo ran\n", after=first)
    if how == "cancelled while held":
        bench.scheduler.cancel([first])
    elif how == "failed to launch":
        bench.scheduler.release(first)
    assert bench.ended(second).exit_code == 0
    if how == "failed to launch":
        assert "JobLaunchFailure" in bench.ended(first).reason


def test_dependent_starts_when_the_supervisor_of_the_other_was_killed(bench: Bench) -> None:
    first = bench.submit(SLEEPER, held=True)
    second = bench.submit("echo ran\n", after=first)
    os.kill(bench.record(first).supervisor["pid"], signal.SIGKILL)
    assert bench.ended(second).exit_code == 0
    assert bench.info(first).state == JobState.GONE


def test_concurrent_submissions_get_ids_of_their_own(bench: Bench) -> None:
    with ThreadPoolExecutor(4) as pool:
        ids = list(pool.map(lambda _: bench.submit("exit 0\n"), range(6)))
    assert sorted(ids, key=int) == [str(n) for n in range(1, 7)]
    assert all(bench.ended(job).exit_code == 0 for job in ids)


def test_a_token_is_submitted_once(bench: Bench) -> None:
    job = bench.submit(SLEEPER, token="run.training")
    assert bench.scheduler.find("run.training") == job
    assert bench.submit("exit 1\n", token="run.training") == job
    assert bench.scheduler.find("run.train") is None


def test_a_submission_cut_short_is_taken_up_again(bench: Bench) -> None:
    """The submitter was killed when the job had its id and its supervisor had not been started."""
    job = bench.submit("echo ran\n", token="cut", held=True)
    files = JobFiles(bench.scheduler.jobs / job)
    supervisor = bench.record(job).supervisor
    os.kill(supervisor["pid"], signal.SIGKILL)
    until(lambda: not start_time(supervisor["pid"]), "the supervisor's death")
    files.publish(replace(bench.record(job), reason="Starting"))
    assert bench.info(job).state == JobState.GONE
    assert bench.submit("echo ran\n", token="cut", held=True) == job
    bench.scheduler.release(job)
    assert bench.ended(job).exit_code == 0


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"signal": "USR1"}, "NAME@SECONDS"),
        ({"signal": "NOPE@3"}, "NAME@SECONDS"),
        ({"time_limit_s": 0}, "above 0"),
        ({"script": Path("/no/such/script")}, "no job script"),
    ],
)
def test_senseless_submissions_are_refused(bench: Bench, changes: dict[str, object], word: str) -> None:
    with pytest.raises(SchedulerError, match=word):
        bench.submit("exit 0\n", **changes)


def test_the_port_opens_it(tmp_path: Path) -> None:
    scheduler = open_scheduler("local", tmp_path)
    assert scheduler.name == "local"
    assert scheduler.query(["1", "../x", ""])["../x"].state == JobState.GONE


# --- environment and logs ----------------------------------------------------------------------------


def test_environment_is_the_allow_list_and_what_the_scheduler_sets(bench: Bench) -> None:
    job = bench.submit("env; pwd; tty; cat\n", env={"PATH": "/usr/bin:/bin", "MINE": "a,b c"})
    bench.ended(job)
    lines = bench.out(job).splitlines()
    assert {"MINE=a,b c", f"ORCHESTRATE_JOB_ID={job}", "ORCHESTRATE_RESTARTS=0"} <= set(lines)
    names = {line.partition("=")[0] for line in lines if "=" in line}
    assert names <= {
        "PATH",
        "MINE",
        "ORCHESTRATE_JOB_ID",
        "ORCHESTRATE_RESTARTS",
        "PWD",
        "SHLVL",
        "_",
        "OLDPWD",
    }
    assert str(bench.root) in lines
    assert "not a tty" in lines


def test_the_script_is_taken_at_submission(bench: Bench) -> None:
    job = bench.submit("echo first\n", held=True, name="edited")
    (script,) = bench.root.glob("edited-*.sbatch")
    script.write_text("#!/bin/bash\necho second\n")
    bench.scheduler.release(job)
    bench.ended(job)
    assert bench.out(job, "edited") == "first\n"
    assert stat.S_IMODE((bench.scheduler.jobs / job).stat().st_mode) == 0o700


def test_a_script_without_interpreter_and_a_missing_folder_fail_to_launch(
    bench: Bench, tmp_path: Path
) -> None:
    plain = tmp_path / "plain.sbatch"
    plain.write_text("echo no\n")
    assert "must name an interpreter" in bench.ended(bench.submit("", script=plain)).reason
    assert "JobLaunchFailure" in bench.ended(bench.submit("exit 0\n", run_dir=tmp_path / "gone")).reason


def test_exit_codes(bench: Bench) -> None:
    failed, killed = bench.submit("exit 7\n"), bench.submit("kill -KILL $$\n")
    assert (bench.ended(failed).exit_code, bench.info(failed).raw) == (7, "FAILED")
    assert (bench.ended(killed).exit_code, "SIGKILL" in bench.info(killed).reason) == (137, True)


# --- signals, limits, ends ---------------------------------------------------------------------------


def test_warning_reaches_the_batch_shell_only_and_the_limit_ends_the_job(bench: Bench) -> None:
    script = (
        "trap 'echo warned' USR1; trap 'echo told; exit 9' TERM\n"
        "bash -c 'trap \"echo child\" USR1; while :; do sleep 0.05; done' & while :; do wait; done\n"
    )
    job = bench.submit(script, time_limit_s=2, signal="USR1@1")
    info = bench.ended(job)
    assert (info.raw, info.reason, info.exit_code) == ("TIMEOUT", "TimeLimit", 9)
    assert bench.out(job) == "warned\ntold\n"
    record = bench.record(job)
    assert 1.9 <= record.ended_at - record.started_at < 4
    bench.nothing_left()


def test_what_ignores_term_is_killed_after_killwait_with_its_whole_tree(bench: Bench) -> None:
    job = bench.submit(STUBBORN)
    bench.said(job, "up")
    assert len(bench.processes()) >= 5  # supervisor, keeper, shell, its sleep, and the one in its own session
    start = time.monotonic()
    bench.scheduler.cancel([job])
    assert bench.ended(job).raw == "CANCELLED"
    assert 0.9 <= time.monotonic() - start < 4
    bench.nothing_left()


def test_cancel_lets_traps_run_and_ends_a_pending_job_without_running_it(bench: Bench) -> None:
    trapped = bench.submit("trap 'echo term; exit 3' TERM; trap 'echo exit' EXIT\n" + SLEEPER)
    pending = bench.submit("echo never\n", held=True)
    bench.said(trapped, "up")
    bench.scheduler.cancel([trapped, pending, "77"])
    assert (bench.ended(trapped).raw, bench.info(trapped).exit_code) == ("CANCELLED", 3)
    assert bench.out(trapped) == "up\nterm\nexit\n"
    assert (bench.ended(pending).raw, bench.out(pending)) == ("CANCELLED", "")
    bench.nothing_left()


def test_what_a_finished_script_leaves_behind_is_ended(bench: Bench) -> None:
    job = bench.submit("setsid --fork sleep 1000; (setsid sleep 1000 &) ; exit 0\n")
    assert bench.ended(job).exit_code == 0
    bench.nothing_left(3)


def test_signal_goes_to_the_batch_shell(bench: Bench) -> None:
    job = bench.submit("trap 'echo got; exit 4' USR2\n" + SLEEPER)
    bench.said(job, "up")
    bench.scheduler.signal(job, "USR2")
    assert bench.ended(job).exit_code == 4
    with pytest.raises(SchedulerError, match="no signal"):
        bench.scheduler.signal(job, "BANG")


def test_requeue_keeps_id_counts_restarts_and_appends(bench: Bench) -> None:
    script = (
        "echo life $ORCHESTRATE_RESTARTS id $ORCHESTRATE_JOB_ID\n"
        '[ "$ORCHESTRATE_RESTARTS" = 1 ] && exit 0\n'
        "trap 'echo term; exit 143' TERM\n" + SLEEPER
    )
    job = bench.submit(script)
    bench.said(job, "up")
    bench.scheduler.requeue(job)
    assert bench.ended(job).exit_code == 0
    assert bench.out(job).splitlines() == [f"life 0 id {job}", "up", "term", f"life 1 id {job}"]


def test_requeue_asked_for_in_the_last_breath_counts(bench: Bench) -> None:
    """The request was accepted before the script ended, however fast that was."""
    python = (
        f"import sys; sys.path.insert(0, {str(REPOSITORY)!r}); from pathlib import Path;"
        "from orchestrator.schedulers.local import LocalScheduler;"
        f"LocalScheduler(Path({str(bench.root / '.local')!r})).requeue(sys.argv[1])"
    )
    script = (
        "echo life $ORCHESTRATE_RESTARTS; [ $ORCHESTRATE_RESTARTS = 1 ] && exit 0\ntrap '' TERM\n"
        f'{sys.executable} -c "{python}" $ORCHESTRATE_JOB_ID; exit 85\n'
    )
    job = bench.submit(script)
    assert bench.ended(job).exit_code == 0
    assert bench.out(job) == "life 0\nlife 1\n"


def test_requeue_can_be_forbidden_and_cancelled(bench: Bench) -> None:
    fixed = bench.submit(SLEEPER, requeue=False)
    with pytest.raises(SchedulerError, match="must not be requeued"):
        bench.scheduler.requeue(fixed)
    assert bench.info(fixed).state in (JobState.PENDING, JobState.RUNNING)
    slow = Bench(bench.root, requeue_delay_s=30)
    job = slow.submit("trap 'exit 1' TERM\n" + SLEEPER)
    slow.said(job, "up")
    slow.scheduler.requeue(job)
    info = slow.until(job, JobState.PENDING)
    assert (info.state, info.reason) == (JobState.PENDING, "BeginTime")
    slow.scheduler.cancel([job])
    assert slow.ended(job).raw == "CANCELLED"


# --- chaos -------------------------------------------------------------------------------------------


def test_jobs_outlive_a_killed_launcher(bench: Bench) -> None:
    program = (
        "import os, signal, sys\n"
        f"sys.path[:0] = [{str(REPOSITORY)!r}, {str(Path(__file__).parent)!r}]\n"
        "from pathlib import Path; from jobkit import Bench\n"
        f"print(Bench(Path({str(bench.root)!r})).submit('sleep 0.3; echo ran\\n'), flush=True)\n"
        "os.killpg(0, signal.SIGKILL)\n"
    )
    launcher = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=20, start_new_session=True
    )
    assert launcher.returncode == -signal.SIGKILL
    job = launcher.stdout.strip()
    bench.submitted.append(job)
    assert bench.ended(job).exit_code == 0
    assert bench.out(job) == "ran\n"


@pytest.mark.parametrize("script", [SLEEPER, STUBBORN], ids=["polite", "stubborn"])
@pytest.mark.parametrize("part", ["supervisor", "keeper"])
def test_a_killed_supervisor_or_keeper_takes_the_job_with_it(bench: Bench, part: str, script: str) -> None:
    job = bench.submit(script)
    bench.said(job, "up")
    os.kill(getattr(bench.record(job), part)["pid"], signal.SIGKILL)
    info = bench.ended(job, 6)
    bench.nothing_left(6)
    assert (info.state, info.raw) == (JobState.ENDED, "FAILED")
    assert part in info.reason and "killed" in info.reason


def test_a_killed_supervisor_of_a_pending_job_is_reported(bench: Bench) -> None:
    job = bench.submit(SLEEPER, held=True)
    os.kill(bench.record(job).supervisor["pid"], signal.SIGKILL)
    assert bench.until(job, JobState.GONE).reason == "its supervisor was killed"
    bench.scheduler.cancel([job])  # no error, as with scancel


def test_term_to_the_supervisor_cancels(bench: Bench) -> None:
    job = bench.submit(SLEEPER)
    bench.said(job, "up")
    os.kill(bench.record(job).supervisor["pid"], signal.SIGTERM)
    assert bench.ended(job).raw == "CANCELLED"


def test_a_job_of_another_machine_is_unknown_and_of_an_earlier_boot_gone(bench: Bench) -> None:
    job = bench.submit("exit 0\n")
    bench.ended(job)
    bench.nothing_left()
    files, record = JobFiles(bench.scheduler.jobs / job), bench.record(job)
    elsewhere = dict(record.supervisor) | {"host": "node7", "place": "another boot"}
    files.publish(replace(record, state="running", supervisor=elsewhere, keeper={}))
    assert bench.info(job).state == JobState.UNKNOWN
    files.publish(
        replace(record, state="running", supervisor=elsewhere | {"host": os.uname().nodename}, keeper={})
    )
    assert bench.info(job).state == JobState.GONE
    files.publish(record)


def test_a_reused_pid_is_not_taken_for_the_process() -> None:
    me = Process.of(os.getpid())
    assert me.alive() is True
    assert replace(me, start=me.start - 1).alive() is False
