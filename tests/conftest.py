"""Settings of every test, and which of them run in one process when they run side by side."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
from cluster.fixtures import accounting_cluster as accounting_cluster
from cluster.fixtures import cluster as cluster  # pytest puts this folder on the path
from xdist.scheduler import LoadScopeScheduling

# Threads of torch that wait by spinning starve the other half of a test on a small machine, by a
# factor of ten and more; this is read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# A shell starts what it puts into the background deaf to Ctrl-C, and so would be all that tests start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


class ByImports(LoadScopeScheduling):  # type: ignore[misc]  # xdist has no types
    """All tests that import torch stay together, for that costs more than most of them do. Elsewhere a
    file does; but tests of whole runs, which mostly wait, fill what room the others leave."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::", 1)[0]
        if file.startswith("tests/orchestrator/"):
            return nodeid
        return "torch" if file.startswith("tests/trainer/") and "test_main" not in file else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByImports:
    return ByImports(config, log)
