"""The Slurm scheduler on a real Slurm: every verb, every end, a controller that comes and goes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from cluster import Cluster
from slurmkit import Desk

from orchestrator.schedulers import OVER, JobState, RequeueRefused, SchedulerError

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.fixture
def desk(cluster: Cluster) -> Iterator[Desk]:
    desk = Desk(cluster)
    yield desk
    desk.clean()


def test_held_until_released(desk: Desk) -> None:
    spec = desk.spec("exit 7", held=True)
    job_id = desk.take(spec)
    assert desk.info(job_id).state == JobState.HELD
    assert desk.scheduler.find(spec.token) == job_id and desk.scheduler.find("other") is None
    own = {own.token: own for own in desk.scheduler.mine()}[spec.token]
    assert (own.run_id, own.role, own.run_dir) == (desk.root.name, "runtime", str(desk.root))
    desk.scheduler.release(job_id)
    info = desk.until(job_id, JobState.ENDED)
    assert (info.exit_code, info.raw, info.host) == (7, "FAILED", info.host) and info.host.startswith("cpu")
    desk.scheduler.release(job_id)  # over, and that is no error


def test_after_another_one(desk: Desk) -> None:
    first = desk.submit("true", held=True)
    second = desk.submit("true", after=first)
    desk.wait(lambda: desk.info(second).reason == "Dependency", "the dependency to be noticed")
    info = desk.info(second)
    assert (info.state, info.dependency) == (JobState.PENDING, f"after:{first}(unfulfilled)")
    desk.scheduler.release(first)
    assert desk.until(second, JobState.ENDED).exit_code == 0


def test_every_end_has_its_exit_code(desk: Desk) -> None:
    ends = {"exit 0": 0, "exit 85": 85, "kill -9 $$": 137, "kill -TERM $$": 143}
    ids = {desk.submit(text): code for text, code in ends.items()}
    for job_id, code in ids.items():
        assert desk.until(job_id, JobState.ENDED).exit_code == code
    known = desk.scheduler.query([*ids, "999999"])
    assert [known[job_id].exit_code for job_id in ids] == list(ends.values())
    assert known["999999"].state == JobState.GONE


def test_a_cancelled_job_runs_its_trap(desk: Desk) -> None:
    job_id = desk.submit("trap 'echo told; exit 3' TERM; echo up; sleep 100 & wait")
    pending = desk.submit("true", held=True)
    desk.said(job_id, "up")
    left = desk.info(job_id).time_left_s
    assert left is None or left > 60
    desk.scheduler.cancel([job_id, pending, "999999"])
    assert {desk.until(i, *OVER).raw for i in (job_id, pending)} == {"CANCELLED"}
    desk.said(job_id, "told")


def test_a_signal_reaches_the_batch_shell_alone(desk: Desk) -> None:
    job_id = desk.submit("trap 'echo warned; exit 4' USR1; bash -c 'sleep 100' & echo up; wait; wait")
    desk.said(job_id, "up")
    desk.scheduler.signal(job_id, "USR1")
    assert desk.until(job_id, JobState.ENDED).exit_code == 4
    with pytest.raises(SchedulerError, match=f"job {job_id} did not get USR1"):
        desk.scheduler.signal(job_id, "USR1")


def test_a_requeued_job_has_the_same_id(desk: Desk) -> None:
    job_id = desk.submit(
        "echo life ${SLURM_RESTART_COUNT:-0}; [ $SLURM_RESTART_COUNT ] || sleep 100", "--requeue"
    )
    desk.said(job_id, "life 0")
    desk.scheduler.requeue(job_id)
    desk.said(job_id, "life 1")
    assert desk.until(job_id, JobState.ENDED).exit_code == 0


def test_a_requeue_that_the_job_forbids(desk: Desk) -> None:
    job_id = desk.submit("echo up; sleep 100", "--no-requeue")
    desk.said(job_id, "up")
    with pytest.raises(RequeueRefused, match="disabled"):
        desk.scheduler.requeue(job_id)
    assert desk.info(job_id).state == JobState.RUNNING


def test_an_array_that_resumes_itself(desk: Desk) -> None:
    text = "sleep 1; [ $SLURM_ARRAY_TASK_ID = 2 ] || exit 5; scancel --state=PENDING $SLURM_ARRAY_JOB_ID"
    spec = desk.spec(text, "--array=1-4%1", held=True)
    job_id = desk.take(spec)
    assert desk.scheduler.find(spec.token) == job_id and desk.info(job_id).state == JobState.HELD
    desk.scheduler.release(job_id)
    assert desk.until(job_id, JobState.RUNNING).task in (f"{job_id}_1", f"{job_id}_2")
    info = desk.until(job_id, JobState.ENDED)
    assert (info.exit_code, info.task) == (0, f"{job_id}_2")
    assert desk.info(f"{job_id}_1").exit_code == 5


def test_cancelling_an_array_ends_all_of_it(desk: Desk) -> None:
    job_id = desk.submit("echo up; sleep 100", "--array=1-3%1")
    desk.until(job_id, JobState.RUNNING)
    desk.scheduler.cancel([job_id])
    assert desk.until(job_id, *OVER).state == JobState.ENDED


def test_a_lost_answer_makes_no_second_job(desk: Desk) -> None:
    desk.over.lose["sbatch"] = 1
    spec = desk.spec("true", held=True)
    job_id = desk.take(spec)
    rows = desk.cluster.run(["squeue", "-h", "-t", "all", "-o", "%i %k"], check=True).stdout
    assert [line.split()[0] for line in rows.splitlines() if spec.token in line] == [job_id]
    assert sum(argv[0] == "sbatch" for argv in desk.over.ran) == 1


def test_refusals_are_the_clusters_own_words(desk: Desk) -> None:
    with pytest.raises(SchedulerError, match="Invalid partition name"):
        desk.submit("true", "--partition=nowhere")
    with pytest.raises(SchedulerError, match="node configuration is not available"):
        desk.submit("true", "--partition=gpu_test", "--gres=gpu:9")
    trial = desk.scheduler.test_only
    assert trial(["--partition=gpu_test", "--gres=gpu:2"], "#!/bin/bash\n", {}).accepted is True
    assert trial(["--partition=gpu_test", "--gres=gpu:9"], "#!/bin/bash\n", {}).accepted is False


def test_a_job_held_by_an_administrator(desk: Desk) -> None:
    job_id = desk.submit("true", held=True)
    desk.cluster.run(["scontrol", "hold", job_id], user=False, check=True)
    with pytest.raises(SchedulerError, match="held by an administrator"):
        desk.scheduler.release(job_id)


# --- clusters of our own: these change what others rely on --------------------------------------------


@pytest.fixture
def own() -> Iterator[Callable[..., Desk]]:
    with contextlib.ExitStack() as stack:

        def start(**options: Any) -> Desk:
            return Desk(stack.enter_context(Cluster(**options)))

        yield start


def test_a_controller_that_is_down_proves_nothing(own: Callable[..., Desk]) -> None:
    desk = own()
    job_id, other = desk.submit("sleep 200"), desk.submit("true", held=True)
    desk.until(job_id, JobState.RUNNING)
    desk.cluster.stop_controller()
    desk.scheduler.timeout_s = 4
    states = {info.state for info in desk.scheduler.query([job_id, other], fresh=True).values()}
    assert states == {JobState.UNKNOWN} and desk.info(job_id).state == JobState.UNKNOWN
    with pytest.raises(SchedulerError):
        desk.scheduler.find("token")
    desk.cluster.start_controller()
    desk.scheduler.timeout_s = 30
    assert desk.until(job_id, JobState.RUNNING).state == JobState.RUNNING
    assert desk.info(other).state == JobState.HELD


def test_purged_jobs_are_gone(own: Callable[..., Desk]) -> None:
    desk = own(settings={"MinJobAge": 2})
    job_id = desk.submit("true")
    info = desk.until(job_id, JobState.GONE, timeout_s=100)
    assert info.exit_code is None and desk.scheduler.find("token") is None


def test_accounting_remembers_what_the_controller_forgot(own: Callable[..., Desk]) -> None:
    desk = own(accounting=True, settings={"MinJobAge": 2})
    ends = {desk.submit("exit 3"): 3, desk.submit("true"): 0}
    array = desk.submit("[ $SLURM_ARRAY_TASK_ID = 2 ]", "--array=1-2%1")
    desk.wait(lambda: not desk.cluster.jobs(), "the controller to forget", 110)
    for job_id, code in ends.items():
        desk.wait(lambda job_id=job_id: desk.info(job_id).state == JobState.ENDED, "sacct's word", 20)
        assert desk.info(job_id).exit_code == code
    assert (desk.info(array).exit_code, desk.info("999999").state) == (0, JobState.GONE)
