"""What every drill gets: the cluster with the sandbox image in reach, and the run without a fault."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster

from .kit import BASELINE_STEPS, Drill

NewDrill = Callable[[str], Drill]


@pytest.fixture(scope="session")
def image(cluster: Cluster) -> Path:
    """The sandbox image as an archive on the shared filesystem, as a person would put it there.

    Jobs get Slurm's own default between TERM and KILL: five seconds are few on a machine that is busy.
    """
    cluster.reconfigure(KillWait=30)
    archive = cluster.shared / "sandbox.tar"
    command = [sys.executable, "-m", "runtime_server.images", "save", str(archive)]
    subprocess.run(command, check=True, timeout=300)
    archive.chmod(0o644)
    return archive


@pytest.fixture(scope="session")
def baseline(cluster: Cluster, image: Path) -> list[dict[str, Any]]:
    """The rows of a run that nothing happens to."""
    drill = Drill(cluster, image, "nothing", None)
    drill.configure(trainer={"total_steps": BASELINE_STEPS})
    drill.launch()
    drill.ends("success")
    rows = drill.steps()
    assert sum(row["loss_policy"] != 0 for row in rows) > 10, "a run that learns nothing proves nothing"
    drill.row("the run ends with success; every other run's numbers must be these")
    return drill.steps()


@pytest.fixture
def new_drill(cluster: Cluster, image: Path, baseline: list[dict[str, Any]]) -> Iterator[NewDrill]:
    made: list[Drill] = []

    def make(fault: str) -> Drill:
        made.append(Drill(cluster, image, fault, baseline))
        return made[-1]

    yield make
    for drill in made:
        drill.clean()
