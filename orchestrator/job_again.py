"""How a training job goes on after its life ends, and how it writes down an end that is final.

What it is
    `Again` knows the policies of `scheduler.on_timeout`. requeue: the same job is queued again; where that
    is refused, as chain. array: the task ends, the next task of the array goes on. chain: a successor of the
    same script is submitted. stop: the run ends. Whichever, only after progress and not too often.
    `finish` writes result, status and completion flag, or, for a life that is followed by another one, the
    status alone.

What it does not do
    It watches nothing and ends no process: `job_training` does.
"""

from __future__ import annotations

import contextlib
import json
import math
from typing import Any

from orchestrator import checkpoints
from orchestrator.contract import (
    CompleteFlag,
    Exit,
    Outcome,
    Result,
    Role,
    RunDirectory,
    read_bytes,
)
from orchestrator.job_core import STOPPED, TIMED_OUT, Attempt, Ending
from orchestrator.schedulers import SchedulerError
from orchestrator.successor import submit_successor


class Again:
    """The next life of a training job, if there is to be one. `newest` checkpoint: that at its start."""

    def __init__(self, attempt: Attempt, newest: str) -> None:
        self.attempt, self.settings, self.newest = attempt, attempt.settings, newest

    def after_walltime(self, asked: bool) -> Ending:
        """`asked`: the trainer wrote a checkpoint and asks for another life. Else a regular one will do."""
        if (refusal := self.refusal(asked)) != "":
            return Ending(Outcome.TIMEOUT, refusal, Exit.REQUEUE)
        return self.go_on()

    def after_term(self, asked: bool) -> Ending:
        """TERM came without a warning: requeued from outside, preempted, or cancelled."""
        attempt = self.attempt
        if returns := attempt.returns():
            return Ending(Outcome.REQUEUED, "the scheduler has requeued the job", 143)
        if attempt.inside and not attempt.interactive and attempt.inside.preempted(attempt.job_id):
            return self.after_walltime(asked)
        saved = "; a checkpoint was written" if asked else ""
        return Ending(Outcome.CANCELLED, STOPPED + saved, 143, sure=returns is not None)

    @property
    def progress(self) -> bool:
        """Whether there is a newer checkpoint than at the start of this life."""
        return checkpoints.newest(self.attempt.run) not in ("", self.newest)

    def refusal(self, asked: bool) -> str:
        """Why the job does not live again; "" when it does."""
        policy = self.settings.on_timeout
        if policy == "stop":
            return f"{TIMED_OUT}; on_timeout is stop"
        if self.attempt.interactive:
            return f"{TIMED_OUT}; a job that was started by hand does not go on by itself"
        if (
            policy != "array" and self.attempt.earlier >= self.settings.max_restarts
        ):  # that one has its length
            limit = f"scheduler.max_restarts ({self.settings.max_restarts})"
            return f"{TIMED_OUT} in life {self.attempt.earlier + 1}, the last that {limit} allows"
        if self.progress or (asked and not self.newest):  # another trainer keeps them where we do not look
            return ""
        if not self.newest:
            return f"{TIMED_OUT}, and there is no checkpoint"
        return f"no progress: {self.newest} was the newest checkpoint when this attempt started"

    def go_on(self) -> Ending:
        """Record it, then ask: a requeue ends this job, so it is the last thing that we do."""
        attempt = self.attempt
        if self.settings.on_timeout == "array":
            if attempt.returns() is not False:
                return Ending(Outcome.REQUEUED, "the next task of the array goes on", Exit.REQUEUE)
            return Ending(Outcome.TIMEOUT, "this was the last task of the array", Exit.REQUEUE)
        attempt.status("ended", Ending(Outcome.REQUEUED, "checkpoint written", Exit.REQUEUE))
        refused = self.requeue() if self.settings.on_timeout == "requeue" else ""
        problem = self.chain() if refused or self.settings.on_timeout == "chain" else ""
        if not problem:
            return Ending(Outcome.REQUEUED, "checkpoint written", Exit.REQUEUE)
        return Ending(Outcome.TIMEOUT, "; ".join(p for p in (refused, problem) if p), Exit.REQUEUE)

    def requeue(self) -> str:
        """ "" when the scheduler does it; else why not."""
        assert self.attempt.scheduler is not None  # `refusal` has seen to it
        self.attempt.say("requeue_requested")
        try:
            self.attempt.scheduler.requeue(self.attempt.job_id)
        except SchedulerError as error:
            self.attempt.say("requeue_refused", problem=str(error))
            return f"the scheduler refused to requeue the job: {error}"
        return ""

    def chain(self) -> str:
        """ "" when a successor was submitted; else why not."""
        attempt = self.attempt
        assert attempt.scheduler is not None  # `refusal` has seen to it
        try:
            job_id = submit_successor(attempt.run, Role.TRAINING, Role.TRAINING, attempt.scheduler)
        except (SchedulerError, OSError) as error:
            attempt.say("successor_refused", problem=str(error))
            return f"a successor was not submitted: {error}"
        attempt.say("successor_submitted", job_id=job_id)
        return ""


# --- the end -----------------------------------------------------------------------------------------


def finish(attempt: Attempt, ending: Ending, summary_before: bytes = b"") -> int:
    """Write the result, the status, then the complete flag, last; then see to what is still queued.

    Repeating it after a kill in between changes nothing that was already said.
    """
    if attempt.superseded:
        return int(ending.exit_code)
    # When the scheduler does not say whether this is the end of the job, nor do we: whoever sees the job
    # over takes the status for its last word, and a next life goes on.
    if not ending.sure or ending.outcome == Outcome.REQUEUED:
        attempt.requeued(ending)
        return int(ending.exit_code)
    result = _result(attempt, ending, summary_before)
    attempt.status("ended", Ending(Outcome(result.outcome), result.reason, result.exit_code))
    flag = CompleteFlag(
        run_id=attempt.run.run_id, attempt=attempt.number, nonce=attempt.nonce, outcome=result.outcome
    )
    attempt.run.publish(attempt.run.complete_flag, flag)
    if attempt.inside and attempt.is_task and not attempt.interactive:
        attempt.inside.cancel_pending(attempt.job_id)
    attempt.cancel_peer(f"the training ended: {result.outcome}")
    return result.exit_code


def _result(attempt: Attempt, ending: Ending, summary_before: bytes) -> Result:
    """The result that is there already, or the one that is now written."""
    run = attempt.run
    result = run.read(run.result, Result)
    if result is None or result.attempt < attempt.number:
        summary = read_summary(run, summary_before)
        result = Result(
            run_id=run.run_id,
            attempt=attempt.number,
            job_id=attempt.job_id,
            outcome=ending.outcome,
            reason=_reason(ending, summary),
            exit_code=int(ending.exit_code),
            metrics=flat_numbers(summary.get("metrics")),
        )
        run.publish(run.result, result)
    return result


def read_summary(run: RunDirectory, before: bytes) -> dict[str, Any]:
    """The trainer's last word; {} when it wrote none in this attempt, or not a JSON object."""
    now = read_bytes(run.summary)
    with contextlib.suppress(ValueError):
        data = json.loads(now) if now != before else None
        if isinstance(data, dict):
            return data
    return {}


def _reason(ending: Ending, summary: dict[str, Any]) -> str:
    """The trainer's own reason explains its own ending; it cannot explain what others did to it."""
    said = str(summary.get("reason") or "")
    if not said or ending.outcome not in (Outcome.SUCCESS, Outcome.FAILED):
        return ending.reason
    return said if ending.outcome == Outcome.SUCCESS else f"{ending.reason}: {said}"


def flat_numbers(data: object) -> dict[str, float]:
    """Finite numbers by name; anything else in the trainer's metrics is left out."""
    if not isinstance(data, dict):
        return {}
    numbers = {str(k): v for k, v in data.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return {name: float(value) for name, value in numbers.items() if math.isfinite(value)}
