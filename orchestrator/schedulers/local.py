"""The local scheduler: jobs as processes of this machine, with Slurm's manners.

What it is
    `LocalScheduler(state_dir)` runs the same batch scripts as Slurm would: held and released, after
    another job, warned before the time limit, cancelled, requeued under the same id, logs appended.
    There is no daemon: each job has its own detached supervisor (`local_job`), so jobs outlive
    the launcher, and any process that knows the state directory can look after them.

How to use it
    scheduler = LocalScheduler(Path(".orchestrate_runs/.local")); job_id = scheduler.submit(spec)

What it does not do
    It counts no resources and starts everything at once. `spec.args` are resource words of another
    scheduler and are ignored. Ids are unique within one state directory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from orchestrator.durable import fsync_directory, read_bytes
from orchestrator.identity import Process
from orchestrator.processes import is_above
from orchestrator.records import Env
from orchestrator.schedulers import (
    OVER,
    JobInfo,
    JobSpec,
    JobState,
    OwnJob,
    RequeueRefused,
    SchedulerError,
)
from orchestrator.schedulers.local_files import JobFiles, JobRecord, LocalSpec, start_supervisor

_ACKNOWLEDGE_S, _START_S = 2.0, 30.0


class LocalScheduler:
    """Implements `orchestrator.schedulers.Scheduler`. All times in seconds; KillWait is Slurm's default."""

    name = "local"

    def __init__(self, state_dir: Path, *, kill_wait_s: float = 30.0, requeue_delay_s: float = 1.0) -> None:
        self.jobs = state_dir.absolute() / "jobs"
        self.kill_wait_s, self.requeue_delay_s = kill_wait_s, requeue_delay_s

    # --- submission ---

    def submit(self, spec: JobSpec) -> str:
        """Submit and return the job id; a token that was submitted before gives the job of then."""
        _check(spec)
        known = self.find(spec.token)
        files = self._files(known) if known else self._claim(spec)
        if known and not self._never_started(files):
            return known
        try:
            self._start(files)
        except (OSError, subprocess.SubprocessError) as error:
            detail = getattr(error, "stderr", "") or str(error)
            raise SchedulerError(f"the supervisor of job {files.job_id} did not start: {detail}") from error
        return files.job_id

    def _start(self, files: JobFiles) -> None:
        """Start the supervisor; from within a job through that job's own, which is not ended with it."""
        around = self._files(os.environ.get(Env.JOB_ID, "none"))
        record = around.record()
        if record is None or not is_above(int(record.supervisor.get("pid", 0))):
            return start_supervisor(files)
        around.post("start", files.job_id)
        deadline = time.monotonic() + _START_S
        while (now := files.record()) is None or now.reason == "Starting":
            if time.monotonic() > deadline:
                raise OSError(f"the supervisor of job {around.job_id} did not start it")
            time.sleep(0.01)

    def _never_started(self, files: JobFiles) -> bool:
        """Whether the process that submitted this job died before it had started the supervisor."""
        record = files.record()
        return record is None or (record.reason == "Starting" and record.alive() is False)

    def _claim(self, spec: JobSpec) -> JobFiles:
        """Make the job's folder under the next free id: a rename onto a taken one fails, atomically."""
        self.jobs.mkdir(mode=0o700, parents=True, exist_ok=True)
        beside = JobFiles(self.jobs / f".new-{uuid.uuid4().hex}")
        beside.create(LocalSpec.of(spec, self.kill_wait_s, self.requeue_delay_s), spec.script.read_bytes())
        me = dataclasses.asdict(Process.of(os.getpid()))
        state, number = JobState.HELD if spec.held else JobState.PENDING, max(self._numbers(), default=0)
        while True:
            number += 1
            record = JobRecord(
                job_id=str(number), state=state, raw="PENDING", reason="Starting", supervisor=me
            )
            beside.publish(record)
            try:
                beside.root.rename(self.jobs / str(number))
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            else:
                fsync_directory(self.jobs)
                return JobFiles(self.jobs / str(number))

    def _numbers(self) -> list[int]:
        return [int(p.name) for p in self.jobs.glob("[0-9]*") if p.name.isdigit()]

    def find(self, token: str) -> str | None:
        """The job of this token, the newest first."""
        needle = token.encode()
        for number in sorted(self._numbers(), reverse=True):
            files = self._files(str(number))
            if needle in read_bytes(files.spec_file) and files.spec().spec().token == token:
                return files.job_id
        return None

    # --- questions ---

    def query(self, job_ids: Sequence[str], *, fresh: bool = False) -> dict[str, JobInfo]:
        return {job_id: self._info(job_id) for job_id in job_ids}

    def _info(self, job_id: str) -> JobInfo:
        record = self._files(job_id).record() if job_id.isdigit() else None
        if record is None:
            return JobInfo(job_id, JobState.GONE, "no such job")
        host = str(record.supervisor.get("host", ""))
        state, reason = JobState(record.state), record.reason
        if not record.over:
            alive = record.alive()
            if alive is None:
                state, reason = JobState.UNKNOWN, f"the job belongs to {host}; ask there"
            elif not alive:
                return self._dead(job_id, host)
        return JobInfo(job_id, state, reason, record.exit_code, host, record.raw)

    def _dead(self, job_id: str, host: str) -> JobInfo:
        """No process is left that looks after the job: either it ended just now, or it was killed."""
        record = self._files(job_id).record()
        if record is not None and record.over:
            return self._info(job_id)
        return JobInfo(job_id, JobState.GONE, "its supervisor was killed", None, host)

    def mine(self) -> list[OwnJob]:
        infos = [self._info(str(number)) for number in sorted(self._numbers())]
        return [self._own(info) for info in infos if info.state not in OVER]

    def stale(self) -> list[OwnJob]:
        """Jobs that nobody looks after any more although their record says that they live."""
        infos = [self._info(str(number)) for number in sorted(self._numbers())]
        gone = [info for info in infos if info.state == JobState.GONE]
        return [self._own(info) for info in gone if self._files(info.job_id).record() is not None]

    def bury(self, job_id: str) -> None:
        """Write down the end of a stale job. Its supervisor, the only writer of the record, is dead."""
        record = self._files(job_id).record()
        if record is None or self._info(job_id).state != JobState.GONE:
            return
        reason, now = "its supervisor was killed", time.time()
        ended = dataclasses.replace(record, state=JobState.ENDED, raw="FAILED", reason=reason, ended_at=now)
        self._files(job_id).publish(ended)

    def _own(self, info: JobInfo) -> OwnJob:
        spec = self._files(info.job_id).spec().spec()
        return OwnJob(info, spec.run_dir.name, spec.role, spec.token, str(spec.run_dir))

    # --- requests ---

    def release(self, job_id: str) -> None:
        self._ask(job_id, "release", "release")

    def cancel(self, job_ids: Sequence[str]) -> None:
        """As with scancel, jobs that are over or unknown are no error."""
        for job_id in job_ids:
            with contextlib.suppress(SchedulerError):
                self._ask(job_id, "cancel", "cancel")

    def signal(self, job_id: str, name: str) -> None:
        if f"SIG{name.removeprefix('SIG')}" not in signal.Signals.__members__:
            raise SchedulerError(f"there is no signal {name}; use a name like USR1 or TERM")
        self._ask(job_id, "signal", "signal", name)

    def requeue(self, job_id: str) -> None:
        files = self._files(job_id)
        if job_id.isdigit() and files.root.is_dir() and not files.spec().spec().requeue:
            raise RequeueRefused(f"job {job_id} was submitted as one that must not be requeued")
        self._ask(job_id, "requeue", "requeue")

    def _ask(self, job_id: str, verb: str, what: str, argument: str = "") -> None:
        """Leave a request and wait, briefly, until the supervisor has taken it."""
        info = self._info(job_id)
        if info.state in OVER:
            why = info.reason or info.raw.lower()
            raise SchedulerError(f"cannot {what} job {job_id}: it is over ({why})")
        files = self._files(job_id)
        request = files.post(verb, argument)
        deadline = time.monotonic() + _ACKNOWLEDGE_S
        while request.exists() and time.monotonic() < deadline:
            time.sleep(0.002)

    def _files(self, job_id: str) -> JobFiles:
        return JobFiles(self.jobs / job_id)


def _check(spec: JobSpec) -> None:
    name, _, lead = spec.signal.partition("@")
    if f"SIG{name}" not in signal.Signals.__members__ or not lead.isdigit():
        raise SchedulerError(f"signal {spec.signal!r} must be NAME@SECONDS, like USR1@90")
    if spec.time_limit_s <= 0:
        raise SchedulerError(f"time limit {spec.time_limit_s} s must be above 0")
    if not spec.script.is_file():
        raise SchedulerError(f"there is no job script {spec.script}")
