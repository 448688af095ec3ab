"""The pytest fixtures of the test cluster; tests/conftest.py makes them visible to every test.

What it does not do: no test of one worker gets a fresh cluster. One that breaks something (a node, the
controller) puts it back, or starts a Cluster of its own.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .cluster import Cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A running Slurm without accounting, shared by the tests of this worker."""
    with Cluster() as running:
        yield running


@pytest.fixture(scope="session")
def accounting_cluster() -> Iterator[Cluster]:
    """The same with slurmdbd and a database below it: sacct and sacctmgr answer."""
    with Cluster(accounting=True) as running:
        yield running
