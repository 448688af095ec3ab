"""What Slurm prints, read: every word, reason, code and error message that a release may say."""

from __future__ import annotations

import pytest
from slurm_fakes import DOWN, LOST, RECORDS, row

from orchestrator.schedulers import JobState
from orchestrator.schedulers import slurm_text as text
from orchestrator.schedulers.slurm_text import Trouble

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


@pytest.mark.parametrize(
    ("word", "reason", "shown"),
    [
        ("PENDING", "BeginTime", "BeginTime"),
        ("PENDING", "JobHeldUser", "JobHeldUser"),
        ("CANCELLED", "BeginTime", ""),
        ("CANCELLED", "JobHeldUser", ""),
        ("RUNNING", "Priority", ""),
        ("COMPLETING", "NonZeroExitCode", "NonZeroExitCode"),
        ("FAILED", "NonZeroExitCode", "NonZeroExitCode"),
        ("FAILED", "RaisedSignal:9(Killed)", "RaisedSignal:9(Killed)"),
        ("NODE_FAIL", "NodeDown", "NodeDown"),
        ("TIMEOUT", "TimeLimit", "TimeLimit"),
        ("CANCELLED", "DependencyNeverSatisfied", "DependencyNeverSatisfied"),
    ],
)
def test_a_reason_to_wait_is_not_one_to_end(word: str, reason: str, shown: str) -> None:
    """Slurm keeps the last reason of a job that is cancelled while it waits."""
    assert text.rows(row("7", word, reason))[0].reason == shown


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
