"""The training job: checks the runtime, runs the trainer, watches the runtime, says what came of it.

What it is
    The loop around the trainer. It ends with the trainer, or ends it: when the runtime is lost, when it
    is told to. A trainer that exits with 85 has written a checkpoint and wants to be requeued. In the
    end it writes `result.json` and, last of all, `training_complete.flag`.

What it does not do
    It does not train, and it never takes success from the absence of an error: only exit code 0 is
    success. `orchestrator.job` calls it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import sys
from typing import Any

from orchestrator.command import Command, Inbox, how
from orchestrator.contract import (
    CompleteFlag,
    Env,
    Exit,
    Outcome,
    PeerGone,
    Result,
    Role,
    RunDirectory,
    WaitTimeout,
    read_bytes,
    wait_for,
)
from orchestrator.job_core import STOPPED, TIMED_OUT, Attempt, Ending, wrapper_code
from orchestrator.peer import Peer, RuntimeWatch, Watcher
from orchestrator.schedulers import SchedulerError


class _ToldToStop(Exception):
    """TERM arrived while we waited for the runtime."""


class TrainingJob:
    """One attempt of the training job."""

    def __init__(self, attempt: Attempt, inbox: Inbox) -> None:
        self.attempt, self.inbox = attempt, inbox
        self.run, self.settings = attempt.run, attempt.settings
        peer = Peer(self.run, Role.RUNTIME, self.settings, attempt.scheduler)
        self.watch = RuntimeWatch(peer, attempt.manifest.mode)
        self.watcher = Watcher(self.watch.probe, min(2.0, 4 * self.settings.look_every), inbox.wake)
        self.summary_before = read_bytes(self.run.summary)
        self.newest_before = newest_checkpoint(self.run)
        self.warned = False

    def work(self) -> int:
        """Run to the end; returns the exit code of the wrapper."""
        self.attempt.status("waiting")
        if (ending := self.wait_for_runtime()) is not None:
            return finish(self.attempt, ending, self.summary_before)
        try:
            command = Command(
                self.command(),
                self.inbox,
                env=self.environment(),
                cwd=self.run.root,
                ignore=self.checkpoint_signal,  # until the trainer has its handler, it would be fatal
            )
        except OSError as error:
            ending = Ending(Outcome.FAILED, f"the trainer did not start: {error}", Exit.NO_INPUT)
            return finish(self.attempt, ending, self.summary_before)
        self.attempt.status("running")
        with self.watcher:
            while (cause := self.attempt.look(lambda: self.look(command))) is None:
                self.inbox.wait(self.settings.look_every)
        code = self.stop(command, cause)
        ending = self.judge(cause, code)
        if ending.outcome == Outcome.REQUEUED:
            return self.requeue(ending)
        return finish(self.attempt, ending, self.summary_before)

    # --- before ---

    def wait_for_runtime(self) -> Ending | None:
        """None once the runtime answers; else why there is nothing to train with."""
        try:
            wait_for(
                self.ready,
                "a runtime that answers",
                self.settings.ready_timeout,
                lambda: self.attempt.look(self.watch.gone),
                longest_s=self.settings.look_every,
                alive_every_s=0.5,
            )
        except PeerGone as error:
            return Ending(Outcome.PEER_GONE, str(error), Exit.PEER_GONE)
        except WaitTimeout as error:
            return Ending(Outcome.PEER_GONE, f"{error}: {self.watch.last.problem}", Exit.PEER_GONE)
        except _ToldToStop:
            return self.told_to_stop()
        return None

    def ready(self) -> bool | None:
        if self.inbox.stop:
            raise _ToldToStop
        # A server that is about to end may still answer: the job's own record counts first.
        return self.attempt.look(lambda: None if self.watch.gone() else self.watch.ready())

    def told_to_stop(self) -> Ending:
        if self.inbox.warned:
            return Ending(Outcome.TIMEOUT, TIMED_OUT, 143)
        return Ending(Outcome.CANCELLED, STOPPED, 143)

    # --- the trainer ---

    @property
    def checkpoint_signal(self) -> int:
        return signal.Signals[f"SIG{self.settings.checkpoint_signal}"].value

    def command(self) -> list[str]:
        default = [sys.executable, "-m", "trainer", "--run-dir", str(self.run.root)]
        return self.settings.training_command or default

    def environment(self) -> dict[str, str]:
        """The address under our names and under those that other frameworks read; the key as a path."""
        url, key_file = self.run.read_text(self.run.runtime_url), str(self.run.runtime_api_key)
        return self.attempt.environment() | {
            Env.RUNTIME_URL.value: url,
            Env.RUNTIME_API_KEY_FILE.value: key_file,
            "RUNTIME_URL": url,
            "RUNTIME_API_KEY_FILE": key_file,
            "SANDBOX_REMOTE_RUNTIME_API_URL": url,
        }

    def look(self, command: Command) -> str | None:
        """None to go on; else what ends it: trainer, stop, superseded, or why the runtime is gone."""
        if command.poll() is not None:
            return "trainer"
        if self.inbox.stop:
            return "stop"
        if self.attempt.superseded:
            return "superseded"
        if self.watcher.reason:
            return self.watcher.reason
        if self.inbox.warned and not self.warned:
            self.warned = True
            self.attempt.say("walltime_near")
            command.send(self.checkpoint_signal)
        return None

    def stop(self, command: Command, cause: str) -> int:
        if cause != "trainer" and not self.attempt.superseded:
            self.attempt.status("draining", reason=STOPPED if cause == "stop" else cause)
        return command.end(self.settings.stop_timeout)

    def judge(self, cause: str, code: int) -> Ending:
        """From the cause and the trainer's exit code (negative for a signal) to what is recorded."""
        if cause == "superseded":
            return Ending(Outcome.CANCELLED, "a later attempt of the training job took over", 143)
        if cause == "stop" and not (code == Exit.REQUEUE and self.inbox.warned):
            return self.told_to_stop()
        if cause not in ("trainer", "stop"):
            return Ending(Outcome.PEER_GONE, cause, Exit.PEER_GONE)
        if code == Exit.OK:
            return Ending(Outcome.SUCCESS, "the trainer finished", 0)
        if code == Exit.REQUEUE:
            refusal = self.may_not_requeue()
            return Ending(Outcome.TIMEOUT if refusal else Outcome.REQUEUED, refusal, Exit.REQUEUE)
        if code == Exit.PEER_GONE:
            return Ending(Outcome.PEER_GONE, "the trainer lost the runtime", Exit.PEER_GONE)
        return Ending(Outcome.FAILED, f"the trainer {how(code)}", wrapper_code(code))

    # --- again ---

    def may_not_requeue(self) -> str:
        """Why a trainer that asks for it is not requeued; "" when it is."""
        restarts = os.environ.get(Env.RESTARTS, "")
        if self.settings.on_timeout != "requeue":
            return f"the walltime ended; on_timeout is {self.settings.on_timeout}"
        if self.attempt.scheduler is None:
            return "the walltime ended, and no scheduler is there to requeue a job that was started by hand"
        if (int(restarts) if restarts.isdigit() else 0) >= self.settings.max_restarts:
            return f"requeued {restarts} times, which is the limit (scheduler.max_restarts)"
        if (newest := newest_checkpoint(self.run)) and newest == self.newest_before:
            return f"no progress: {newest} was the newest checkpoint when this attempt started"
        return ""

    def requeue(self, ending: Ending) -> int:
        """Record it, then ask: the call ends this job, so it is the last thing that we do."""
        scheduler = self.attempt.scheduler
        assert scheduler is not None  # `may_not_requeue` has seen to it
        self.attempt.status("ended", Ending(Outcome.REQUEUED, "checkpoint written", Exit.REQUEUE))
        try:
            scheduler.requeue(self.attempt.job_id)
        except SchedulerError as error:
            reason = f"the scheduler refused to requeue the job: {error}"
            return finish(self.attempt, Ending(Outcome.TIMEOUT, reason, Exit.REQUEUE), self.summary_before)
        return int(ending.exit_code)


def newest_checkpoint(run: RunDirectory) -> str:
    """Name of the newest checkpoint, by its step number; "" without any."""
    with contextlib.suppress(OSError):
        names = [p.name for p in run.checkpoints.iterdir() if p.name.rpartition("-")[2].isdigit()]
        return max(names, key=lambda name: int(name.rpartition("-")[2]), default="")
    return ""


# --- the end -----------------------------------------------------------------------------------------


def finish(attempt: Attempt, ending: Ending, summary_before: bytes = b"") -> int:
    """Write the result, the status, then the complete flag, last; then see to a runtime job still queued.

    Repeating it after a kill in between changes nothing that was already said.
    """
    if attempt.superseded:
        return int(ending.exit_code)
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
    attempt.status("ended", Ending(Outcome(result.outcome), result.reason, result.exit_code))
    flag = CompleteFlag(
        run_id=run.run_id, attempt=attempt.number, nonce=attempt.nonce, outcome=result.outcome
    )
    run.publish(run.complete_flag, flag)
    attempt.cancel_peer(f"the training ended: {result.outcome}")
    return result.exit_code


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
