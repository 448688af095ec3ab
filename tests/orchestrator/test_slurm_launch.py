"""Whole launches on a real Slurm: two jobs on two hosts, one lifetime, by the command line as a user."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
from cluster import Cluster
from slurmkit import Launches

from orchestrator.contract import Manifest, Outcome, Result

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.fixture
def launches(cluster: Cluster) -> Launches:
    return Launches(cluster)


def runs_in(launches: Launches) -> set[Path]:
    return set(launches.runs_dir.glob("[0-9]*"))


def test_a_run_from_its_launch_to_its_end(launches: Launches) -> None:
    foreign = {"SLURM_CPU_BIND": "quiet,mask_cpu:0x1", "SBATCH_PARTITION": "nowhere", "FOREIGN": "x"}
    done = launches.orchestrate(*launches.launch(), "--follow", env=foreign)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = runs_in(launches)
    assert "runtime ready" in done.stdout and path.name in done.stdout
    listed = json.loads(launches.orchestrate("list", "--runs-dir", launches.runs_dir, "--json").stdout)
    assert [(run["state"], run["success_rates"]) for run in listed] == [("success", [0.0, 0.5, 1.0])]
    hosts = {job["role"]: job["host"] for job in listed[0]["jobs"]}
    assert hosts["runtime"].startswith("cpu") and hosts["training"].startswith("gpu")
    logs = launches.orchestrate("logs", path).stdout
    assert "foreign=[] devices='0'" in logs and str(launches.cluster.conf) in logs


def test_a_trainer_that_fails_ends_both_jobs(launches: Launches) -> None:
    run = launches.start(TRAINER_DOES="fail")
    look = launches.ended(run)
    assert (look["state"], look["exit_code"]) == ("failed", 7), look
    launches.nothing_left(run)


def test_a_cancelled_run_is_over_when_the_command_returns(launches: Launches) -> None:
    run = launches.start(TRAINER_DOES="hang")
    launches.cluster.wait(lambda: (run.training / "up").exists(), 60, launches.logs(run))
    done = launches.orchestrate("cancel", run.root, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["state"] == "cancelled", done.stderr
    launches.nothing_left(run)


def test_a_runtime_job_cancelled_before_the_training_starts(launches: Launches) -> None:
    run = launches.start("runtime.nodes=2", "runtime.cpus=128", "runtime.memory=16G")
    manifest = run.read(run.manifest, Manifest)
    assert manifest is not None and [s["state"] for s in manifest.submissions] == [
        *("intent", "submitted") * 2,
        *("confirmed", "confirmed"),
    ]
    done = launches.orchestrate("cancel", run.root, "--json")
    assert done.returncode == 0, done.stderr
    launches.nothing_left(run)


def test_a_plain_dependency(launches: Launches) -> None:
    run = launches.start("scheduler.start_policy=after")
    assert launches.ended(run)["state"] == "success"
    launches.nothing_left(run)


def test_a_server_alone_serves_another_training(launches: Launches) -> None:
    done = launches.orchestrate(*launches.launch(), "--runtime-only", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    served = json.loads(done.stdout)
    command = launches.launch()
    about = ["--runtime-url", served["url"], "--runtime-api-key-file", served["api_key_file"], "--follow"]
    trained = launches.orchestrate(*command, *about)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    ended = launches.orchestrate("cancel", launches.runs_dir / served["run_id"], "--json")
    assert ended.returncode == 0, ended.stderr
    launches.cluster.wait(lambda: not launches.processes(), 20, "the end of every process")


def test_a_submission_that_is_refused_leaves_no_job(launches: Launches) -> None:
    done = launches.orchestrate(*launches.launch("runtime.partition=nowhere"))
    assert done.returncode != 0 and "Invalid partition name" in done.stderr
    assert "cancelled, and over: " in done.stderr
    (path,) = runs_in(launches)
    queue = launches.cluster.run(["squeue", "-h", "-o", "%k"], check=True).stdout
    assert path.name not in queue


def test_a_dry_run_asks_the_cluster_and_writes_nothing(launches: Launches) -> None:
    done = launches.orchestrate(*launches.launch(), "--dry-run")
    assert done.returncode == 0 and done.stdout.count("the cluster accepts it") == 2, done.stdout
    refused = launches.orchestrate(*launches.launch("training.gpus_per_node=8"), "--dry-run", "--json")
    checks = json.loads(refused.stdout)["checks"]
    assert refused.returncode == 1 and checks["training"]["accepted"] is False
    assert not launches.runs_dir.exists()


def test_a_launcher_that_is_killed_leaves_a_run_that_can_be_ended(launches: Launches) -> None:
    """Killed at several moments: whatever it had submitted is found again, by id or by token."""
    for after_s in (0.35, 0.45, 0.55, 0.7, 0.9, 1.2):
        before = runs_in(launches)
        process = launches.cluster.popen(
            launches.line(*launches.launch(TRAINER_DOES="hang")),
            cwd=launches.home,
            env=launches.environment(),
        )
        time.sleep(after_s)  # the fault itself: a kill at an arbitrary moment
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=20)
        new = runs_in(launches) - before
        for path in new:
            if (path / "run.json").exists():
                done = launches.orchestrate("cancel", path, "--json")
                assert done.returncode == 0, done.stdout + done.stderr
    launches.cluster.wait(lambda: not launches.processes(), 30, "the end of every process")
    queue = launches.cluster.run(["squeue", "-h", "-o", "%i %T %k"], check=True).stdout
    assert str(launches.home) not in queue and "run=" not in queue


def test_a_server_that_dies_for_good_ends_the_training(launches: Launches) -> None:
    trigger = launches.home / "die"
    run = launches.start("training.peer_grace=5", TRAINER_DOES="hang", SERVER_DIES=str(trigger))
    launches.cluster.wait(lambda: (run.training / "up").exists(), 60, launches.logs(run))
    launches.cluster.run(["touch", trigger], check=True)
    look = launches.ended(run)
    result = run.read(run.result, Result)
    assert look["state"] in (Outcome.PEER_GONE, Outcome.FAILED) and result is not None, look
    launches.nothing_left(run)
