"""The supervisor of one local job: controller and node daemon of Slurm, for a single job.

What it is
    `python -m orchestrator.schedulers.local_job JOB_DIR` detaches a process that waits while the job
    is held or depends on another, runs its script under a keeper (`local_keeper`), warns and ends it at
    the time limit, obeys the requests in the job's folder, and writes `state.json`, of which it is
    the only writer. The command returns once that process is up; its exit code says whether.

How it behaves (as Slurm does, unless said otherwise)
    `after:` is met once the other job is no longer pending, however it left the queue, or is unknown.
    The warning goes to the batch shell only. At the time limit and on cancel the batch shell gets CONT
    and TERM, and everything left after KillWait gets KILL. When the script ends by itself, what it left
    behind gets TERM, and KILL after KillWait (Slurm: KILL at once). A requeue keeps the id, counts
    `ORCHESTRATE_RESTARTS` and appends to the logs. Times are kept to the millisecond, not to 30 s.

What it does not do
    No resources are counted and no queue is kept: a job that may start, starts. Linux only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from orchestrator.identity import Process
from orchestrator.processes import become_subreaper, descendants, end_descendants, signal_all
from orchestrator.records import Env
from orchestrator.schedulers import JobState
from orchestrator.schedulers.local_files import JobFiles, JobRecord, read_request, start_supervisor
from orchestrator.schedulers.local_keeper import Keeper

_LOOK_AGAIN_S = 1.0  # at an awaited job whose supervisor may have been killed before it could wake us


class Supervisor:
    """One job, from submission to end."""

    def __init__(self, files: JobFiles) -> None:
        self.files = files
        local = files.spec()
        self.spec = local.spec()
        self.kill_wait_s, self.requeue_delay_s = local.kill_wait_s, local.requeue_delay_s
        self.held, self.after = self.spec.held, self.spec.after
        self.cancelled = self.requeued = False
        self.signals: list[str] = []
        self.taken: list[Path] = []
        self.started: set[int] = set()
        self.wake = os.open(files.wake_fifo, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        me = dataclasses.asdict(Process.of(os.getpid()))
        state = JobState.HELD if self.held else JobState.PENDING
        self.record = JobRecord(
            job_id=files.job_id, state=state, raw="PENDING", reason="Accepted", supervisor=me
        )

    def run(self) -> None:
        while self.queue():
            self.live()
            if not self.requeued:
                return
            self.back_to_queue()

    def say(self, state: JobState, raw: str, reason: str, **more: Any) -> None:
        """Publish the job's state; one word of it per change, so that readers see no repetition."""
        new = dataclasses.replace(self.record, state=state, raw=raw, reason=reason, **more)
        if new != self.record:
            self.record = new
            self.files.publish(new)

    def end(self, raw: str, reason: str, code: int | None) -> None:
        self.say(JobState.ENDED, raw, reason, exit_code=code, ended_at=time.time())
        self.tell_waiters()
        for path in self.files.pending_requests():
            path.unlink(missing_ok=True)

    # --- waiting and requests ---

    def pause(self, seconds: float, *others: int) -> None:
        """Sleep until woken, until one of the other descriptors speaks, or for so long; read requests.

        Acknowledges the requests of last time first: by now their effect is published.
        """
        while self.taken:
            self.taken.pop().unlink(missing_ok=True)
        readable, _, _ = select.select([self.wake, *others], [], [], max(0.0, min(seconds, 3600.0)))
        if self.wake in readable:
            with contextlib.suppress(BlockingIOError):
                os.read(self.wake, 4096)
        self.obey()

    def obey(self) -> None:
        for path in self.files.pending_requests():
            if path in self.taken:
                continue
            self.taken.append(path)
            verb, argument = read_request(path)
            if verb == "release":
                self.held = False
            elif verb == "cancel":
                self.cancelled = True
            elif verb == "requeue":
                self.requeued = True
            elif verb == "signal":
                self.signals.append(argument)
            elif verb == "start":
                self.start(argument)

    def start(self, job_id: str) -> None:
        """Start another job's supervisor, for a process of this job that has submitted it: a child of that
        process would end with this job."""
        other = self.files.sibling(job_id)
        with contextlib.suppress(OSError, subprocess.SubprocessError):  # whoever asks sees that it is not up
            start_supervisor(other)
            if (record := other.record()) is not None:
                self.started.add(int(record.supervisor["pid"]))

    def on_term(self, *_: object) -> None:
        """Somebody (a shutting-down machine) wants this supervisor gone: the job is cancelled."""
        self.cancelled = True
        os.write(self.wake, b"!")

    # --- in the queue ---

    def queue(self, begin: float = 0.0) -> bool:
        """Wait until the job may start. False when it was cancelled before."""
        begin = time.monotonic() + self.requeue_delay_s if self.record.restarts else 0.0
        self.obey()
        while not self.cancelled:
            wait = self.blocked(begin)
            if wait is None:
                return True
            self.pause(wait)
        self.end("CANCELLED", "cancelled while pending", None)
        return False

    def blocked(self, begin: float) -> float | None:
        """None when the job may start; else how long until the next look, the reason being published."""
        if self.held:
            self.say(JobState.HELD, "PENDING", "JobHeldUser")
            return math.inf
        if self.after and not self.left_queue(self.after):
            self.say(JobState.PENDING, "PENDING", "Dependency")
            return _LOOK_AGAIN_S
        self.after = None  # once met, it is gone for good, also after a requeue
        if (left := begin - time.monotonic()) > 0:
            self.say(JobState.PENDING, "PENDING", "BeginTime")
            return left
        return None

    def left_queue(self, job_id: str) -> bool:
        """Whether the other job is no longer pending; asks it to wake us when that changes."""
        other = self.files.sibling(job_id)
        with contextlib.suppress(FileNotFoundError):
            (other.waiters / self.files.job_id).touch()
        record = other.record()
        return record is None or not record.queued or record.alive() is False

    def tell_waiters(self) -> None:
        for waiter in self.files.waiters.iterdir():
            self.files.sibling(waiter.name).wake()

    def back_to_queue(self) -> None:
        self.requeued = False
        self.say(
            *(JobState.PENDING, "PENDING", "BeginTime"),
            restarts=self.record.restarts + 1,
            keeper={},
            script_pid=0,
            exit_code=None,
        )

    # --- running ---

    def environment(self) -> dict[str, str]:
        return self.spec.env | {
            Env.JOB_ID.value: self.files.job_id,
            Env.RESTARTS.value: str(self.record.restarts),
        }

    def live(self) -> None:
        """One life: from the script's start until nothing of it is left. Publishes the end."""
        keeper = Keeper(self.spec, self.files.script, self.environment(), self.kill_wait_s)
        who = keeper.start(self.files.job_id, self.orphaned)
        self.say(*(JobState.RUNNING, "RUNNING", ""), keeper=dataclasses.asdict(who), started_at=time.time())
        self.tell_waiters()
        keeper.go()
        life = _Life(self, keeper)
        while not keeper.poll():
            life.act()
            self.pause(life.next_deadline() - time.monotonic(), keeper.reports)
        self.obey()  # a requeue asked for in the script's last breath
        if keeper.exit_code is None:
            end_descendants(self.kill_wait_s, without=self.started)
        if self.cancelled or not self.requeued:
            self.requeued = False
            self.end(*self.verdict(keeper, life))
        keeper.close()
        end_descendants(self.kill_wait_s, without=self.started)  # the keeper itself, by now on its way out

    def verdict(self, keeper: Keeper, life: _Life) -> tuple[str, str, int | None]:
        code = keeper.exit_code
        shown = None if code is None else code if code >= 0 else 128 - code
        if keeper.problem and keeper.shell is None:
            return "FAILED", f"JobLaunchFailure: {keeper.problem}", None
        if life.stop_reason:
            return *(("CANCELLED", "cancelled") if self.cancelled else life.stop_reason), shown
        if code is None:
            return "FAILED", keeper.problem, None
        if code < 0:
            return "FAILED", f"the batch script was killed by {_signal_name(-code)}", shown
        return ("COMPLETED", "", 0) if code == 0 else ("FAILED", "NonZeroExitCode", code)

    def orphaned(self, code: int | None) -> None:
        """In the keeper, once its leash is gone: if that is the supervisor's death, say how it ended."""
        written = self.files.record()
        if Process(**self.record.supervisor).alive() or written is None or written.over or written.queued:
            return
        shown = None if code is None else code if code >= 0 else 128 - code
        self.end("FAILED", "the supervisor of this job was killed, which ended the job", shown)


class _Life:
    """The clock of one life: when to warn, when to stop, when to kill."""

    def __init__(self, supervisor: Supervisor, keeper: Keeper) -> None:
        self.supervisor, self.keeper = supervisor, keeper
        self.name, _, lead = supervisor.spec.signal.partition("@")
        limit, start = supervisor.spec.time_limit_s, time.monotonic()
        # A lead as long as the limit would kill the shell before its traps are set.
        self.warn_at = start + (limit - float(lead) if float(lead) < limit else limit / 2)
        self.limit_at, self.kill_at = start + limit, math.inf
        self.stop_reason: tuple[str, str] | None = None

    def next_deadline(self) -> float:
        return min(self.warn_at, self.limit_at, self.kill_at)

    def act(self) -> None:
        """Do what is due: pass on signals, warn, stop, kill."""
        if (shell := self.keeper.shell) is None:
            return
        supervisor, now = self.supervisor, time.monotonic()
        if self.stop_reason is None:
            supervisor.say(JobState.RUNNING, "RUNNING", "", script_pid=shell.pid)
        while supervisor.signals:
            shell.send(_signal_number(supervisor.signals.pop(0)))
        if now >= self.warn_at:
            self.warn_at = math.inf
            shell.send(_signal_number(self.name))
        if self.stop_reason is None:
            self.stop_if_due(shell, now)
        if now >= self.kill_at:
            self.kill_at = now + 1.0
            pids = descendants(os.getpid(), (self.keeper.pid,), self.supervisor.started)
            signal_all(pids, signal.SIGKILL)

    def stop_if_due(self, shell: Process, now: float) -> None:
        if self.supervisor.cancelled:
            self.stop_reason = ("CANCELLED", "cancelled")
        elif self.supervisor.requeued:
            self.stop_reason = ("REQUEUED", "requeued")
        elif now >= self.limit_at:
            self.stop_reason = ("TIMEOUT", "TimeLimit")
        else:
            return
        self.warn_at = self.limit_at = math.inf
        self.kill_at = now + self.supervisor.kill_wait_s
        # the job itself asks, in its last seconds, whether it will live again
        self.supervisor.say(JobState.RUNNING, "COMPLETING", self.stop_reason[1])
        shell.send(signal.SIGCONT)
        shell.send(signal.SIGTERM)


def _signal_number(name: str) -> int:
    return signal.Signals[f"SIG{name.removeprefix('SIG')}"].value


def _signal_name(number: int) -> str:
    with contextlib.suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"


# --- detaching ---------------------------------------------------------------------------------------


def main(job_dir: str) -> int:
    """Detach the supervisor; returns 0 in the caller's child once the job's state was published."""
    os.setsid()
    ready, tell = os.pipe()
    if os.fork() != 0:
        os.close(tell)
        return 0 if os.read(ready, 1) else 1
    os.close(ready)
    supervisor = Supervisor(JobFiles(Path(job_dir)))
    _leave(supervisor.files.log)
    become_subreaper()
    signal.signal(signal.SIGTERM, supervisor.on_term)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    supervisor.files.publish(supervisor.record)
    os.write(tell, b"!")
    os.close(tell)
    supervisor.run()
    return 0


def _leave(log: Path) -> None:
    """Let go of the caller's terminal, pipes and directory."""
    os.chdir("/")
    for path, flags, target in (
        (os.devnull, os.O_RDONLY, (0,)),
        (str(log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, (1, 2)),
    ):
        descriptor = os.open(path, flags, 0o600)
        for number in target:
            os.dup2(descriptor, number)
        os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
