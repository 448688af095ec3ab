"""What a test may rely on when it asks for the fixture `cluster`."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def submit(cluster: Cluster, *words: object) -> str:
    return cluster.run(["sbatch", "--parsable", *words], check=True).stdout.strip()


@pytest.fixture
def folder(cluster: Cluster, tmp_path: Path) -> Iterator[Path]:
    """A directory of the user's that every host sees, one per test."""
    path = cluster.shared / tmp_path.name
    cluster.run(["mkdir", path], check=True)
    yield path
    cluster.run(["rm", "-rf", path], user=False)


def test_steps_run_on_hosts_of_their_own(cluster: Cluster) -> None:
    command = ["srun", "-N2", "sh", "-c", "echo $(hostname) $(hostname -I)"]
    answer = cluster.run(command, check=True).stdout
    assert sorted(answer.splitlines()) == ["cpu1 10.77.0.11", "cpu2 10.77.0.12"]


def test_each_job_gets_its_own_gpus(cluster: Cluster, folder: Path) -> None:
    """Two jobs at once on one node: each waits until the other is there too."""
    both = f"[ $(ls {folder} | wc -l) = 2 ]"
    script = f"echo $CUDA_VISIBLE_DEVICES > {folder}/$SLURM_JOB_ID; until {both}; do sleep 0.1; done"
    jobs = [submit(cluster, "-p", "gpu_test", "-w", "gpu1", "--gres=gpu:1", "--wrap", script) for _ in "ab"]
    cluster.wait(lambda: all(cluster.job_state(job) == "COMPLETED" for job in jobs), 30, "both jobs")
    assert sorted((folder / job).read_text() for job in jobs) == ["0\n", "1\n"]


def test_a_server_on_a_cpu_node_is_reached_from_a_gpu_node(cluster: Cluster, folder: Path) -> None:
    (folder / "word").write_text("hello")
    (folder / "word").chmod(0o644)
    server = submit(cluster, "-w", "cpu1", "--wrap", f"exec python -m http.server -d {folder} 8000")
    fetch = "import urllib.request as u; print(u.urlopen('http://cpu1:8000/word', timeout=5).read().decode())"
    step = ["srun", "-p", "gpu_test", "-w", "gpu1", "python", "-c", fetch]
    answer = cluster.wait(lambda: cluster.run(step).stdout, 30, "an answer of the server")
    cluster.run(["scancel", server], check=True)
    assert answer == "hello\n"


def test_jobs_run_as_the_user_with_the_code_of_this_checkout(cluster: Cluster) -> None:
    program = "import os, orchestrator; print(os.getuid(), orchestrator.__file__)"
    answer = cluster.run(["srun", cluster.python, "-c", program], check=True).stdout.split()
    assert answer == [str(cluster.uid), str(cluster.repo / "orchestrator/__init__.py")]


@pytest.mark.parametrize("user", [True, False])
def test_nobody_in_there_writes_to_the_checkout(cluster: Cluster, user: bool) -> None:
    for target in (cluster.repo, Path("/usr"), Path("/etc")):
        answer = cluster.run(["touch", target / "written-by-a-test"], user=user, node="cpu1")
        assert answer.returncode != 0 and not (target / "written-by-a-test").exists()


def test_only_the_shared_directory_and_the_home_are_shared(cluster: Cluster, folder: Path) -> None:
    places = ["/tmp", "/var/tmp", "/dev/shm", f"/run/user/{cluster.uid}", "$HOME", str(folder)]
    name = f"of-{folder.name}"
    for node, command in (("cpu1", f"touch $p/{name}"), ("gpu1", f"[ -e $p/{name} ] && echo $p || true")):
        script = f"for p in {' '.join(places)}; do {command}; done"
        answer = cluster.run(["sh", "-c", script], node=node, check=True).stdout
    assert answer.split() == [str(cluster.layout.home), str(folder)]


def test_a_job_releases_a_held_one_from_another_node(cluster: Cluster) -> None:
    held = submit(cluster, "-H", "-p", "gpu_test", "--wrap", "true")
    assert cluster.job_state(held) == "PENDING"
    submit(cluster, "-w", "cpu2", "--wrap", f"scontrol release {held}")
    cluster.wait(lambda: cluster.job_state(held) == "COMPLETED", 30, "the released job")


def test_a_job_of_more_rank_pushes_another_out_and_it_comes_back(cluster: Cluster) -> None:
    low = submit(cluster, "-p", "gpu_low", "-w", "gpu2", "--gres=gpu:2", "--wrap", "sleep 600")
    cluster.wait(lambda: cluster.job_state(low) == "RUNNING", 20, "the job of low rank")
    high = submit(cluster, "-p", "gpu_test", "-w", "gpu2", "--gres=gpu:2", "--wrap", "true")
    cluster.wait(lambda: cluster.job_state(high) == "COMPLETED", 40, "the job of more rank")
    cluster.wait(lambda: cluster.job_state(low) == "RUNNING", 40, "the job of low rank again")
    restarts = cluster.run(["scontrol", "show", "job", low], check=True).stdout
    cluster.run(["scancel", low], check=True)
    assert "Restarts=1" in restarts


def test_signals_reach_a_command_that_was_started(cluster: Cluster) -> None:
    script = "trap 'echo stopped; exit 7' TERM; echo ready; while :; do sleep 0.05; done"
    process = cluster.popen(["bash", "-c", script])
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=20)
    assert (rest, process.returncode) == ("stopped\n", 7)


def test_a_command_out_of_time_is_killed(cluster: Cluster) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        cluster.run(["sleep", "54321"], timeout=1)
    cluster.wait(
        lambda: not [1 for entry in cluster.processes("login") if "54321" in entry.argv], 10, "its end"
    )


def test_processes_are_told_by_host_and_can_be_killed(cluster: Cluster) -> None:
    job = submit(cluster, "-w", "cpu2", "--wrap", "exec sleep 12345")
    found = cluster.wait(
        lambda: [p for p in cluster.processes("cpu2") if p.argv[-1] == "12345"], 20, "the process"
    )
    assert [entry.user for entry in found] == [cluster.user]
    assert not [entry for entry in cluster.processes("cpu1") if entry.argv[-1] == "12345"]
    cluster.kill(found[0])
    cluster.wait(lambda: cluster.job_state(job) == "FAILED", 20, "the failed job")


BINARY = r"""
mkdir -p root/bin && cd root && printf 'int puts(const char*);int main(){return puts("from inside")<0;}' |
gcc -x c -static -o bin/say - && tar -cf ../image.tar . && cd .. &&
engine="srun -w cpu1 podman --root /var/tmp/store --storage-driver overlay --runtime runc" &&
$engine import -q image.tar tiny >/dev/null && $engine run --rm --network none tiny /bin/say
"""


@pytest.mark.container
def test_the_user_runs_rootless_containers_in_a_job(cluster: Cluster, folder: Path) -> None:
    mapped = cluster.run(["srun", "podman", "unshare", "cat", "/proc/self/uid_map"], check=True).stdout
    assert str(cluster.uid) in mapped and mapped.split()[-1] == "65536"
    info = cluster.run(
        ["srun", "podman", "info", "--format", "{{.Store.GraphDriverName}}"], check=True
    ).stdout
    assert info.strip() in ("overlay", "vfs")
    answer = cluster.run(["bash", "-c", BINARY], cwd=folder)
    assert answer.stdout == "from inside\n", answer.stderr
