"""A job submitted by a job: the successor of one whose walltime ended, or of a runtime that is gone.

What it is
    `submit_successor` submits the same script again, as the launcher did, under the next token of its role.
    The job that asks keeps the journal of it in a file of its own (`RunDirectory.submissions`): intent,
    then submitted. A repeated call after a kill in between finds the job by its token.

What it does not do
    It decides nothing: `job_training`, `job_runtime` and `peer` do.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from orchestrator.contract import Manifest, Role, RunDirectory, Submission, append_line
from orchestrator.frozen import asdict, replace
from orchestrator.schedulers import JobSpec, Scheduler, SchedulerError


def spec_record(spec: JobSpec) -> dict[str, Any]:
    """A job as the manifest keeps it: with nothing to wait for, for that is over when it is needed."""
    paths = {"script": str(spec.script), "run_dir": str(spec.run_dir)}
    return asdict(replace(spec, held=False, after=None)) | paths


def spec_of(manifest: Manifest, role: str) -> JobSpec:
    """The job that was submitted for a role. Raises SchedulerError when the manifest does not say."""
    record = manifest.jobs.get(role)
    if record is None:
        raise SchedulerError(f"run.json does not say how the {role} job was submitted; launch the run again")
    return JobSpec(**(record | {name: Path(record[name]) for name in ("script", "run_dir")}))


def renamed(spec: JobSpec, token: str) -> JobSpec:
    """The same job under another token, which its arguments say too."""
    args = [argument.replace(f"token={spec.token}", f"token={token}") for argument in spec.args]
    return replace(spec, token=token, args=args)


def submit_successor(run: RunDirectory, role: Role, by: Role, scheduler: Scheduler) -> str:
    """Submit the next job of `role`, in the name of the job of `by`; returns its id.

    Raises SchedulerError when there is none.
    """
    manifest = run.read_manifest()
    if manifest is None:
        raise SchedulerError(f"{run.manifest} cannot be read; nothing was submitted")
    known = [s for s in manifest.submissions if s["role"] == role and s.get("job_id")]
    number = 1 + max((int(s.get("number", 1)) for s in known), default=1)
    spec = renamed(spec_of(manifest, role), f"{run.run_id}.{role}.{number}")

    def note(state: str, job_id: str = "") -> None:
        entry = Submission(
            role=role, token=spec.token, state=state, job_id=job_id, scheduler=scheduler.name, number=number
        )
        append_line(run.submissions(by), json.dumps(asdict(entry)))

    note("intent")
    job_id = scheduler.find(spec.token) or scheduler.submit(spec)
    note("submitted", job_id)
    return job_id
