"""Questions to Slurm against recorded answers: no answer is never an end, and few questions are asked."""

from __future__ import annotations

import time

import pytest
from slurm_fakes import DOWN, NO_SUCH_ID, RECORDS, Fakes, Reply, row

from orchestrator.schedulers import JobState, SchedulerError
from orchestrator.schedulers import slurm_text as text
from orchestrator.schedulers.slurm import SlurmScheduler
from orchestrator.schedulers.slurm_cache import Cache
from orchestrator.schedulers.slurm_commands import LocalCommands

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


def test_one_task_is_asked_for_by_its_own_id(slurm: SlurmScheduler, fakes: Fakes) -> None:
    fakes.answers("squeue", Reply(out=row("58_2", "RUNNING", nodes="n[1-2]", left="9:59")))
    info = slurm.query(["58_2"])["58_2"]
    assert (info.job_id, info.host, info.time_left_s) == ("58_2", "n[1-2]", 599)


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
