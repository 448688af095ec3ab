"""Errors of the trainer: one root, so that a caller can tell ours from a library's.

    TrainerError
    ├── TaskError           a task file that is missing, empty or malformed
    ├── ModelError          the policy is missing, or of a kind that cannot be trained here
    ├── CheckpointError     a checkpoint that cannot be written, read, or does not fit this run
    ├── Missing             a package that was asked for is not installed
    ├── Collapsed           an alarm says that going on would burn time for nothing
    ├── EngineError         the rollout engine refused a request
    │   ├── EngineDied      it is gone: every waiter gets this, and the run must stop
    │   └── MismatchError   engine and trainer disagree about the same policy after a weight sync
    └── EnvironmentFailure  a sandbox could not be had or was lost
        ├── Lost            infrastructure: try a fresh sandbox, then mask the episode
        │   └── Overdue     the episode's time was lost to infrastructure: mask it, no second try
        ├── NoFile          a file that the policy asked for cannot be read or written: it is told so
        ├── Broken          the policy broke its own sandbox: the episode is scored
        └── Refused         a mistake in key or request that no retry mends: the run must stop

What it does not do
    No imports; `str(error)` says what was wrong, what is allowed and what to do next.
"""

from __future__ import annotations


class TrainerError(Exception):
    """Root."""


class TaskError(TrainerError):
    """A task file is missing, empty or malformed."""


class ModelError(TrainerError):
    """The policy is missing, or of a kind that cannot be trained here."""


class CheckpointError(TrainerError):
    """A checkpoint cannot be written or read, or belongs to another run."""


class Missing(TrainerError):
    """A package that was asked for is not installed."""


class Collapsed(TrainerError):
    """The training stopped itself: an alarm says that going on would burn time for nothing."""


class EngineError(TrainerError):
    """The rollout engine refused one request; the others go on."""


class EngineDied(EngineError):
    """The rollout engine is gone."""


class MismatchError(EngineError):
    """The engine does not compute the trainer's policy: training on its samples would be wrong."""


class EnvironmentFailure(TrainerError):
    """A sandbox could not be had, or was lost."""


class Lost(EnvironmentFailure):
    """Infrastructure failed; the policy cannot have caused it."""


class Overdue(Lost):
    """The episode's deadline passed, and not because of the policy's commands."""


class NoFile(EnvironmentFailure):
    """A file cannot be read or written as the policy asked; the message is for the policy."""


class Broken(EnvironmentFailure):
    """The policy's own commands ended its sandbox."""


class Refused(EnvironmentFailure):
    """The server refuses what we ask for: wrong key, or a request that makes no sense."""
