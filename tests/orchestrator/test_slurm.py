"""The Slurm scheduler against recorded answers: every shape of a bad day, without a cluster."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from slurm_fakes import DOWN, NO_SUCH_ID, Fakes, Reply

from orchestrator.schedulers import (
    JobSpec,
    JobState,
    RequeueRefused,
    SchedulerError,
    SubmissionUnknown,
    open_scheduler,
)
from orchestrator.schedulers import slurm_text as text
from orchestrator.schedulers.slurm import SlurmScheduler
from orchestrator.schedulers.slurm_cache import Cache
from orchestrator.schedulers.slurm_commands import LocalCommands
from orchestrator.schedulers.slurm_text import Trouble

LOST = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation\n"


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fakes]:
    folder = tmp_path / "slurm"
    folder.mkdir()
    made = Fakes(folder)
    monkeypatch.setenv("PATH", f"{made.bin}:/usr/bin:/bin")
    yield made


@pytest.fixture
def slurm(fakes: Fakes) -> SlurmScheduler:
    return SlurmScheduler(LocalCommands(), patience_s=20, timeout_s=20)


@pytest.fixture
def hasty(fakes: Fakes) -> SlurmScheduler:
    """For what fails in the end."""
    return SlurmScheduler(LocalCommands(), patience_s=1.2, timeout_s=20)


def spec(tmp_path: Path, **changes: Any) -> JobSpec:
    values: dict[str, Any] = {
        "role": "runtime",
        "name": "dev-runtime",
        "script": tmp_path / "runtime.sbatch",
        "run_dir": tmp_path,
        "out": "o",
        "err": "e",
        "env": {"HOME": "/home/me"},
        "time_limit_s": 60,
        "signal": "USR1@5",
        "token": "T1",
        "args": ["--comment=run=r1;role=runtime;token=T1"],
    }
    return JobSpec(**(values | changes))


def row(job_id: str, word: str, reason: str = "None", nodes: str = "", left: str = "1:00:00") -> str:
    return f"{job_id}|{word}|{nodes}|{left}|(null)|{reason}\n"


# --- words -------------------------------------------------------------------------------------------

TABLE = {
    JobState.PENDING: "PENDING REQUEUED REQUEUE_FED EXPEDITING",
    JobState.HELD: "REQUEUE_HOLD RESV_DEL_HOLD SPECIAL_EXIT",
    JobState.RUNNING: "CONFIGURING RUNNING SUSPENDED STOPPED COMPLETING SIGNALING STAGE_OUT RESIZING "
    "POWER_UP_NODE UPDATE_DB A_WORD_OF_THE_FUTURE",
    JobState.ENDED: "COMPLETED FAILED TIMEOUT CANCELLED NODE_FAIL OUT_OF_MEMORY PREEMPTED BOOT_FAIL DEADLINE "
    "REVOKED LAUNCH_FAILED RECONFIG_FAIL",
}
WORDS = [(word, state) for state, words in TABLE.items() for word in words.split()]


@pytest.mark.parametrize(("word", "state"), WORDS)
def test_every_word_of_slurm(word: str, state: JobState) -> None:
    assert text.state_of(word) == text.state_of(word.lower()) == state
    assert text.state_of(word, "Priority") == state


@pytest.mark.parametrize(
    ("reason", "state"),
    [
        ("JobHeldUser", JobState.HELD),
        ("JobHeldAdmin", JobState.HELD),
        ("JobHoldMaxRequeue", JobState.HELD),
        ("Dependency", JobState.PENDING),
        ("BeginTime", JobState.PENDING),
        ("QOSMaxJobsPerUserLimit", JobState.PENDING),
    ],
)
def test_what_a_pending_job_waits_for(reason: str, state: JobState) -> None:
    assert text.state_of("PENDING", reason) == state
    assert text.state_of("RUNNING", reason) == JobState.RUNNING


@pytest.mark.parametrize(
    ("said", "word"), [("CANCELLED by 1000", "CANCELLED"), ("CANCELLED+", "CANCELLED"), ("", "")]
)
def test_words_with_more_behind(said: str, word: str) -> None:
    assert text.word_of(said) == word


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ("0:0", 0),
        ("7:0", 7),
        ("0:15", 143),
        ("0:9", 137),
        ("85:0", 85),
        ("143:0", 143),
        ("", None),
        ("x", None),
    ],
)
def test_exit_codes(said: str, code: int | None) -> None:
    assert text.exit_code(said) == code


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        ("59", 59),
        ("1:00", 60),
        ("1:00:00", 3600),
        ("2-01:00:01", 176401),
        ("UNLIMITED", None),
        ("INVALID", None),
        ("NOT_SET", None),
        ("", None),
    ],
)
def test_time_left(said: str, seconds: int | None) -> None:
    assert text.seconds(said) == seconds


# What `scontrol -o show job` prints, of several releases.
RECORDS = [
    "JobId=7 JobName=a b UserId=me(1000) GroupId=me(1000) MCS_label=N/A Priority=1 Nice=0 "
    "Account=(null) QOS=normal JobState=FAILED Reason=NonZeroExitCode Dependency=(null) Requeue=1 "
    "Restarts=0 BatchFlag=1 Reboot=0 ExitCode=7:0 RunTime=00:00:01 TRES=cpu=1,node=1 "
    "Comment=run=r1;role=x;token=t Command=/a b/x.sh",
    "JobId=58 ArrayJobId=58 ArrayTaskId=2 JobName=x JobState=COMPLETED Reason=None ExitCode=0:0 "
    "NtasksPerN:B:S:C=0:0:*:1 ReqB:S:C:T=0:0:*:* TresPerNode=gres/gpu:1",
]


def test_fields_of_a_job() -> None:
    first, second = (text.fields(record) for record in RECORDS)
    assert (first["ExitCode"], first["JobName"], first["Command"]) == ("7:0", "a b", "/a b/x.sh")
    assert first["Comment"] == "run=r1;role=x;token=t" and first["TRES"] == "cpu=1,node=1"
    assert (second["ExitCode"], second["ArrayTaskId"]) == ("0:0", "2")
    assert text.fields("") == {}


@pytest.mark.parametrize(
    ("rc", "said", "kind"),
    [
        (1, LOST, Trouble.AMBIGUOUS),
        (255, "ssh: connect to host login port 22", Trouble.AMBIGUOUS),
        (124, "", Trouble.AMBIGUOUS),
        (-9, "", Trouble.AMBIGUOUS),
        (1, "sbatch: error: Zero Bytes were transmitted or received", Trouble.AMBIGUOUS),
        (1, DOWN.err, Trouble.UNREACHABLE),
        (1, "error: Slurm backup controller in standby mode", Trouble.UNREACHABLE),
        (1, "sbatch: error: invalid partition specified: x", Trouble.REFUSED),
        (1, "sbatch: unrecognized option '--gress'", Trouble.REFUSED),
        (127, "sbatch is not on the PATH of this machine", Trouble.REFUSED),
    ],
)
def test_what_an_error_means(rc: int, said: str, kind: Trouble) -> None:
    assert text.trouble(rc, said) == kind


@pytest.mark.parametrize(
    ("said", "job_id"),
    [
        ("42\n", "42"),
        ("42;cluster\n", "42"),
        ("Submitted batch job 42\n", ""),
        ("", ""),
        ("warn\n42\n", "42"),
    ],
)
def test_the_answer_of_sbatch(said: str, job_id: str) -> None:
    assert text.submitted(said) == job_id


def test_a_token_is_found_among_foreign_comments() -> None:
    rows = "1|RUNNING|\n2|PENDING|token=T1x\n3|PENDING|a|b;token=T1\n4_[1-4%1]|PENDING|run=r;token=T1\nx\n"
    assert text.with_token(rows, "T1") == ["3", "4"]
    assert text.with_token("5|CANCELLED|token=T\n6|RUNNING|token=T\n", "T") == ["6", "5"]
    assert text.with_token(rows, "T") == []


# --- arrays ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "state", "task"),
    [
        ("58_1|FAILED 58_2|RUNNING 58_3|PENDING", JobState.RUNNING, "58_2"),
        ("58_1|FAILED 58_2|PENDING 58_3|PENDING", JobState.PENDING, "58_2"),
        ("58|CANCELLED 58_1|FAILED 58_2|COMPLETED", JobState.ENDED, "58_2"),
        ("58_1|TIMEOUT 58_2|FAILED 58_3|CANCELLED", JobState.ENDED, "58_2"),
        ("58_1|CANCELLED 58_2|CANCELLED", JobState.ENDED, "58_2"),
        ("58_1|COMPLETED 58_2|COMPLETING", JobState.RUNNING, "58_2"),
        ("58|CANCELLED", JobState.ENDED, ""),
    ],
)
def test_an_array_is_judged_by_its_tasks(rows: str, state: JobState, task: str) -> None:
    lines = "".join(row(*pair.split("|")) for pair in rows.split())
    info = text.pick("58", text.rows(lines))
    assert info is not None and (info.job_id, info.state, info.task) == ("58", state, task)
    assert text.pick("5", text.rows(lines)) is None


def test_one_task_is_asked_for_by_its_own_id(slurm: SlurmScheduler, fakes: Fakes) -> None:
    fakes.answers("squeue", Reply(out=row("58_2", "RUNNING", nodes="n[1-2]", left="9:59")))
    info = slurm.query(["58_2"])["58_2"]
    assert (info.job_id, info.host, info.time_left_s) == ("58_2", "n[1-2]", 599)


# --- submitting --------------------------------------------------------------------------------------


def test_what_sbatch_gets(slurm: SlurmScheduler, fakes: Fakes, tmp_path: Path) -> None:
    fakes.answers("sbatch", Reply(out="42;test\n", err="sbatch: a warning\n"))
    assert slurm.submit(spec(tmp_path, held=True)) == "42"
    assert fakes.calls("sbatch") == [
        ["--parsable", "--comment=run=r1;role=runtime;token=T1", "--hold", f"{tmp_path}/runtime.sbatch"]
    ]
    assert slurm.submit(spec(tmp_path, after="41", args=[])) == "42"
    assert fakes.calls("sbatch")[1][1] == "--dependency=after:41"


def test_nothing_foreign_reaches_the_commands(
    slurm: SlurmScheduler, fakes: Fakes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = {"SLURM_CPU_BIND": "x", "SBATCH_PARTITION": "x", "SQUEUE_FORMAT": "%k", "AWS_SECRET": "s"}
    for name, value in {**foreign, "SLURM_CONF": "/etc/my.conf"}.items():
        monkeypatch.setenv(name, value)
    fakes.answers("sbatch", Reply(out="42\n"))
    fakes.answers("squeue", Reply(out=row("42", "RUNNING")))
    slurm.submit(spec(tmp_path, env={"PATH": os.environ["PATH"], "CUDA_HOME": "/cuda"}))
    slurm.query(["42"])
    for command in ("sbatch", "squeue"):
        seen = fakes.environment(command)
        assert seen["SLURM_CONF"] == "/etc/my.conf" and not seen.keys() & foreign.keys()
    assert fakes.environment("sbatch")["CUDA_HOME"] == "/cuda"


def test_success_with_a_frightening_warning(slurm: SlurmScheduler, fakes: Fakes, tmp_path: Path) -> None:
    words = "sbatch: error: Slurm temporarily unable to accept job, sleeping and retrying\n"
    fakes.answers("sbatch", Reply(out="42\n", err=words))
    assert slurm.submit(spec(tmp_path)) == "42" and len(fakes.calls("sbatch")) == 1


@pytest.mark.parametrize(
    "reply",
    [
        Reply(1, err=LOST),
        Reply(255, err="client_loop: send disconnect: Broken pipe\n"),
        Reply(0, out="", err=""),
        Reply(-9),
        Reply(1, err="sbatch: error: Batch job submission failed: Unexpected message received\n"),
    ],
)
def test_a_lost_answer_is_looked_up_and_never_asked_again(
    reply: Reply, slurm: SlurmScheduler, fakes: Fakes, tmp_path: Path
) -> None:
    fakes.answers("sbatch", reply, Reply(out="99\n"))
    fakes.answers("squeue", DOWN, Reply(), Reply(out="7|RUNNING|token=other\n42|PENDING|token=T1;x=1\n"))
    assert slurm.submit(spec(tmp_path)) == "42"
    assert len(fakes.calls("sbatch")) == 1 and len(fakes.calls("squeue")) == 3


def test_our_own_timeout_is_a_lost_answer(fakes: Fakes, tmp_path: Path) -> None:
    slurm = SlurmScheduler(LocalCommands(), patience_s=20, timeout_s=3)
    fakes.answers("sbatch", Reply(out="42\n", delay=30))
    fakes.answers("squeue", Reply(out="42|PENDING|token=T1\n"))
    assert slurm.submit(spec(tmp_path)) == "42" and len(fakes.calls("sbatch")) == 1


def test_a_job_that_never_shows_is_said_to_be_unknown(
    hasty: SlurmScheduler, fakes: Fakes, tmp_path: Path
) -> None:
    fakes.answers("sbatch", Reply(1, err=LOST))
    fakes.answers("squeue", Reply())
    with pytest.raises(SubmissionUnknown, match=r"Socket timed out(.|\n)*may still appear.*token T1"):
        hasty.submit(spec(tmp_path))
    assert len(fakes.calls("sbatch")) == 1 and len(fakes.calls("squeue")) > 1


def test_a_controller_that_comes_back(slurm: SlurmScheduler, fakes: Fakes, tmp_path: Path) -> None:
    fakes.answers("sbatch", DOWN, DOWN, Reply(out="42\n"))
    assert slurm.submit(spec(tmp_path)) == "42" and len(fakes.calls("sbatch")) == 3


def test_a_controller_that_stays_away(hasty: SlurmScheduler, fakes: Fakes, tmp_path: Path) -> None:
    with pytest.raises(SchedulerError, match=r"was not reached for 1.2 s, and nothing was submitted"):
        hasty.submit(spec(tmp_path))


def test_a_refusal_is_final(slurm: SlurmScheduler, fakes: Fakes, tmp_path: Path) -> None:
    said = (
        "sbatch: error: invalid partition specified: x\nsbatch: error: Batch job submission failed: Invalid\n"
    )
    fakes.answers("sbatch", Reply(1, err=said))
    with pytest.raises(SchedulerError, match=r"submission failed: Invalid \(sbatch refused runtime.sbatch\)"):
        slurm.submit(spec(tmp_path))
    assert len(fakes.calls("sbatch")) == 1 and not fakes.calls("squeue")


def test_without_sbatch(
    slurm: SlurmScheduler, fakes: Fakes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (fakes.bin / "sbatch").unlink()
    monkeypatch.setenv("PATH", str(fakes.bin))
    with pytest.raises(SchedulerError, match="sbatch is not on the PATH of this machine"):
        slurm.submit(spec(tmp_path))


def test_a_trial_gives_the_script_and_keeps_no_promise(slurm: SlurmScheduler, fakes: Fakes) -> None:
    fakes.answers(
        "sbatch", Reply(0, err="sbatch: Job 9 to start at 4068-01-01T00:00:00 using 1 processors\n")
    )
    assert slurm.test_only(["--nodes=1"], "#!/bin/bash\n", {}).accepted is True
    assert fakes.given("sbatch") == "#!/bin/bash\n"
    fakes.answers(
        "sbatch", Reply(1, err="allocation failure: Requested node configuration is not available\n")
    )
    refused = slurm.test_only([], "", {})
    assert (refused.accepted, "not available" in refused.message) == (False, True)
    fakes.answers("sbatch", DOWN)
    assert slurm.test_only([], "", {}).accepted is None


def test_finding_by_token(slurm: SlurmScheduler, fakes: Fakes) -> None:
    fakes.answers("squeue", Reply(out="42_[1-4%1]|PENDING|run=r;role=x;token=T1\n"))
    assert slurm.find("T1") == "42" and slurm.find("T2") is None
    assert fakes.calls("squeue")[0] == ["-h", "--me", "-t", "all", "-o", "%i|%T|%k"]
    fakes.answers("squeue", DOWN)
    with pytest.raises(SchedulerError, match="squeue has no answer: Unable to contact"):
        slurm.find("T1")
    fakes.answers("squeue", Reply())
    fakes.answers("sacct", Reply(out="40|COMPLETED|token=T1\n"))
    assert SlurmScheduler(LocalCommands()).find("T1") == "40"


# --- asking ------------------------------------------------------------------------------------------


def test_one_question_for_many_jobs(slurm: SlurmScheduler, fakes: Fakes) -> None:
    rows = row("1", "RUNNING", nodes="n1") + row("2", "PENDING", "JobHeldUser") + row("9", "RUNNING")
    fakes.answers("squeue", Reply(out=rows + "what\n"))
    found = slurm.query(["1", "2", "1"])
    assert [found[i].state for i in ("1", "2")] == [JobState.RUNNING, JobState.HELD]
    assert fakes.calls("squeue") == [
        ["-h", "-r", "-t", "all", "-o", "%i|%T|%N|%L|%E|%r", "--me", "-j", "1,2"]
    ]


@pytest.mark.parametrize(
    "reply",
    [
        DOWN,
        Reply(1, err="slurm_load_jobs error: Socket timed out on send/recv operation\n"),
        Reply(1, err="squeue: fatal: Could not establish a configuration source\n"),
        Reply(255, err="ssh: Could not resolve hostname login\n"),
        Reply(-11),
        Reply(1, err="slurm_load_jobs error: An error of the future\n"),
    ],
)
def test_no_answer_is_never_an_end(reply: Reply, slurm: SlurmScheduler, fakes: Fakes) -> None:
    fakes.answers("squeue", reply)
    for ids in (["1"], ["1", "2"]):
        assert {info.state for info in slurm.query(ids).values()} == {JobState.UNKNOWN}
    assert not fakes.calls("sacct") and not fakes.calls("scancel")


def test_a_hanging_controller_is_no_answer(fakes: Fakes) -> None:
    slurm = SlurmScheduler(LocalCommands(), timeout_s=0.3)
    fakes.answers("squeue", Reply(delay=30))
    began = time.monotonic()
    info = slurm.query(["1"])["1"]
    assert info.state == JobState.UNKNOWN and "no answer within 0.3 s" in info.reason
    assert time.monotonic() - began < 10


def test_gone_is_what_an_answering_controller_does_not_know(slurm: SlurmScheduler, fakes: Fakes) -> None:
    fakes.answers("squeue", NO_SUCH_ID)
    assert slurm.query(["1"])["1"].state == JobState.GONE
    fakes.answers("squeue", Reply(out=row("2", "RUNNING")), NO_SUCH_ID)
    found = slurm.query(["3", "2", "x; rm"])
    assert [found[i].state for i in ("2", "3", "x; rm")] == [JobState.RUNNING, JobState.GONE, JobState.GONE]
    assert all("rm" not in " ".join(argv) for argv in fakes.calls("squeue"))


def test_a_list_that_is_half_answered_is_not_half_gone(slurm: SlurmScheduler, fakes: Fakes) -> None:
    fakes.answers("squeue", Reply(out=row("2", "RUNNING")), DOWN)
    found = slurm.query(["2", "3"])
    assert (found["2"].state, found["3"].state) == (JobState.RUNNING, JobState.UNKNOWN)


def test_many_missing_jobs_are_asked_for_together(slurm: SlurmScheduler, fakes: Fakes) -> None:
    ids = [str(number) for number in range(1, 9)]
    fakes.answers("squeue", Reply(out=row("1", "RUNNING")), Reply(out=row("2", "RUNNING")))
    states = [info.state for info in slurm.query(ids).values()]
    assert states == [JobState.RUNNING] * 2 + [JobState.GONE] * 6
    assert len(fakes.calls("squeue")) == 2 and "--me" not in fakes.calls("squeue")[1]


def test_the_exit_code_comes_from_scontrol(slurm: SlurmScheduler, fakes: Fakes) -> None:
    fakes.answers("squeue", Reply(out=row("7", "FAILED", "NonZeroExitCode")))
    fakes.answers("scontrol", Reply(out=RECORDS[0] + "\n"))
    assert slurm.query(["7"])["7"].exit_code == 7
    fakes.answers("scontrol", DOWN)
    info = slurm.query(["7"], fresh=True)["7"]
    assert (info.state, info.exit_code) == (JobState.ENDED, None)


def test_accounting_is_asked_once_where_there_is_none(slurm: SlurmScheduler, fakes: Fakes) -> None:
    fakes.answers("squeue", NO_SUCH_ID)
    for job_id in ("1", "2", "3"):
        assert slurm.query([job_id])[job_id].state == JobState.GONE
    assert len(fakes.calls("sacct")) == 1


@pytest.mark.parametrize(
    ("said", "state", "code"),
    [
        ("7|COMPLETED|0:0|n1|\n", JobState.ENDED, 0),
        ("7|CANCELLED by 1000|0:15|n1|\n", JobState.ENDED, 143),
        ("7|PREEMPTED|0:0|n1|\n7|FAILED|3:0|n2|\n", JobState.ENDED, 3),  # -D: the last life counts
        ("7_1|FAILED|85:0|n1|\n7_2|COMPLETED|0:0|n1|\n7_[3-4]|CANCELLED by 5|0:0||\n", JobState.ENDED, 0),
        ("7|RUNNING|0:0|n1|\n", JobState.GONE, None),  # a runaway job of the database
        ("70|COMPLETED|0:0|n1|\n", JobState.GONE, None),
        ("", JobState.GONE, None),
    ],
)
def test_purged_jobs_where_there_is_accounting(
    said: str, state: JobState, code: int | None, slurm: SlurmScheduler, fakes: Fakes
) -> None:
    fakes.answers("squeue", NO_SUCH_ID)
    fakes.answers("sacct", Reply(out=said))
    info = slurm.query(["7"])["7"]
    assert (info.state, info.exit_code) == (state, code)


def test_our_own_jobs_by_their_label(slurm: SlurmScheduler, fakes: Fakes) -> None:
    ours = "42|PENDING||1:00:00|after:41(unfulfilled)|Dependency|run=r1;role=training;token=T1|/runs/a|b/r1\n"
    fakes.answers("squeue", Reply(out=ours + "43|RUNNING|n1|1:00|(null)|None|somebody's own|/home\n"))
    (own,) = slurm.mine()
    assert (own.run_id, own.role, own.token, own.run_dir) == ("r1", "training", "T1", "/runs/a|b/r1")
    assert own.info.dependency == "after:41(unfulfilled)" and own.info.reason == "Dependency"
    fakes.answers("squeue", DOWN)
    with pytest.raises(SchedulerError):
        slurm.mine()


# --- the cache ---------------------------------------------------------------------------------------


def test_answers_are_kept_longer_while_nothing_changes() -> None:
    now = 0.0
    cache = Cache(0.5, 5.0, clock=lambda: now)
    (info,) = text.rows(row("1", "RUNNING"))
    kept = []
    for _ in range(9):
        cache.put({"1": info})
        start = now
        while cache.of(["1"]):
            now += 0.125
        kept.append(now - start)
    assert kept[0] == 0.5 and kept == sorted(kept) and 4.75 <= kept[-1] <= 5.125
    (ended,) = text.rows(row("1", "FAILED"))
    cache.put({"1": ended})
    now += 0.5
    assert not cache.of(["1"])


def test_an_answer_is_used_again_unless_it_must_be_fresh(slurm: SlurmScheduler, fakes: Fakes) -> None:
    fakes.answers("squeue", Reply(out=row("1", "RUNNING")))
    fakes.answers("scontrol", Reply())
    for fresh in (False, False, True):
        slurm.query(["1"], fresh=fresh)
    assert len(fakes.calls("squeue")) == 2
    slurm.release("1")
    slurm.query(["1"])
    assert len(fakes.calls("squeue")) == 3


# --- requests ----------------------------------------------------------------------------------------


def test_releasing_what_is_no_longer_held_is_no_error(slurm: SlurmScheduler, fakes: Fakes) -> None:
    fakes.answers("scontrol", Reply(1, err="Job has already finished for job 1\n"))
    fakes.answers("squeue", Reply(out=row("1", "RUNNING")), NO_SUCH_ID)
    slurm.release("1")
    slurm.release("1")


@pytest.mark.parametrize(
    ("reason", "says"),
    [("JobHeldAdmin", "held by an administrator"), ("JobHeldUser", "was not released: no")],
)
def test_releasing_what_stays_held_is_one(
    reason: str, says: str, slurm: SlurmScheduler, fakes: Fakes
) -> None:
    fakes.answers("scontrol", Reply(1, err="scontrol: error: no\n"))
    fakes.answers("squeue", Reply(out=row("1", "PENDING", reason)))
    with pytest.raises(SchedulerError, match=says):
        slurm.release("1")


def test_one_call_cancels_all(slurm: SlurmScheduler, fakes: Fakes) -> None:
    gone = "scancel: error: Kill job error on job id 2: Invalid job id specified\n"
    fakes.answers("scancel", DOWN, Reply(1, err=gone))
    slurm.cancel(["1", "2", "3_1", "1"])
    assert fakes.calls("scancel") == [["1", "2", "3_1"]] * 2
    slurm.cancel([])
    assert len(fakes.calls("scancel")) == 2


@pytest.mark.parametrize("reply", [DOWN, Reply(1, err="scancel: error: Access/permission denied\n")])
def test_a_cancel_that_did_not_get_through(reply: Reply, hasty: SlurmScheduler, fakes: Fakes) -> None:
    fakes.answers("scancel", reply)
    with pytest.raises(SchedulerError, match="scancel of 1, 2"):
        hasty.cancel(["1", "2"])


@pytest.mark.parametrize("job_id", ["", "-u", "1,2", "1 2", "all", "1_", "1;rm"])
def test_only_a_job_id_is_cancelled(job_id: str, slurm: SlurmScheduler, fakes: Fakes) -> None:
    for ask in (lambda i: slurm.cancel([i]), slurm.release, slurm.requeue, lambda i: slurm.signal(i, "USR1")):
        with pytest.raises(SchedulerError, match="is no job id of Slurm"):
            ask(job_id)
    assert not fakes.calls("scancel") and not fakes.calls("scontrol")


def test_a_signal_goes_to_the_batch_shell(slurm: SlurmScheduler, fakes: Fakes) -> None:
    fakes.answers("scancel", Reply())
    slurm.signal("1_2", "SIGUSR1")
    assert fakes.calls("scancel") == [["--batch", "--signal=USR1", "1_2"]]
    with pytest.raises(SchedulerError, match="there is no signal"):
        slurm.signal("1", "USR1 -u root")


def test_a_requeue_of_an_array_is_of_the_task_that_runs(slurm: SlurmScheduler, fakes: Fakes) -> None:
    fakes.answers("squeue", Reply(out=row("58_1", "FAILED") + row("58_2", "RUNNING")))
    fakes.answers("scontrol", Reply())
    slurm.requeue("58")
    assert fakes.calls("scontrol")[-1] == ["requeue", "58_2"]


def test_a_requeue_that_is_not_allowed_has_its_own_error(slurm: SlurmScheduler, fakes: Fakes) -> None:
    fakes.answers("squeue", Reply(out=row("1", "RUNNING")))
    fakes.answers("scontrol", Reply(1, err="Requested operation is presently disabled for job 1\n"))
    with pytest.raises(RequeueRefused, match="on_timeout=array needs no such right"):
        slurm.requeue("1")
    fakes.answers("scontrol", Reply(1, err="Job has already finished for job 1\n"))
    with pytest.raises(SchedulerError, match="was not requeued: Job has already finished"):
        slurm.requeue("1")
    fakes.answers("scontrol", Reply(1, err="Socket timed out\n"), Reply(1, err="Job is pending execution\n"))
    slurm.requeue("1")  # the first request had arrived


def test_without_slurm_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SchedulerError, match=r"login node of the cluster, or use scheduler\.kind=local"):
        open_scheduler("slurm", tmp_path)
