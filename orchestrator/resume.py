"""Goes on with a run that is over: new jobs, same directory, from the newest checkpoint.

What it is
    `prepare` decides and is without effects: may this run go on, with which configuration, by which jobs?
    `resume` does it: it keeps what the earlier life left (`RunDirectory.earlier`), takes an attempt of each
    role itself, which fences out whatever of the earlier life still writes, opens the run again, and submits.

How to use it
    prepared = prepare(run, scheduler, ["training.time_limit=8h"]); resume(prepared, scheduler)

What it does not do
    It changes no code: the snapshot of the launch runs again. A key that would make it another experiment
    is refused. Killed at any instant it leaves a run without a result, which can be resumed once more.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import json
import os
import secrets
import shutil
import socket
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator import checkpoints, resources, runs
from orchestrator.config import Entry, Resolved, dump, from_assignments, from_yaml, resolve
from orchestrator.contract import CompleteFlag, JobStatus, Manifest, Outcome, Role, RunDirectory
from orchestrator.durable import fsync_directory, publish_bytes, read_bytes
from orchestrator.errors import ConfigError, OrchestrateError
from orchestrator.identity import Process
from orchestrator.launch import absolute, check_files, masked, passed, secrets_of
from orchestrator.peer import runtime_health
from orchestrator.plan import Context, Plan, environment_file, make_plan
from orchestrator.schedulers import OVER, Scheduler
from orchestrator.schema import Config
from orchestrator.submit import spec_for, submit_all
from orchestrator.successor import spec_record

MAY_CHANGE = (
    *("run.name", "scheduler.*", "runtime.*", "training.*", "environment.*"),
    *("trainer.total_steps", "trainer.total_epochs", "trainer.save_every", "trainer.keep_checkpoints"),
    *("trainer.micro_batch_tokens", "trainer.threads", "trainer.mismatch_limit", "trainer.autoresume_after"),
    *("rollout.gpu_memory_utilization", "rollout.kv_cache_bytes", "rollout.max_parallel_episodes"),
    *("rollout.turn_timeout", "rollout.episode_timeout", "rollout.retries", "data.validation"),
)
"""What may change between two lives of a run: resources and lengths, not what is learned."""
MUST_STAY = ("scheduler.kind", "training.command")
_ENVIRONMENT = ("environment.*", "*.setup_commands", "*.python")


class CannotResume(OrchestrateError):
    """The run may not go on, or not so; the message says what to do. Nothing was changed."""


@dataclass(frozen=True)
class Prepared:
    """All of a resume, before anything is done."""

    run: RunDirectory
    manifest: Manifest
    resolved: Resolved
    plan: Plan
    context: Context
    changed: dict[str, tuple[object, object]]
    checkpoint: str
    command: list[str]

    @property
    def config(self) -> Config:
        return self.resolved.config

    @property
    def new_environment(self) -> bool:
        """Whether env.sh has to be written again; it may hold secrets of a file that is gone by now."""
        return any(fnmatch.fnmatch(key, pattern) for key in self.changed for pattern in _ENVIRONMENT)


# --- deciding ----------------------------------------------------------------------------------------


def prepare(
    run: RunDirectory,
    scheduler: Scheduler,
    assignments: Sequence[str] = (),
    from_scratch: bool = False,
    command: Sequence[str] = (),
) -> Prepared:
    """Raises CannotResume, ConfigError, PlanError, SchedulerError; nothing is changed."""
    manifest = runs.manifest_of(run)
    name = manifest.run_id
    if manifest.mode == "runtime-only":
        raise CannotResume(f"{name} was a server alone: `orchestrate launch --runtime-only` starts another")
    _refuse_live(run, scheduler)
    before, resolved = _configurations(run, manifest, assignments)
    changed = differences(before, resolved.config)
    if refused := [key for key in changed if not may_change(key)]:
        raise CannotResume(
            f"{', '.join(refused)} may not change within a run: what it learned would not be comparable\n"
            f"launch a new run instead, or change only: {', '.join(MAY_CHANGE)}"
        )
    checkpoint = checkpoints.newest(run)
    _refuse_pointless(run, manifest, resolved.config, changed, checkpoint, from_scratch)
    check_files(resolved.config, manifest.mode)
    context = _context(run, manifest)
    plan = make_plan(resolved.config, context)
    return Prepared(run, manifest, resolved, plan, context, changed, checkpoint, list(command))


def _refuse_live(run: RunDirectory, scheduler: Scheduler) -> None:
    """Two lives of one run must not overlap; what nobody can see may be alive."""
    look = runs.view(run, scheduler)
    live = [f"{job.role} {job.job_id} ({job.state})" for job in look.jobs if job.state not in OVER]
    mine = [own for own in scheduler.mine() if own.run_id == run.run_id]
    live += [
        f"{own.role} {own.info.job_id} ({own.info.state})" for own in mine if own.role not in " ".join(live)
    ]
    if live:
        raise CannotResume(
            f"jobs of {run.run_id} are not over, or cannot be seen: {', '.join(live)}\n"
            f"wait, or end them: orchestrate cancel {run.run_id}"
        )


def _configurations(
    run: RunDirectory, manifest: Manifest, assignments: Sequence[str]
) -> tuple[Config, Resolved]:
    """The frozen configuration, and the one to go on with, each value with its origin."""
    entries, problems = frozen(run)
    before = resolve(entries, problems, manifest.config_name).config
    new, wrong = split(from_assignments(assignments))
    resolved = resolve([*entries, *new], [*problems, *wrong], manifest.config_name)
    config = absolute(resolved.config, Path.cwd())
    return before, Resolved(config, resolved.entries, resolved.name)


def frozen(run: RunDirectory) -> tuple[list[Entry], list[str]]:
    """Every value of a run's configuration, with where it came from at the launch; and what is wrong with
    it, which a later version may find."""
    text = read_bytes(run.config).decode(errors="replace")
    entries, problems = split(from_yaml(text, "run", run.config.name))
    origins = _origins(run)
    usual = ("default", "default")
    found = [(entry, origins.get(entry.name, usual)) for entry in entries]
    return [dataclasses.replace(e, layer=layer, where=where) for e, (layer, where) in found], problems


def split(found: Iterable[Entry | str]) -> tuple[list[Entry], list[str]]:
    items = list(found)
    return [i for i in items if isinstance(i, Entry)], [i for i in items if isinstance(i, str)]


def _origins(run: RunDirectory) -> dict[str, tuple[str, str]]:
    with contextlib.suppress(ValueError, AttributeError, KeyError):
        data = json.loads(read_bytes(run.provenance))
        return {name: (origin["layer"], origin["where"]) for name, origin in data.items()}
    return {}


def differences(before: Config, after: Config) -> dict[str, tuple[object, object]]:
    """{key: (old, new)} of every key whose value differs."""
    return _differ(before.model_dump(mode="json"), after.model_dump(mode="json"), "")


def _differ(old: dict[str, object], new: dict[str, object], prefix: str) -> dict[str, tuple[object, object]]:
    found: dict[str, tuple[object, object]] = {}
    for name in {**old, **new}:
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found |= _differ(a, b, f"{prefix}{name}.")
        elif a != b:
            found[f"{prefix}{name}"] = (a, b)
    return found


def may_change(key: str) -> bool:
    return key not in MUST_STAY and any(fnmatch.fnmatch(key, pattern) for pattern in MAY_CHANGE)


def _refuse_pointless(
    run: RunDirectory,
    manifest: Manifest,
    config: Config,
    changed: dict[str, tuple[object, object]],
    checkpoint: str,
    from_scratch: bool,
) -> None:
    name = manifest.run_id
    if not checkpoint and not from_scratch:
        raise CannotResume(
            f"{name} has no checkpoint in {checkpoints.folder_of(run)}; --from-scratch starts it over, "
            f"in the same directory"
        )
    if checkpoint and config.trainer.resume == "never":
        raise CannotResume(
            f"{name} was launched with trainer.resume=never, so it would start over: launch a new run"
        )
    if manifest.mode == "runtime-url" and (problem := runtime_health(run, manifest.mode).problem):
        raise CannotResume(f"{name} needs its sandbox server, and {problem}; start it, or launch a new run")
    done, total = int(checkpoint.rpartition("-")[2] or 0), config.trainer.total_steps
    if total is not None and done >= total:
        raise CannotResume(
            f"{name} has done all of its {total} steps; give trainer.total_steps={2 * total}, or so"
        )
    flag = run.read(run.complete_flag, CompleteFlag)
    longer = {"trainer.total_steps", "trainer.total_epochs"} & changed.keys()
    if flag is not None and flag.outcome == Outcome.SUCCESS and not longer:
        raise CannotResume(
            f"{name} ended with success; to train longer give trainer.total_epochs or total_steps"
        )


def _context(run: RunDirectory, manifest: Manifest) -> Context:
    numbers = [int(entry.get("number", 1)) for entry in manifest.submissions]
    snapshot = run.code.is_dir()
    return Context(
        run_dir=run.root,
        code=run.code if snapshot else resources.data_root(),
        python=sys.executable,
        snapshot=snapshot,
        mode=manifest.mode,
        number=1 + max(numbers, default=0),
        environ=passed(),
    )


# --- doing -------------------------------------------------------------------------------------------


def resume(prepared: Prepared, scheduler: Scheduler) -> dict[str, str]:
    """Open the run again and submit its jobs; returns their ids.

    Raises CannotResume, LaunchError, OSError.
    """
    run, life = prepared.run, prepared.manifest.attempt
    with _alone(run, life):
        _keep(run, life)
        _say(prepared)
        fenced = {job.role: _fence(run, job.role) for job in prepared.plan.jobs}
        _reopen(prepared)
        _write(prepared, fenced)
        return submit_all(run, prepared.plan, scheduler)


@contextlib.contextmanager
def _alone(run: RunDirectory, life: int) -> Iterator[None]:
    """Two who resume at once would submit twice: a folder is taken, and its owner is named in it."""
    owner, me = run.earlier(life) / "owner.json", Process.of(os.getpid())
    run.history.mkdir(exist_ok=True)
    try:
        run.earlier(life).mkdir()
    except FileExistsError:
        with contextlib.suppress(ValueError, TypeError):
            who = Process(**json.loads(read_bytes(owner)))
            if who.alive() is not False:
                raise CannotResume(
                    f"{run.run_id} is being resumed by process {who.pid} on {who.host}; wait for it, "
                    f"or remove {owner} if it is dead"
                ) from None
    publish_bytes(owner, json.dumps(dataclasses.asdict(me)).encode())
    try:
        yield
    finally:
        owner.unlink(missing_ok=True)


def _keep(run: RunDirectory, life: int) -> None:
    """Copy what this life overwrites; a copy that is there already (from a resume that died) stays."""
    folder = run.earlier(life)
    roles = (Role.RUNTIME, Role.TRAINING)
    files = [run.config, run.provenance, run.result, run.complete_flag, *(run.script(role) for role in roles)]
    for path in files:
        target = folder / path.name
        if not target.exists() and read_bytes(path):
            shutil.copyfile(path, beside := folder / f".{path.name}")
            beside.chmod(path.stat().st_mode & 0o777)
            beside.replace(target)
    fsync_directory(folder)


def _say(prepared: Prepared) -> None:
    prepared.run.events_of_caller("resume").add(
        "resumed",
        checkpoint=prepared.checkpoint,
        changed=sorted(prepared.changed),
        number=prepared.context.number,
    )


def _fence(run: RunDirectory, role: str) -> int:
    """Take an attempt in the name of the next life. Whatever of the earlier one still lives sees that it is
    superseded, and its peer sees a job that is about to start again, not one that is over."""
    nonce = secrets.token_hex(16)
    number = run.take_attempt(role, nonce)
    status = JobStatus(
        run_id=run.run_id,
        role=role,
        attempt=number,
        job_id="",
        nonce=nonce,
        host=socket.gethostname(),
        pid=os.getpid(),
        phase="ended",
        outcome=Outcome.REQUEUED,
        reason="resumed",
    )
    run.publish(run.status(role), status)
    return number


def _reopen(prepared: Prepared) -> None:
    """Take the flags of the earlier life away, the one that ends everything last of all."""
    run = prepared.run
    own_server = any(job.role == Role.RUNTIME for job in prepared.plan.jobs)
    of_server = (run.ready_flag, run.runtime_url, run.runtime_api_key) if own_server else ()
    for path in (*of_server, run.checkpoint_request, run.result, run.complete_flag):
        publish_bytes(path, b"", 0o600)


def _write(prepared: Prepared, fenced: dict[str, int]) -> None:
    """Configuration, environment and scripts, then the manifest, which makes this the run's next life."""
    run, config, plan = prepared.run, prepared.config, prepared.plan
    publish_bytes(run.config, dump(config).encode(), 0o600)
    run.publish(run.provenance, json.dumps(prepared.resolved.provenance(), indent=1))
    if prepared.new_environment:
        text = environment_file(config, prepared.context, secrets_of(config))
        publish_bytes(run.env_file, text.encode(), 0o600)
    for job in plan.jobs:
        publish_bytes(run.script(job.role), job.script.encode(), 0o755)
    manifest = run.read(run.manifest, Manifest)
    if manifest is None:
        raise ConfigError([f"{run.manifest} cannot be read any more; the run was damaged from outside"])
    kept = {k: v for k, v in manifest.settings.items() if k.endswith("_command") and v}
    new = dataclasses.replace(
        manifest,
        attempt=manifest.attempt + 1,
        command=masked(prepared.command),
        jobs={job.role: spec_record(spec_for(run, job, None)) for job in plan.jobs},
        lives_before=fenced,
        settings=dataclasses.asdict(plan.settings) | kept,
    )
    run.publish(run.manifest, new)
