"""Submissions and requests to Slurm against recorded answers: every shape of a bad day, without a cluster."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from slurm_fakes import DOWN, LOST, NO_SUCH_ID, Fakes, Reply, row

from orchestrator.schedulers import (
    JobSpec,
    RequeueRefused,
    SchedulerError,
    SubmissionUnknown,
    open_scheduler,
)
from orchestrator.schedulers.slurm import SlurmScheduler
from orchestrator.schedulers.slurm_commands import LocalCommands


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
