"""Which engine a configuration means.

What it does not do
    It tries nothing else when the chosen one does not work: an engine that confines less is never taken
    unasked.
"""

from __future__ import annotations

from pathlib import Path

from orchestrator.schema import Runtime
from runtime_server.engines import Engine
from runtime_server.engines.apptainer import ApptainerEngine
from runtime_server.engines.podman import PodmanEngine
from runtime_server.engines.process import ProcessEngine


def engine_of(config: Runtime, agent: Path, image_store: Path, claim: str = "") -> Engine:
    """The one that `runtime.engine` names."""
    if config.engine == "process":
        return ProcessEngine(config, agent)
    if config.engine == "apptainer":
        return ApptainerEngine(config, agent, image_store)
    return PodmanEngine(config, agent, image_store, claim=claim)
