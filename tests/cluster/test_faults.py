"""The faults that a test may cause, on a cluster of their own that notices a dead node within seconds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cluster import Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.fixture(scope="module")
def fragile() -> Iterator[Cluster]:
    with Cluster(settings={"SlurmdTimeout": 6, "MessageTimeout": 4}) as running:
        yield running


def becomes(cluster: Cluster, node: str, state: str) -> None:
    cluster.wait(lambda: cluster.node_state(node) == state, 60, f"{node} {state}")


def test_a_killed_slurmd_takes_its_node_down_until_it_is_started(fragile: Cluster) -> None:
    fragile.kill_slurmd("cpu1")
    becomes(fragile, "cpu1", "down*")
    fragile.start_slurmd("cpu1")
    becomes(fragile, "cpu1", "idle")


def test_a_cut_link_separates_a_node_until_it_is_joined(fragile: Cluster) -> None:
    reach = ["timeout", "2", "bash", "-c", ": < /dev/tcp/gpu1/6818"]  # slurmd's port
    assert fragile.run(reach).returncode == 0
    fragile.cut("gpu1")
    assert fragile.run(reach).returncode != 0
    becomes(fragile, "gpu1", "down*")
    fragile.join("gpu1")
    becomes(fragile, "gpu1", "idle")


def test_a_crashed_node_loses_its_processes_and_boots_again(fragile: Cluster) -> None:
    job = fragile.run(
        ["sbatch", "--parsable", "--no-requeue", "-w", "cpu2", "--wrap", "sleep 600"], check=True
    )
    fragile.wait(lambda: fragile.job_state(job.stdout.strip()) == "RUNNING", 20, "the job")
    fragile.crash("cpu2")
    assert fragile.processes("cpu2") == []
    fragile.wait(lambda: fragile.job_state(job.stdout.strip()) == "NODE_FAIL", 60, "the end of the job")
    fragile.boot("cpu2")
    becomes(fragile, "cpu2", "idle")


def test_a_stopped_controller_answers_nobody_and_forgets_nothing(fragile: Cluster) -> None:
    job = fragile.run(["sbatch", "--parsable", "-H", "--wrap", "true"], check=True).stdout.strip()
    fragile.stop_controller()
    assert "Unable to contact slurm controller" in fragile.run(["squeue"]).stderr
    fragile.start_controller()
    assert fragile.job_state(job) == "PENDING"
    fragile.run(["scancel", job], check=True)


def test_settings_change_in_a_running_cluster(fragile: Cluster) -> None:
    fragile.reconfigure(KillWait=30)
    assert (
        "KillWait                = 30 sec" in fragile.run(["scontrol", "show", "config"], check=True).stdout
    )


def test_a_small_disk_is_one_on_all_hosts_and_fills_up(fragile: Cluster) -> None:
    folder = fragile.shared / "small"
    fragile.small_disk(folder, 2)
    filled = fragile.run(["dd", "if=/dev/zero", f"of={folder}/filler", "bs=64k"], node="gpu1")
    assert "No space left on device" in filled.stderr
    assert fragile.run(["sh", "-c", f"echo x > {folder}/more"], node="cpu1").returncode != 0
    fragile.run(["rm", folder / "filler"], check=True)
    fragile.run(["sh", "-c", f"echo hello > {folder}/word"], node="cpu2", check=True)
    assert (fragile.inside(folder) / "word").read_text() == "hello\n"
    assert list(folder.iterdir()) == []
