"""The submissions of a planned run: all of its jobs or none, with a journal that tells the truth.

What it is
    `submit_all` gives the jobs of a plan to the scheduler, one after the other. An entry in the manifest
    comes before and after each submission, durably, so that a launcher that is killed at any instant
    leaves a directory from which every job can be found.

How to use it
    jobs = submit_all(run, plan, open_scheduler("slurm", runs_dir))   # {"training": "17", "runtime": "18"}

What it does not do
    It writes no script and no configuration: the run directory is complete before.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from threading import Thread

from orchestrator.contract import Manifest, Role, RunDirectory, Submission, WaitTimeout, wait_for
from orchestrator.errors import LaunchError
from orchestrator.frozen import asdict, replace
from orchestrator.plan import Plan, PlannedJob
from orchestrator.schedulers import (
    OVER,
    JobInfo,
    JobSpec,
    JobState,
    Scheduler,
    SchedulerError,
    SubmissionUnknown,
)

_WITHDRAWN_S = 20.0


class Journal:
    """The submissions in the manifest: an entry is added for each change, none is ever taken away.

    An entry that the next one follows at once may be kept and published with it.
    """

    def __init__(self, run: RunDirectory, manifest: Manifest | None = None) -> None:
        """`manifest` is new: the first entry that is published publishes it."""
        self.run = run
        self.events = run.events_of(Role.LAUNCHER)
        manifest = manifest or run.read(run.manifest, Manifest)
        assert manifest is not None  # this process wrote it and is its only writer
        self._manifest, self._kept = manifest, False

    def add(self, job: PlannedJob, state: str, job_id: str = "", scheduler: str = "") -> None:
        self.keep(job, state, job_id, scheduler)
        self.publish()

    def intend(self, job: PlannedJob, scheduler: str) -> None:
        """Durably say that this job is about to be submitted; once is enough."""
        last = self._manifest.submissions[-1:]
        if [(entry["token"], entry["state"]) for entry in last] != [(job.token, "intent")]:
            self.add(job, "intent", scheduler=scheduler)

    def publish(self) -> None:
        """Make durable what was kept."""
        if self._kept:
            self.run.publish(self.run.manifest, self._manifest)
            self._kept = False

    def keep(self, job: PlannedJob, state: str, job_id: str = "", scheduler: str = "") -> None:
        entry = Submission(
            role=job.role,
            token=job.token,
            state=state,
            job_id=job_id,
            scheduler=scheduler,
            number=job.number,
            at=time.time(),
        )
        submissions = [*self._manifest.submissions, asdict(entry)]
        self._manifest, self._kept = replace(self._manifest, submissions=submissions), True
        self.events.add(state, job=job.role, job_id=job_id)


def submit_all(
    run: RunDirectory, plan: Plan, scheduler: Scheduler, journal: Journal | None = None
) -> dict[str, str]:
    """Submit the jobs of a plan, all or none, with a journal. Raises LaunchError."""
    journal = journal or Journal(run)
    jobs: dict[str, str] = {}
    try:
        for planned in plan.jobs:
            after = jobs.get(planned.after) if planned.after else None
            jobs[planned.role] = _submit(run, planned, after, scheduler, journal)
        known = _Known(scheduler, list(jobs.values()))  # it answers while the disk writes
        journal.publish()
    except LaunchError as error:
        left = _withdraw(plan, jobs, scheduler, journal)
        raise LaunchError(f"{error}\n{left}") from error
    except BaseException:  # Ctrl-C too: half a run must not stay with the scheduler
        _withdraw(plan, jobs, scheduler, journal)
        raise
    _confirm(plan, jobs, known.answer(), journal, scheduler.name)
    return jobs


def _withdraw(plan: Plan, jobs: dict[str, str], scheduler: Scheduler, journal: Journal) -> str:
    """Cancel what was submitted, also the job whose id was on its way when we were interrupted, and
    see it end. Returns what came of it, for a person."""
    ids: list[str] = []
    with contextlib.suppress(OSError):  # a full disk is no reason to leave jobs behind
        journal.publish()
    try:
        found = [jobs.get(job.role) or scheduler.find(job.token) for job in plan.jobs]
        if ids := [job_id for job_id in found if job_id]:
            scheduler.cancel(ids)
        wait_for(lambda: _all_over(ids, scheduler), "the end of the jobs", _WITHDRAWN_S, longest_s=1.0)
    except (SchedulerError, WaitTimeout) as error:
        journal.events.add("withdrawn", jobs=ids, problem=str(error))
        return (
            f"the jobs of this run ({', '.join(ids) or 'none is known'}) could not be seen to end: {error}\n"
            f"`orchestrate status {plan.run_id}` shows what is left, and `orchestrate cancel` ends it"
        )
    journal.events.add("withdrawn", jobs=ids)
    return f"cancelled, and over: {', '.join(ids)}" if ids else "nothing of the run is with the scheduler"


def _all_over(ids: Sequence[str], scheduler: Scheduler) -> bool | None:
    infos = scheduler.query(ids, fresh=True).values() if ids else ()
    return all(info.state in OVER for info in infos) or None


def _submit(
    run: RunDirectory, job: PlannedJob, after: str | None, scheduler: Scheduler, journal: Journal
) -> str:
    journal.intend(job, scheduler.name)
    try:
        job_id = _ask_to_submit(scheduler, spec_for(run, job, after))
    except SubmissionUnknown as error:  # the journal stays at the intent: readers look for the token
        raise LaunchError(f"whether the {job.role} job was submitted is not known: {error}") from error
    except SchedulerError as error:
        journal.add(job, "failed", scheduler=scheduler.name)
        raise LaunchError(
            f"the {job.role} job was not submitted: {error}\n"
            f"what was to be submitted is {run.script(job.role)}"
        ) from error
    journal.keep(job, "submitted", job_id, scheduler.name)  # durable with the next intent
    return job_id


def _ask_to_submit(scheduler: Scheduler, spec: JobSpec) -> str:
    """Submit; when that failed, look whether the job exists before believing that it does not."""
    try:
        return scheduler.submit(spec)
    except SubmissionUnknown:  # it was looked for, for long
        raise
    except SchedulerError:
        found = scheduler.find(spec.token)
        if found is None:
            raise
        return found


def spec_for(run: RunDirectory, job: PlannedJob, after: str | None) -> JobSpec:
    return JobSpec(
        role=job.role,
        name=job.name,
        script=run.script(job.role),
        run_dir=run.root,
        out=job.out,
        err=job.err,
        env=job.env,
        time_limit_s=job.resources.time_limit,
        signal=job.signal,
        token=job.token,
        args=job.args,
        held=job.held,
        after=after,
        requeue=job.requeue,
    )


class _Known(Thread):
    """One question, whether the scheduler knows the jobs, on its way; silence spoils nothing."""

    def __init__(self, scheduler: Scheduler, job_ids: Sequence[str]) -> None:
        super().__init__(name="confirm", daemon=True)  # an interrupt need not wait for it
        self._scheduler, self._job_ids = scheduler, job_ids
        self._found: dict[str, JobInfo] = {}
        self.start()

    def run(self) -> None:
        with contextlib.suppress(SchedulerError):
            self._found = self._scheduler.query(self._job_ids)

    def answer(self) -> dict[str, JobInfo]:
        self.join()
        return self._found


def _confirm(
    plan: Plan, jobs: dict[str, str], known: dict[str, JobInfo], journal: Journal, scheduler: str
) -> None:
    for job in plan.jobs:
        job_id = jobs[job.role]
        info = known.get(job_id)
        if info is not None and info.state not in (JobState.UNKNOWN, JobState.GONE):
            journal.keep(job, "confirmed", job_id, scheduler)
    journal.publish()
