"""The job wrapper: what a job stub starts, inside a job of a run.

What it is
    `python -m orchestrator.job runtime RUN_DIR` and `… training RUN_DIR` take an attempt, run the real
    command, keep the two-way lifetime contract with the other job, and write down how it ended.
    `… settle ROLE RUN_DIR CODE WANTED` is the stub's call after a wrapper that did not end by itself:
    it ends what is left of that life, by its nonce, and writes what the wrapper could not. `… step
    SECONDS COMMAND` is one node's part of a training on several nodes.

What it does not do
    It starts no job; the launcher does. Standard library and the contract only: it is up in a tenth of a
    second and takes few megabytes beside the real work.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback

from orchestrator import job_again, job_runtime, job_training
from orchestrator.command import Inbox, how
from orchestrator.contract import (
    ContractError,
    Env,
    Exit,
    JobStatus,
    Manifest,
    Outcome,
    Role,
    RunDirectory,
    Settings,
)
from orchestrator.job_core import Attempt, Ending, wrapper_code
from orchestrator.job_launch import run_step
from orchestrator.processes import die_with_parent, end_all, labelled

USAGE = "usage: python -m orchestrator.job runtime|training RUN_DIR"


def main(argv: list[str]) -> int:
    try:
        match argv:
            case ["runtime" | "training" as role, run_dir]:
                return work(Role(role), RunDirectory.open(run_dir))
            case ["step", stop_timeout, *command]:
                return run_step(command, float(stop_timeout))
            case ["settle", "runtime" | "training" as role, run_dir, code, wanted]:
                return settle(Role(role), RunDirectory.open(run_dir), int(code), wanted)
    except ContractError as error:
        print(f"orchestrate: {error}", file=sys.stderr)
        return int(Exit.NO_INPUT)
    print(USAGE, file=sys.stderr)
    return int(Exit.USAGE)


def work(role: Role, run: RunDirectory) -> int:
    """One attempt of one job, to its end."""
    with Inbox() as inbox:
        if os.environ.get(Env.NONCE):  # started by a stub: if that is killed, end in order
            die_with_parent(signal.SIGTERM)
        if role == Role.TRAINING and (complete := job_training.complete(run)):
            print(f"the training of {run.run_id} is already complete ({complete.outcome})", file=sys.stderr)
            return int(Exit.OK)  # a job that somebody requeued by hand must not overwrite its result
        attempt = Attempt.take(run, role)
        if attempt.number > 1:
            attempt.begin_in_logs()
        with attempt.beating():
            if role == Role.RUNTIME:
                return job_runtime.RuntimeJob(attempt, inbox).work()
            return job_training.TrainingJob(attempt, inbox).work()


# --- after a wrapper that was killed -----------------------------------------------------------------


def settle(role: Role, run: RunDirectory, code: int, wanted: str) -> int:
    """Finish what the wrapper of this life began; 0 once it is written down.

    `code` is how the wrapper ended, `wanted` are the stub's words for the signals it got.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # few seconds, and the last chance to tell the truth
    nonce = os.environ.get(Env.NONCE, "")
    if not nonce:
        raise ContractError(f"settle needs {Env.NONCE} in the environment, as the stub sets it")
    status = run.read(run.status(role), JobStatus)
    if status is not None and status.nonce == nonce and status.phase == "ended":
        return 0
    end_all(lambda: labelled(Env.NONCE, nonce), _stop_timeout(run))
    if (attempt := Attempt.reopen(run, role, nonce)) is None:
        return 0
    ending = attempt.stopped("warned" in wanted) if "stop" in wanted else _killed(code)
    attempt.say("settled", code=code, wanted=wanted)
    if role == Role.RUNTIME:
        job_runtime.finish(attempt, ending, killed=True)
    else:
        job_again.finish(attempt, ending)
    return 0


def _stop_timeout(run: RunDirectory) -> float:
    manifest = run.read(run.manifest, Manifest)
    return (manifest.job_settings() if manifest else Settings()).stop_timeout


def _killed(code: int) -> Ending:
    ended = how(128 - code if code > 128 else code)
    return Ending(Outcome.FAILED, f"the job wrapper {ended}", wrapper_code(code))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except Exception:  # whatever it was, the log must show it and the stub must settle it
        traceback.print_exc()
        sys.exit(int(Exit.SOFTWARE))
