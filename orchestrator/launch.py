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

import json
import os
import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator import resources, snapshot
from orchestrator.code_store import Store
from orchestrator.config import Resolved, dump
from orchestrator.contract import Manifest, Role, RunDirectory
from orchestrator.dotenv import parse_dotenv
from orchestrator.durable import host_name, write_new
from orchestrator.errors import ConfigError
from orchestrator.frozen import asdict, dataclass, field
from orchestrator.identity import Process
from orchestrator.plan import RESERVED, Context, Plan, environment_file, make_plan
from orchestrator.schedulers import Scheduler
from orchestrator.schema import Config
from orchestrator.submit import Journal, spec_for, submit_all
from orchestrator.successor import spec_record
from orchestrator.surroundings import capture, user_name

if TYPE_CHECKING:
    from orchestrator.attach import Attached

PASSED = (
    *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR"),
    *("LD_LIBRARY_PATH", "CUDA_HOME", "CUDA_VISIBLE_DEVICES", "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_OFFLINE"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "SLURM_CONF"),
)
"""Variables of the launching shell that jobs see. An allow-list: a foreign SLURM_* or SBATCH_* in the
environment has made whole clusters' jobs go wrong, silently. Everything else goes through
environment.variables or environment.env_file."""

PLACEHOLDER = "YYYYMMDD_HHMMSS_xxxxxx"
"""Name of the run directory in a dry run."""

_LOCAL_PATHS = (
    *("run.runs_dir", "environment.env_file", "data.train", "data.validation", "model.path"),
    *("trainer.checkpoint_dir", "trainer.rollout_dir", "evaluation.checkpoint"),
    *("runtime.state_dir", "runtime.image_store"),
)


def passed() -> dict[str, str]:
    """What a job gets of the launching shell's environment."""
    return {name: os.environ[name] for name in PASSED if name in os.environ}


@dataclass(frozen=True)
class Request:
    """What is to be launched. `runtime` is the server of a --runtime-url, already checked."""

    resolved: Resolved
    mode: str = "run"  # run | runtime-only | runtime-url
    runtime: Attached | None = None
    command: list[str] = field(default_factory=list)
    """What was typed; masked before it is written down."""

    @cached_property
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
        named |= {"data.validation": config.data.validation}
        if not config.evaluation.wanted:
            named |= {"data.train": config.data.train}
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
        environ=passed(),
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


def launch(request: Request, scheduler: Scheduler, asked: snapshot.Asked | None = None) -> Launched:
    """Create the run and submit its jobs. Raises ConfigError, PlanError, LaunchError.

    When preparing fails nothing is left; when submitting fails the jobs that were submitted are
    cancelled and the directory says so. `asked`: git about our checkout, when it was asked ahead.
    """
    preview(request)
    secrets = secrets_of(request.config)
    run = RunDirectory.create(request.runs_dir)
    code = _take_code(request, run, asked)
    try:
        if request.config.evaluation.wanted:
            _prepare_evaluation(request.config, run)
        plan = _write(request, run, secrets, from_checkout=code is not None)
        taken = code.result() if code else snapshot.Snapshot()
        if code and not taken.files:  # the runs are around the checkout: it is run from where it is
            plan = _write(request, run, secrets, from_checkout=False)
        journal = _complete(request, run, plan, taken)
    except BaseException:  # an interrupt too: a run that was not launched leaves nothing
        if code:
            code.join()
        import shutil  # not for a launch that goes well

        shutil.rmtree(run.root, ignore_errors=True)  # nobody has heard of it yet
        raise
    return Launched(run, plan, submit_all(run, plan, scheduler, journal), taken.left_out)


def _prepare_evaluation(config: Config, run: RunDirectory) -> None:
    """What others wait for is there from the start, empty; and so is the policy, whatever becomes of its
    checkpoint while the job is queued. Raises NoCheckpoint."""
    from orchestrator.checkpoints import keep_policy  # not for a launch that trains

    run.judged.mkdir()
    write_new(run.evaluation, b"")
    if config.evaluation.checkpoint:
        keep_policy(Path(config.evaluation.checkpoint), run.evaluated)


def _take_code(request: Request, run: RunDirectory, asked: snapshot.Asked | None) -> snapshot.Taking | None:
    """The snapshot on its way, while we write the rest; None where there is no checkout to take."""
    source = resources.checkout()
    if source is None:
        return None
    env_file = request.config.environment.env_file
    never = [request.runs_dir, *([Path(env_file)] if env_file else [])]
    return snapshot.Taking(source, run.code, never, asked, Store.of(request.runs_dir, source))


def _write(request: Request, run: RunDirectory, secrets: dict[str, str], from_checkout: bool) -> Plan:
    """Configuration, environment and scripts. Their names become durable with the manifest's."""
    context = _context(request, run.root, from_checkout)
    plan = make_plan(request.config, context)
    write_new(run.config, dump(request.config).encode(), 0o600)
    write_new(run.provenance, _lines(request.resolved.provenance()).encode())
    write_new(run.env_file, environment_file(request.config, context, secrets).encode(), 0o600)
    for job in plan.jobs:
        write_new(run.script(job.role), job.script.encode(), 0o755)
    return plan


def _lines(about: dict[str, dict[str, str]]) -> str:
    """As JSON, a line for each."""
    return "{\n" + ",\n".join(f" {json.dumps(n)}: {json.dumps(v)}" for n, v in about.items()) + "\n}\n"


def _complete(request: Request, run: RunDirectory, plan: Plan, taken: snapshot.Snapshot) -> Journal:
    """The rest but the submissions; the manifest goes last, for it makes the directory a run. Whoever finds
    a run finds the intent to submit its first job."""
    if taken.patch:
        write_new(run.patch, taken.patch.encode(errors="surrogateescape"), 0o600)
    if request.runtime is not None:
        from orchestrator.attach import publish_runtime

        publish_runtime(run, request.runtime)
    events = run.events_of(Role.LAUNCHER)
    events.add("created", mode=plan.mode, files=taken.files, left_out=taken.left_out)
    journal = Journal(run, _manifest(request, run, plan, taken))
    journal.intend(plan.jobs[0], plan.scheduler)
    return journal


def _manifest(request: Request, run: RunDirectory, plan: Plan, taken: snapshot.Snapshot) -> Manifest:
    version, environment = capture()
    return Manifest(
        run_id=run.run_id,
        scheduler=plan.scheduler,
        scheduler_args={"runs_dir": str(request.runs_dir)},
        user=user_name(),
        host=host_name(),
        command=masked(request.command),
        config_name=request.resolved.name,
        version=version,
        commit=taken.commit,
        dirty=taken.dirty,
        mode=plan.mode,
        environment=environment,
        jobs={job.role: spec_record(spec_for(run, job, None)) for job in plan.jobs},
        settings=asdict(plan.settings),
        launcher=asdict(Process.of(os.getpid())),
    )


def masked(command: Sequence[str]) -> list[str]:
    """The command line without the values of variables, which may be secrets."""
    hidden = "environment.variables."
    return [a.partition("=")[0] + "=***" if a.startswith(hidden) else a for a in command]
