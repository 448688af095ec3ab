"""Further lives on a real Slurm: requeue, array, chain, preemption, lost nodes, and several nodes at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
from cluster import Cluster
from slurmkit import Launches

from orchestrator.contract import Exit, JobStatus, Outcome, Result, Role, RunDirectory

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(300)]
TRAINING, RUNTIME = Role.TRAINING, Role.RUNTIME
LONG = ("runtime.failover_timeout=60", "training.peer_grace=10")


class Lives(Launches):
    """Launches, and what the tests of this file ask of them."""

    def begin(self, *assignments: str, does: str, **variables: str) -> RunDirectory:
        return self.start(*LONG, *assignments, TRAINER_DOES=does, **variables)

    def soon(self, run: RunDirectory, check: Callable[[], object], what: str, timeout_s: float = 60) -> None:
        end = time.monotonic() + timeout_s
        while not check():
            assert time.monotonic() < end, "\n".join([what, *map(str, run.timeline()), self.logs(run)])
            time.sleep(0.1)

    def up(self, run: RunDirectory, number: int = 1) -> None:
        self.soon(run, (run.training / f"up-{number}").exists, f"up-{number}")

    def ids(self, run: RunDirectory, role: Role) -> list[str]:
        manifest = run.read_manifest()
        assert manifest is not None
        return list(
            dict.fromkeys(s["job_id"] for s in manifest.submissions if s["role"] == role and s["job_id"])
        )

    def warn(self, job_id: str) -> None:
        """As Slurm does near the end. For a task of an array scancel delivers it and exits with 229."""
        done = self.cluster.run(["scancel", "--batch", "--signal=USR1", job_id])
        assert not done.stderr, done.stderr

    def forbid_requeue(self, job_id: str) -> None:
        """As a site does."""
        self.cluster.run(["scontrol", "update", f"JobId={job_id}", "Requeue=0"], check=True)

    def outcomes(self, run: RunDirectory, role: Role) -> list[str]:
        return [e.data["outcome"] for e in run.timeline() if e.what == f"{role}.ended"]

    def result(self, run: RunDirectory, outcome: Outcome) -> Result:
        look = self.ended(run, 120)
        found = run.read(run.result, Result)
        assert found is not None and found.outcome == outcome, (look, found, self.logs(run))
        self.nothing_left(run)
        return found

    def serves(self, run: RunDirectory, attempt: int) -> None:
        def check() -> bool:
            status = run.read(run.status(RUNTIME), JobStatus)
            return status is not None and (status.attempt, status.phase) == (attempt, "running")

        self.soon(run, check, f"life {attempt} of the runtime", 90)
        (run.training / "go").touch()


@pytest.fixture
def lives(cluster: Cluster) -> Iterator[Lives]:
    yield Lives(cluster)
    cluster.run(["scancel", f"--user={cluster.user}"])
    cluster.wait(lambda: not cluster.run(["squeue", "-h"]).stdout.strip(), 40, "the end of every job")


# --- the training goes on ----------------------------------------------------------------------------


def test_requeued_twice_and_done(lives: Lives) -> None:
    run = lives.begin(does="thrice")
    for life in (1, 2):
        lives.up(run, life)
        assert run.read(run.result, Result) is None
        lives.warn(lives.ids(run, TRAINING)[0])
    result = lives.result(run, Outcome.SUCCESS)
    (job_id,) = lives.ids(run, TRAINING)
    assert (result.attempt, result.job_id) == (3, job_id)
    assert lives.outcomes(run, TRAINING) == ["requeued", "requeued", "success"]
    log = run.out(TRAINING, job_id).read_text()  # appended by each life
    assert [f"life {n}" in log for n in (1, 2, 3)] == [True] * 3
    assert run.latest_attempt(RUNTIME) == 1


def test_where_requeue_is_refused_a_successor_goes_on(lives: Lives) -> None:
    run = lives.begin(does="thrice")
    for life in (1, 2):
        lives.up(run, life)
        lives.forbid_requeue(lives.ids(run, TRAINING)[-1])
        lives.warn(lives.ids(run, TRAINING)[-1])
    result = lives.result(run, Outcome.SUCCESS)
    ids = lives.ids(run, TRAINING)
    assert len(ids) == 3 and result.job_id == ids[-1]
    refused = [e.data["problem"] for e in run.timeline() if e.what == "training.requeue_refused"]
    assert len(refused) == 2 and "disabled" in refused[0]


def test_an_array_resumes_itself_and_cancels_its_rest(lives: Lives) -> None:
    run = lives.begin("scheduler.on_timeout=array", "scheduler.max_restarts=4", does="thrice")
    (base,) = lives.ids(run, TRAINING)
    for life in (1, 2):
        lives.up(run, life)
        lives.warn(f"{base}_{life}")
    result = lives.result(run, Outcome.SUCCESS)
    assert result.job_id == f"{base}_3" and lives.ids(run, TRAINING) == [base]
    assert lives.outcomes(run, TRAINING) == ["requeued", "requeued", "success"]
    rows = lives.cluster.run(["squeue", "-h", "-r", "-t", "all", "-j", base, "-o", "%i %T"]).stdout.split(
        "\n"
    )
    assert {row for row in rows if "_" in row} >= {f"{base}_3 COMPLETED"}


def test_the_last_task_of_an_array_without_success_is_a_timeout(lives: Lives) -> None:
    run = lives.begin("scheduler.on_timeout=array", "scheduler.max_restarts=1", does="thrice")
    (base,) = lives.ids(run, TRAINING)
    for life in (1, 2):
        lives.up(run, life)
        lives.warn(f"{base}_{life}")
    assert "last task" in lives.result(run, Outcome.TIMEOUT).reason


def test_cancelling_an_array_ends_the_run(lives: Lives) -> None:
    run = lives.begin("scheduler.on_timeout=array", does="thrice")
    lives.up(run)
    done = lives.orchestrate("cancel", run.root)
    assert done.returncode == 0, done.stdout + done.stderr
    lives.result(run, Outcome.CANCELLED)


def test_the_walltime_itself(lives: Lives) -> None:
    """Slurm's own warning at its own time, in its own steps of half a minute."""
    run = lives.begin("training.time_limit=2m", "scheduler.signal=USR1@60", does="thrice")
    lives.up(run, 2) if (run.training / "up-1").exists() else lives.up(run)
    lives.soon(run, (run.training / "up-2").exists, "the second life", 120)
    assert lives.outcomes(run, TRAINING) == ["requeued"]
    lives.warn(lives.ids(run, TRAINING)[0])
    lives.result(run, Outcome.SUCCESS)


# --- told to end -------------------------------------------------------------------------------------


def test_a_job_requeued_by_its_owner_goes_on_without_a_result(lives: Lives) -> None:
    run = lives.begin(does="thrice")
    lives.up(run)
    (job_id,) = lives.ids(run, TRAINING)
    lives.cluster.run(["scontrol", "requeue", job_id], check=True)
    lives.up(run, 2)  # there was time for a checkpoint between TERM and KILL
    assert run.read(run.result, Result) is None and run.latest_attempt(RUNTIME) == 1
    assert lives.outcomes(run, TRAINING) == ["requeued"]
    lives.cluster.run(["scancel", job_id], check=True)
    lives.result(run, Outcome.CANCELLED)


def test_a_preempted_job_is_requeued_and_goes_on(lives: Lives) -> None:
    run = lives.begin("training.partition=gpu_low", does="thrice")
    lives.up(run)
    over = ["sbatch", "--parsable", "-p", "gpu_test", "-N2", "--gres=gpu:2", "-o", "/dev/null"]
    strong = lives.cluster.run([*over, "--wrap", "sleep 300"], check=True).stdout.strip()
    lives.soon(run, lambda: lives.outcomes(run, TRAINING) == ["requeued"], "the preemption", 90)
    assert run.read(run.result, Result) is None
    lives.cluster.run(["scancel", strong], check=True)
    lives.up(run, 2)
    lives.warn(lives.ids(run, TRAINING)[0])
    lives.result(run, Outcome.SUCCESS)


# --- the runtime -------------------------------------------------------------------------------------


def test_a_server_that_dies_lives_again_in_its_job(lives: Lives) -> None:
    run = lives.begin(does="follow", SERVER_DIES=str(lives.home / "die"))
    lives.up(run)
    (lives.home / "once").write_text("once")
    (lives.home / "once").rename(lives.home / "die")  # never seen empty
    lives.serves(run, 2)
    assert lives.result(run, Outcome.SUCCESS).attempt == 1
    assert len(lives.ids(run, RUNTIME)) == 1


def test_a_runtime_that_is_requeued_comes_back(lives: Lives) -> None:
    run = lives.begin(does="follow")
    lives.up(run)
    lives.cluster.run(["scontrol", "requeue", lives.ids(run, RUNTIME)[0]], check=True)
    lives.serves(run, 2)
    assert lives.result(run, Outcome.SUCCESS).attempt == 1
    assert lives.outcomes(run, RUNTIME) == ["requeued", "success"]


def test_a_training_leaves_at_once_when_its_runtime_was_cancelled_while_pending(lives: Lives) -> None:
    """The dependency is met by it all the same."""
    state = ["scontrol", "update", "partition=test"]
    lives.cluster.run([*state, "state=down"], user=False, check=True)
    try:
        run = lives.begin("scheduler.start_policy=after", does="hang")
        lives.cluster.run(["scancel", lives.ids(run, RUNTIME)[0]], check=True)
        result = lives.result(run, Outcome.PEER_GONE)
    finally:
        lives.cluster.run([*state, "state=up"], user=False, check=True)
    assert result.exit_code == Exit.PEER_GONE and not (run.training / "up").exists()


@pytest.fixture
def fragile() -> Iterator[Lives]:
    with Cluster(settings={"SlurmdTimeout": 6}) as running:
        yield Lives(running)


@pytest.mark.parametrize("requeue", [True, False], ids=["requeued", "submitted again"])
def test_a_node_that_crashes_under_the_runtime(fragile: Lives, requeue: bool) -> None:
    run = fragile.begin("training.peer_grace=30", "runtime.failover_timeout=120", does="follow")
    fragile.up(run)
    if not requeue:
        fragile.forbid_requeue(fragile.ids(run, RUNTIME)[0])
    status = run.read(run.status(RUNTIME), JobStatus)
    assert status is not None
    fragile.cluster.crash(status.host)
    fragile.serves(run, 2)
    again = run.read(run.status(RUNTIME), JobStatus)
    assert again is not None and again.host != status.host
    assert fragile.result(run, Outcome.SUCCESS).attempt == 1
    assert len(fragile.ids(run, RUNTIME)) == (1 if requeue else 2)


# --- several nodes -----------------------------------------------------------------------------------

TWO_BY_TWO = (
    "training.nodes=2",
    "training.gpus_per_node=2",
    "training.cpus=4",
    "environment.network_provider=tcp",
)


def ranks(run: RunDirectory) -> list[tuple[str, str, str]]:
    names = (path.name.split("-") for path in run.training.glob("rank-*"))
    return sorted((rank, host, local) for _, rank, host, local in names)


def test_four_processes_on_two_nodes_find_each_other(lives: Lives) -> None:
    run = lives.begin(*TWO_BY_TWO, does="together", SLURM_PROCID="7", RANK="9", PMI_RANK="3")
    lives.result(run, Outcome.SUCCESS)
    log = run.out(TRAINING, lives.ids(run, TRAINING)[0]).read_text()
    assert [line for line in log.splitlines() if "rank=" in line and "world=4 sum=10" not in line] == []
    assert {(host, local) for _, host, local in ranks(run)} == {
        (host, local) for host in ("gpu1", "gpu2") for local in "01"
    }
    assert "'SRUN_CPUS_PER_TASK': '4'" in log and "'FI_PROVIDER': 'tcp'" in log and "slurm.conf" in log


def test_four_processes_write_a_checkpoint_together_and_go_on(lives: Lives) -> None:
    run = lives.begin(*TWO_BY_TWO, does="together", WAITS="1")
    lives.soon(run, lambda: len(ranks(run)) == 4, "four ranks", 120)
    lives.warn(lives.ids(run, TRAINING)[0])
    assert lives.result(run, Outcome.SUCCESS).attempt == 2
    assert lives.outcomes(run, TRAINING) == ["requeued", "success"]


# --- by hand -----------------------------------------------------------------------------------------


def test_in_an_allocation_of_ones_own_it_runs_in_place_and_never_requeues(lives: Lives) -> None:
    """`salloc`, then `bash jobs/training.sh RUN_DIR`: that allocation belongs to a person."""
    run = lives.begin("scheduler.start_policy=after", does="thrice")
    lives.up(run)
    (job_id,) = lives.ids(run, TRAINING)
    lives.cluster.run(["scancel", "--batch", "--signal=USR1", job_id], check=True)
    lives.soon(run, lambda: lives.outcomes(run, TRAINING) == ["requeued"], "the end of its first life", 30)
    lives.cluster.run(["scancel", job_id], check=True)
    stub = ["bash", str(run.code / "jobs" / "training.sh"), str(run.root)]
    line = ["salloc", "-Q", "-p", "gpu_test", "--gres=gpu:1", "timeout", "60", *stub]
    process = lives.cluster.popen(line)
    lives.up(run, 2)
    (mine,) = [p for p in lives.cluster.processes() if "orchestrator.job" in p.argv and "training" in p.argv]
    lives.cluster.run(["kill", "-USR1", str(mine.pid)], user=False, check=True)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == Exit.REQUEUE, said
    result = run.read(run.result, Result)
    assert result is not None and result.outcome == Outcome.TIMEOUT, lives.logs(run)
    assert "started by hand does not go on" in result.reason
