"""The variant with slurmdbd: what sacct says about jobs that squeue has forgotten or never showed."""

from __future__ import annotations

import pytest

from cluster import Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def test_sacct_reports_exit_codes_comments_and_every_life(accounting_cluster: Cluster) -> None:
    cluster = accounting_cluster
    submit = [
        "sbatch",
        "--parsable",
        "--comment",
        "token|1",
        "--wrap",
        "exit $((3 * ${SLURM_RESTART_COUNT:-1}))",
    ]
    job = cluster.run(submit, check=True).stdout.strip()
    ask = ["sacct", "-X", "-P", "-n", "-j", job, "--format", "State,ExitCode,User,Account,Comment"]
    answer = cluster.wait(lambda: cluster.run(ask, check=True).stdout, 20, "a row")
    row = cluster.wait(lambda: (text := cluster.run(ask).stdout).startswith("FAILED") and text, 20, "the end")
    assert answer and row == f"FAILED|3:0|{cluster.user}|lab|token|1\n"


def test_sacct_without_accounting_is_refused(cluster: Cluster) -> None:
    answer = cluster.run(["sacct"])
    assert answer.returncode == 1 and "accounting storage is disabled" in answer.stderr
