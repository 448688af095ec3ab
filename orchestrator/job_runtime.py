"""The runtime job: runs the sandbox server for as long as the training needs it, and not longer.

What it is
    The loop around the server: ready, release of the training job, watch, stop. It ends when the training
    is complete, when the training is known dead, or when it is told to. A server that dies after it had
    served, or lives and does not answer any more, gets another life: in this job, where the stub starts it
    again; at the walltime in this job requeued, or in a successor. `runtime.max_restarts` limits that. On
    several nodes a server stands on each (`job_fleet`), and what is said here of the server holds for all.

What it does not do
    It neither starts sandboxes nor trains. `orchestrator.job` calls it.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time

from orchestrator.command import Command, Inbox, how
from orchestrator.contract import CompleteFlag, Exit, Outcome, ReadyFlag, Role
from orchestrator.job_core import STOPPED, TIMED_OUT, Attempt, Ending, wrapper_code
from orchestrator.job_fleet import Fleet
from orchestrator.peer import Peer, ServerWatch, TrainingWatch, Watcher, runtime_health
from orchestrator.schedulers import SchedulerError
from orchestrator.successor import submit_successor
from orchestrator.walltime import Walltime

_BOOT_LOOK_S, _SWEEP_S = 0.1, 20.0


class RuntimeJob:
    """One attempt of the runtime job."""

    def __init__(self, attempt: Attempt, inbox: Inbox) -> None:
        self.attempt, self.inbox = attempt, inbox
        self.run, self.settings = attempt.run, attempt.settings
        peer = Peer(self.run, Role.TRAINING, self.settings, attempt.scheduler)
        self.watch = TrainingWatch(peer, attempt.say)
        self.watcher = Watcher(self.watch.probe, min(1.0, peer.query_every), inbox.wake)
        self.server = ServerWatch(self.settings.peer_grace)
        self.hung = Watcher(self.server.probe, min(1.0, self.server.timeout_s), inbox.wake)
        self.alone = attempt.manifest.mode == "runtime-only"
        clock = Walltime(attempt.scheduler, attempt.job_id, self.settings.signal_lead)
        self.walltime = Watcher(clock.probe, 5.0, inbox.wake)
        several = self.settings.runtime_nodes > 1
        self.fleet = Fleet(attempt, inbox, self.command()) if several else None
        self.ready = False
        self.started = time.monotonic()

    def command(self) -> list[str]:
        default = [sys.executable, "-m", "runtime_server", "--run-dir", str(self.run.root)]
        return self.settings.runtime_command or default

    def work(self) -> int:
        """Run to the end; returns the exit code of the wrapper."""
        if (complete := self.complete()) is not None:
            return finish(self.attempt, complete)
        self.attempt.status("starting")
        try:
            command = self.start()
        except OSError as error:
            ending = Ending(Outcome.FAILED, f"the server did not start: {error}", Exit.NO_INPUT)
            return finish(self.attempt, ending)
        fleet = self.fleet or contextlib.nullcontext()
        with contextlib.nullcontext() if self.alone else self.watcher, self.walltime, self.hung, fleet:
            while (found := self.attempt.look(lambda: self.look(command))) is None:
                self.inbox.wait(self.settings.look_every if self.ready else _BOOT_LOOK_S)
        if not self.attempt.superseded:
            self.attempt.status("draining", reason=found.reason)
        # a server that does not answer does not clean up either: the sweep does
        code = command.end(0.0 if self.hung.reason else self.settings.stop_timeout)
        if found.outcome == Outcome.CANCELLED and self.inbox.stop:
            found = self.attempt.stopped(self.near_the_end, self.inbox.orphaned)
        if found.exit_code == Exit.REQUEUE:
            found = self.again_elsewhere(found, killed=code < 0)
        ended = finish(self.attempt, found, killed=code < 0)
        if self.fleet is not None:
            self.fleet.sweep()
        return ended

    def start(self) -> Command | Fleet:
        """Raises OSError when it cannot be started."""
        if self.fleet is not None:
            self.fleet.start()
            return self.fleet
        return Command(self.command(), self.inbox, env=self.attempt.environment(), cwd=self.run.root)

    def complete(self) -> Ending | None:
        """The end that is meant: the training is over for good."""
        flag = None if self.alone else self.run.read(self.run.complete_flag, CompleteFlag)
        return Ending(Outcome.SUCCESS, f"the training is complete ({flag.outcome})", 0) if flag else None

    def look(self, command: Command | Fleet) -> Ending | None:
        """What there is to see now: None to go on, or how it ends."""
        code = command.poll()
        if self.inbox.stop:
            return Ending(Outcome.CANCELLED, STOPPED, 143)
        if (complete := self.complete()) is not None:
            return complete
        if code is not None:
            return self.died(code)
        if self.attempt.superseded:
            return Ending(Outcome.CANCELLED, "a later attempt of the runtime job took over", 143)
        if self.hung.reason:
            return self.lost(self.hung.reason, Exit.SOFTWARE)
        if self.watcher.reason:
            return Ending(Outcome.PEER_GONE, self.watcher.reason, Exit.PEER_GONE)
        if self.near_the_end and self.ready and self.may_return():
            return Ending(Outcome.REQUEUED, TIMED_OUT, Exit.REQUEUE)
        return None if self.ready else self.look_ready()

    # --- another life ---

    @property
    def near_the_end(self) -> bool:
        return self.inbox.warned or self.walltime.reason is not None

    def may_return(self) -> bool:
        """Whether the runtime may have another life. A server by itself has users who know its address."""
        return not self.alone and self.attempt.earlier < self.settings.runtime_max_restarts

    def died(self, code: int) -> Ending:
        """The server ended by itself."""
        reason = f"the server {how(code)} {'while it served' if self.ready else 'before it was ready'}"
        return self.lost(reason, wrapper_code(code))

    def lost(self, reason: str, code: int) -> Ending:
        """If the server had served before, whoever uses it waits for the next one."""
        if not self.may_return() or not (self.ready or self.attempt.earlier):
            return Ending(Outcome.FAILED, reason, code)
        here = self.ready and not self.near_the_end
        return Ending(Outcome.REQUEUED, reason, Exit.AGAIN if here else Exit.REQUEUE)

    def again_elsewhere(self, ending: Ending, *, killed: bool) -> Ending:
        """Have this job requeued, or submit a successor. Recorded first, for a requeue ends this process."""
        attempt, scheduler = self.attempt, self.attempt.scheduler
        if scheduler is None or attempt.interactive:
            outcome = Outcome.TIMEOUT if self.near_the_end else Outcome.FAILED
            return Ending(outcome, f"{ending.reason}; a job started by hand is never requeued", 143)
        attempt.status("ended", ending)
        if killed:
            sweep(attempt)
        if self.fleet is not None:
            self.fleet.sweep()
        attempt.say("requeue_requested")
        try:
            scheduler.requeue(attempt.job_id)
        except SchedulerError as error:
            attempt.say("requeue_refused", problem=str(error))
            return self.successor(ending, str(error))
        return ending

    def successor(self, ending: Ending, refused: str) -> Ending:
        assert self.attempt.scheduler is not None  # `again_elsewhere` has seen to it
        try:
            new = submit_successor(self.run, Role.RUNTIME, Role.RUNTIME, self.attempt.scheduler)
        except (SchedulerError, OSError) as error:
            reason = f"{ending.reason}; {refused}; a successor was not submitted: {error}"
            return Ending(Outcome.FAILED, reason, Exit.REQUEUE)
        self.attempt.say("successor_submitted", job_id=new)
        return ending

    # --- readiness ---

    def look_ready(self) -> Ending | None:
        problem = self.unready()
        if not problem:
            self.become_ready(self.run.read_text(self.run.runtime_url))
            return None
        waited = time.monotonic() - self.started
        if waited < self.settings.ready_timeout:
            return None
        reason = f"the server was not ready within {self.settings.ready_timeout:g} s: {problem}"
        if self.attempt.earlier and self.may_return():  # it served once: perhaps another node does better
            return Ending(Outcome.REQUEUED, reason, Exit.REQUEUE)
        return Ending(Outcome.FAILED, reason, Exit.SOFTWARE)

    def unready(self) -> str:
        """Why the training cannot start yet, "" when it can."""
        if self.fleet is not None:
            return "" if self.fleet.lead and self.fleet.ready else self.fleet.problem
        flag = self.run.read(self.run.ready_flag, ReadyFlag)
        if flag is None or flag.nonce != self.attempt.nonce:
            return "it has not said that it is ready"
        return runtime_health(self.run, "run").problem

    def become_ready(self, url: str) -> None:
        self.ready = True
        self.attempt.status("running")
        self.attempt.say("ready", url=url, after_s=round(time.monotonic() - self.started, 3))
        self.watch.ready.set()
        self.watcher.hurry()
        if not self.alone and self.fleet is None:  # its users may stop it on purpose
            self.server.serves(url, self.run.read_text(self.run.runtime_api_key))


def finish(attempt: Attempt, ending: Ending, *, killed: bool = False) -> int:
    """Write down how it ended, then see to a training job that would wait for ever.

    A server that was `killed` could not clean up: its directories and mounts are swept, last, because
    nobody waits for that.
    """
    if ending.outcome == Outcome.REQUEUED:
        attempt.requeued(ending)
    elif not attempt.superseded:
        attempt.status("ended", ending)
        cancelled = attempt.cancel_peer(ending.reason)
        if cancelled and not attempt.run.latest_attempt(Role.TRAINING):
            reason = f"the training never started: {ending.reason}"
            attempt.run.end_unstarted(cancelled, ending.outcome, reason, int(ending.exit_code))
    if killed:
        sweep(attempt)
    return int(ending.exit_code)


def sweep(attempt: Attempt) -> None:
    """Run the sweep of the server's own program; it touches nothing whose owner lives."""
    settings = attempt.settings
    own = [] if settings.runtime_command else [sys.executable, "-m", "runtime_server", "--sweep"]
    if not (command := settings.sweep_command or own):
        return
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, timeout=_SWEEP_S, env=attempt.environment(), check=False
        )
        attempt.say("swept", exit_code=done.returncode)
    except (OSError, subprocess.TimeoutExpired) as error:
        attempt.say("sweep_failed", problem=str(error))
