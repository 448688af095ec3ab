"""What a test may rely on when it asks for the fixture `cluster`."""

from __future__ import annotations

import pytest

from cluster import Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def test_steps_run_on_hosts_of_their_own(cluster: Cluster) -> None:
    command = ["srun", "-N2", "sh", "-c", "echo $(hostname) $(hostname -I)"]
    answer = cluster.run(command, check=True).stdout
    assert sorted(answer.splitlines()) == ["cpu1 10.77.0.11", "cpu2 10.77.0.12"]


def test_each_job_gets_its_own_gpus(cluster: Cluster) -> None:
    command = ["srun", "-p", "gpu_test", "--gres=gpu:2", "sh", "-c", "echo $CUDA_VISIBLE_DEVICES"]
    assert cluster.run(command, check=True).stdout == "0,1\n"
