"""The errors of the orchestrator. Each message says what was wrong, what is allowed, what to do next.

    OrchestrateError
    ├── ConfigError         a configuration file, variable or key=value is wrong
    ├── PlanError           the numbers of a configuration contradict each other
    ├── LaunchError         the run could not be prepared or submitted
    ├── RuntimeUnusable     the server named by --runtime-url cannot be used
    ├── RunNotFound         no run, or more than one, goes by this name
    ├── SchedulerError      a scheduler refused, or could not be asked (orchestrator.schedulers)
    └── ContractError       see orchestrator.records: WaitTimeout, PeerGone, Superseded, NotARun

What it does not do
    No printing and no exit codes: `orchestrator.cli` maps errors to those. Standard library only.
"""

from __future__ import annotations

from collections.abc import Iterable


class OrchestrateError(Exception):
    """Root of everything that this package raises on purpose."""


class Problems(OrchestrateError):
    """Several things that are wrong at once: one line each, so that one look is enough to mend them."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


class ConfigError(Problems):
    """A configuration file, an environment variable or a key=value is wrong."""


class PlanError(Problems):
    """Values that are right one by one contradict each other."""


class LaunchError(OrchestrateError):
    """The run could not be prepared or submitted; nothing of it is left running."""


class RuntimeUnusable(OrchestrateError):
    """The runtime server at a given URL does not answer, or not to this key."""


class RunNotFound(OrchestrateError):
    """No run, or more than one, goes by the name that was given."""
