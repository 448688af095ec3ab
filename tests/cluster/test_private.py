"""A cluster is its starter's alone, and with its end nothing of it is left on the machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster import Cluster
from cluster.leftovers import Traces
from cluster.machine import sweep

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def busy(cluster: Cluster) -> Traces:
    """With a job, files in every place and a process that left its job behind."""
    script = "touch /tmp/a /var/tmp/a /dev/shm/a ~/a a; setsid sleep 600 & echo started > b; wait"
    cluster.run(["sbatch", "--wrap", script], check=True)
    cluster.wait((cluster.shared / "b").exists, 30, "the job")
    return Traces.of(cluster)


def nothing_left(cluster: Cluster, traces: Traces) -> bool:
    """The kernel takes namespaces apart a moment after their last process."""
    return bool(cluster.wait(lambda: not traces.left(), 20, "nothing left"))


def test_two_at_once_do_not_see_each_other() -> None:
    start = time.monotonic()
    with Cluster() as one, Cluster() as other:
        print(f"two clusters started in {time.monotonic() - start:.1f} s")
        one.run(["sbatch", "-H", "--wrap", "true"], check=True)
        assert len(one.jobs()) == 1 and other.jobs() == []
        assert one.uid != other.uid and one.shared != other.shared
        assert not [entry for entry in one.processes() if str(other.layout.root) in " ".join(entry.argv)]
        assert other.run(["ls", one.shared]).returncode != 0


def test_a_directory_below_a_closed_one_is_shown_alone(tmp_path: Path) -> None:
    """As with a checkout or an interpreter below /root."""
    for name in ("closed/shown", "closed/hidden"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "closed/shown/file").write_text("seen")
    (tmp_path / "closed").chmod(0o700)
    with Cluster(visible=[tmp_path / "closed/shown"]) as cluster:
        look = f"cd {tmp_path}/closed; ls; cat shown/file; touch shown/new"
        for node in ("login", "cpu1"):
            answer = cluster.run(["sh", "-c", look], node=node)
            assert answer.stdout == "shown\nseen" and "Read-only" in answer.stderr


def test_a_user_who_is_added_to_the_machine_takes_no_account_away() -> None:
    """That replaces /etc/passwd, and what is mounted over a file goes with the file."""
    with Cluster() as cluster:
        mounts = cluster.run(["cat", "/proc/self/mountinfo"], node="ctl", check=True).stdout.splitlines()
        below = {line.split()[4] for line in mounts if line.split()[4].startswith("/etc")}
        assert below == {"/etc", "/etc/slurm"}
        assert cluster.run(["id", "-un"]).stdout.strip() == cluster.user


def test_it_runs_in_a_closed_directory_for_temporary_files(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "TMPDIR": str(tmp_path)}
    command = [
        sys.executable,
        "-m",
        "cluster",
        "-c",
        "sbatch -W --wrap 'echo from $(hostname)' >&2 && cat slurm-*",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.stdout == "from cpu1\n", done.stderr
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_after_a_stop() -> None:
    with Cluster() as cluster:
        traces = busy(cluster)
        assert traces.left()
    assert nothing_left(cluster, traces)


@pytest.mark.parametrize("part", ["keeper", "process 1"])
def test_nothing_is_left_after_the_holder_is_killed(part: str) -> None:
    with Cluster() as cluster:
        traces = busy(cluster)
        os.kill(cluster.holder_pids[part == "process 1"], signal.SIGKILL)
        cluster.wait(
            lambda: not any("directory" not in line for line in traces.left()), 20, "the processes' end"
        )
    assert nothing_left(cluster, traces)


def test_nothing_is_left_after_its_starter_is_killed(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "cluster", "-c", "echo $HOME; exec sleep 600"]
    starter = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert starter.stdout is not None
    home = Path(starter.stdout.readline().strip())
    assert home.is_dir()
    starter.kill()
    starter.communicate(timeout=30)  # the command in there held the other end
    Cluster().wait(lambda: not home.parent.exists(), 20, "the end of the directory")


def test_a_directory_without_processes_is_swept(tmp_path: Path) -> None:
    folder = tmp_path / "orchestrate-cluster-x"
    (folder / "etc").mkdir(parents=True)
    lock = folder / "etc" / "lock"
    lock.touch()
    old = time.time() - 3600
    os.utime(lock, (old, old))
    sweep([folder])
    assert not folder.exists()
