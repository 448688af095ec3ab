"""The training job: checks the runtime, runs the trainer, watches the runtime, says what came of it.

What it is
    The loop around the trainer. It ends with the trainer, or ends it: when the runtime is lost, when it
    is told to, when the walltime is near. A trainer that exits with 85 has written a checkpoint and wants
    to live again, which `job_again` sees to. In the end it writes `result.json` and, last of all,
    `training_complete.flag`; a life that is followed by another one writes neither.

What it does not do
    It does not train, and it never takes success from the absence of an error: only exit code 0 is
    success. `orchestrator.job` calls it.
"""

from __future__ import annotations

import os
import signal
import sys
import time

from orchestrator import checkpoints
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
    Saving,
    WaitTimeout,
    read_bytes,
    wait_for,
)
from orchestrator.job_again import Again, finish
from orchestrator.job_core import STOPPED, TIMED_OUT, Attempt, Ending, wrapper_code
from orchestrator.job_launch import step_environment, training_argv
from orchestrator.peer import Peer, RuntimeWatch, Watcher
from orchestrator.revive import Reviver
from orchestrator.walltime import MARGIN_S, Walltime, needed

_SHARE = 0.6  # of the time between TERM and KILL, for a last checkpoint


class _ToldToStop(Exception):
    """TERM arrived while we waited for the runtime."""


class TrainingJob:
    """One attempt of the training job."""

    def __init__(self, attempt: Attempt, inbox: Inbox) -> None:
        self.attempt, self.inbox = attempt, inbox
        self.run, self.settings = attempt.run, attempt.settings
        peer = Peer(self.run, Role.RUNTIME, self.settings, attempt.scheduler)
        self.watch = RuntimeWatch(peer, attempt.manifest.mode, Reviver(attempt, peer).revive)
        self.watcher = Watcher(self.watch.probe, min(2.0, 4 * self.settings.look_every), inbox.wake)
        limit_s = float(attempt.manifest.jobs.get(Role.TRAINING, {}).get("time_limit_s", 0))
        self.clock = Walltime(attempt.scheduler, attempt.job_id, self.settings.signal_lead, limit_s)
        self.walltime = Watcher(self.near, min(5.0, 10 * self.settings.look_every), inbox.wake)
        self.summary_before = read_bytes(self.run.summary)
        self.again = Again(attempt, checkpoints.newest(self.run))
        self.warned_at: float | None = None
        self.patience = 0.0

    def work(self) -> int:
        """Run to the end; returns the exit code of the wrapper."""
        self.attempt.status("waiting")
        if (ending := self.wait_for_runtime()) is not None:
            return finish(self.attempt, ending, self.summary_before)
        try:
            command = self.start()
        except OSError as error:
            ending = Ending(Outcome.FAILED, f"the trainer did not start: {error}", Exit.NO_INPUT)
            return finish(self.attempt, ending, self.summary_before)
        self.attempt.status("running")
        with self.watcher, self.walltime:
            while (cause := self.attempt.look(lambda: self.look(command))) is None:
                self.inbox.wait(self.settings.look_every)
        code = self.stop(command, cause)
        ending = self.judge(cause, code)
        return finish(self.attempt, ending, self.summary_before)

    # --- before ---

    def wait_for_runtime(self) -> Ending | None:
        """None once the runtime answers; else why there is nothing to train with."""
        try:
            wait_for(
                self.ready,
                "a runtime that answers",
                self.settings.ready_timeout,
                lambda: self.attempt.look(self.watch.lost),
                longest_s=self.settings.look_every,
                alive_every_s=0.5,
            )
        except PeerGone as error:
            return Ending(Outcome.PEER_GONE, str(error), Exit.PEER_GONE)
        except WaitTimeout as error:
            return Ending(Outcome.PEER_GONE, f"{error}: {self.watch.last.problem}", Exit.PEER_GONE)
        except _ToldToStop:
            return self.attempt.stopped(self.inbox.warned, self.inbox.orphaned)
        return None

    def ready(self) -> bool | None:
        if self.inbox.stop:
            raise _ToldToStop
        # A server that is about to end may still answer: the job's own record counts first.
        return self.attempt.look(lambda: None if self.watch.gone() else self.watch.ready())

    # --- the trainer ---

    def start(self) -> Command:
        """Raises OSError when it cannot be started."""
        self.run.publish(self.run.checkpoint_request, "")  # an earlier life's
        return Command(
            self.command(),
            self.inbox,
            env=self.environment(),
            cwd=self.run.root,
            ignore=self.checkpoint_signal,  # until the trainer has its handler, it would be fatal
        )

    @property
    def checkpoint_signal(self) -> int:
        return signal.Signals[f"SIG{self.settings.checkpoint_signal}"].value

    def command(self) -> list[str]:
        default = [sys.executable, "-m", "trainer", "--run-dir", str(self.run.root)]
        life = f"{self.run.run_id}.{self.attempt.number}"
        command = self.settings.training_command or default
        return training_argv(command, self.settings, self.attempt.inside, life)

    def environment(self) -> dict[str, str]:
        """The address under our names and under those that other frameworks read; the key as a path.

        OpenHands and SkyRL read the key itself, from the environment and from nowhere else.
        """
        url, key_file = self.run.read_text(self.run.runtime_url), str(self.run.runtime_api_key)
        return step_environment(self.attempt.environment(), self.settings) | {
            Env.RUNTIME_URL.value: url,
            Env.RUNTIME_API_KEY_FILE.value: key_file,
            "RUNTIME_URL": url,
            "RUNTIME_API_KEY_FILE": key_file,
            "SANDBOX_REMOTE_RUNTIME_API_URL": url,
            "ALLHANDS_API_KEY": self.run.read_text(self.run.runtime_api_key),
        }

    def look(self, command: Command) -> str | None:
        """None to go on; else what ends it: trainer, stop, late, superseded, or why the runtime is gone."""
        if command.poll() is not None:
            return "trainer"
        if self.inbox.stop:
            return "stop"
        if self.attempt.superseded:
            return "superseded"
        if self.watcher.reason:
            return self.watcher.reason
        if self.warned_at is None and (self.inbox.warned or self.walltime.reason):
            self.warned_at = time.monotonic()
            left_s = self.settings.signal_lead if self.inbox.warned else self.clock.left_s
            self.patience = (left_s or 0.0) - self.settings.stop_timeout - MARGIN_S
            self.attempt.say("walltime_near", reason=self.walltime.reason or "the scheduler's signal")
            self.ask_for_checkpoint(command)
        return "late" if self.is_late() else None

    def is_late(self) -> bool:
        """Whether the trainer has had its time for the checkpoint: what is left is for an end in order,
        and for asking to live again, which a job cannot do any more once its time limit has come."""
        if self.warned_at is None:
            return False
        return self.patience > 0 and time.monotonic() - self.warned_at > self.patience

    def near(self) -> str | None:
        """Why the end of our time is near: the scheduler's own warning may come too late for this trainer's
        checkpoints, or not at all."""
        saving = self.run.read(self.run.saving, Saving) or Saving()
        lead_s = needed(saving, self.settings.stop_timeout, self.clock.limit_s)
        if self.clock.raise_lead(lead_s):
            self.attempt.say("lead_raised", lead_s=round(lead_s, 1), signal_s=self.settings.signal_lead)
            print(
                f"saves took up to {saving.save_s:.1f} s, and one may have to wait {saving.busy_s:.1f} s: "
                f"a checkpoint is asked for {lead_s:.0f} s before the time limit from now on",
                file=sys.stderr,
                flush=True,
            )
        return self.clock.probe()

    def ask_for_checkpoint(self, command: Command) -> None:
        """By a file, which reaches every rank and is not lost while a trainer is still importing; and by a
        signal to the one process. A launcher's agent would die of the signal, or keep it to itself."""
        self.attempt.look(lambda: self.run.publish(self.run.checkpoint_request, self.attempt.nonce))
        if self.settings.launcher == "none":
            command.send(self.checkpoint_signal)

    def stop(self, command: Command, cause: str) -> int:
        """End the trainer. TERM without a warning may be a preemption: there is time for a checkpoint."""
        if cause == "trainer" or self.attempt.superseded:  # not TERM: it must not save over its successor
            return command.end(self.settings.stop_timeout, signal.SIGINT)
        self.attempt.status("draining", reason={"stop": STOPPED, "late": TIMED_OUT}.get(cause, cause))
        patience = self.settings.stop_timeout
        if cause == "stop" and not self.cancelled():
            if self.warned_at is None:
                self.ask_for_checkpoint(command)
            begun = time.monotonic()
            command.wait(patience * _SHARE)
            patience -= time.monotonic() - begun
        return command.end(patience)

    def cancelled(self) -> bool:
        """Whether somebody asked for the end of the run with our own command: then nobody resumes it."""
        found = self.attempt.look(self.run.cancel_asked)
        return bool(found)

    def judge(self, cause: str, code: int) -> Ending:
        """From the cause and the trainer's exit code (negative for a signal) to what is recorded."""
        asked = code == Exit.REQUEUE
        if cause == "trainer" and code != Exit.OK and self.inbox.stop:
            cause = "stop"  # TERM went to every process of the job, and the trainer was the first to end
        if cause == "superseded":
            return Ending(Outcome.CANCELLED, "a later attempt of the training job took over", 143)
        if cause == "late" or (cause == "stop" and self.warned_at is not None):
            return self.again.after_walltime(asked)
        if cause == "stop" and self.inbox.orphaned:
            return self.attempt.stopped(warned=False, orphaned=True)
        if cause == "stop":
            return self.again.after_term(asked)
        if cause != "trainer":
            return Ending(Outcome.PEER_GONE, cause, Exit.PEER_GONE)
        if code == Exit.OK:
            return Ending(Outcome.SUCCESS, "the trainer finished", 0)
        if asked:
            return self.again.after_walltime(asked)
        if self.settings.launcher == "torchrun" and self.warned_at is not None and self.again.progress:
            return self.again.after_walltime(asked)  # torchrun has one code for whatever its processes say
        if code == Exit.PEER_GONE:
            return Ending(Outcome.PEER_GONE, "the trainer lost the runtime", Exit.PEER_GONE)
        return Ending(Outcome.FAILED, f"the trainer {how(code)}", wrapper_code(code))


# --- is it over already? -----------------------------------------------------------------------------


def complete(run: RunDirectory) -> CompleteFlag | None:
    """The completion of an earlier life, which this one must not overwrite; None when there is work to do.

    A life that was told to end and could not learn why may have written down that it was cancelled. When
    the scheduler starts the same job again, it was not: that word is taken back.
    """
    flag, result = run.read(run.complete_flag, CompleteFlag), run.read(run.result, Result)
    if flag is None or flag.outcome != Outcome.CANCELLED or result is None:
        return flag
    restarts = os.environ.get(Env.RESTARTS, "0")
    same = result.job_id.partition("_")[0] == os.environ.get(Env.JOB_ID, "").partition("_")[0] != ""
    if not same or (restarts == "0" and "_" not in result.job_id):
        return flag
    run.publish(run.complete_flag, "")
    run.publish(run.result, "")
    run.events_of(Role.TRAINING, f"{Role.TRAINING}-job").add("taken_back", outcome=flag.outcome)
    return None
