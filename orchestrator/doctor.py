"""Looks at a machine, a site and, with two probe jobs, at its compute nodes, before a run needs them.

What it is
    `login` checks this machine and the site against a configuration. `Probe` submits one tiny job to the
    runtime's partition and one to the training's, waits for what they report, and cancels them.

How to use it
    groups = login(config); groups |= Probe(config, scheduler).run(timeout_s=300)

What it does not do
    It changes nothing on the machine; the folder of a probe is removed. It prints nothing.
"""

from __future__ import annotations

import contextlib
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator import checks_files, checks_node, checks_site
from orchestrator.checks import Check, fail, ok, warn
from orchestrator.contract import Role, publish_bytes
from orchestrator.launch import passed
from orchestrator.plan import Context, PlannedJob, make_plan
from orchestrator.probe import Folder
from orchestrator.schedulers import OVER, QUEUED, JobInfo, JobSpec, Scheduler, SchedulerError
from orchestrator.schedulers.site import read_site
from orchestrator.schedulers.slurm_commands import LocalCommands
from orchestrator.schema import Config
from orchestrator.slurm_reasons import explain

Groups = dict[str, list[Check]]
ROLES = (Role.RUNTIME.value, Role.TRAINING.value)
_PACKAGE = Path(__file__).absolute().parent
_SLOW_LAG_S, _BAD_LAG_S, _SKEW_S = 5.0, 60.0, 5.0


def login(config: Config) -> Groups:
    """Checks of this machine. A cluster's login node need not run containers, so Podman is not looked for
    there; where jobs are local it is."""
    local = config.scheduler.kind == "local"
    groups: Groups = {}
    if not local:
        groups["site"] = list(checks_site.site(config, read_site(LocalCommands())))
    role = "runtime" if local else "login"
    alone = "one machine needs no shared one" if local else ""
    node = [check for check in checks_node.node(role) if local or check.name in ("python", "nofile", "nproc")]
    groups["this machine"] = node
    groups["runs directory"] = list(checks_files.directory(Path(config.run.runs_dir), alone))
    return groups


# --- probe jobs --------------------------------------------------------------------------------------


def small(config: Config) -> Config:
    """The same partitions, accounts and set-up, with as little as a job can ask for."""
    config = config.model_copy(deep=True)
    for section in (config.runtime, config.training):
        section.nodes, section.cpus, section.memory, section.time_limit = 1, 1, 1024, 600
    config.runtime.ready_timeout, config.scheduler.signal = 60, "USR1@30"
    config.training.gpus_per_node = min(1, config.training.gpus_per_node)
    config.rollout.tensor_parallel_size = config.trainer.sequence_parallel_size = 1
    config.runtime.sandbox.memory, config.runtime.sandbox.cpus = 256, 1.0
    config.scheduler.on_timeout, config.scheduler.start_policy = "stop", "after"
    config.run.name = "doctor"
    return config


@dataclass
class Probe:
    """Two probe jobs: submitted, watched and removed by `run`."""

    config: Config
    scheduler: Scheduler
    say: Callable[[str], object] = bool

    def run(self, timeout_s: float) -> Groups:
        """What the nodes are like. Bounded, and every job is cancelled at the end.

        Raises OSError, SchedulerError.
        """
        runs_dir = Path(self.config.run.runs_dir).absolute()
        root = runs_dir / ".doctor" / f"{time.strftime('%Y%m%d_%H%M%S')}_{time.time_ns() % 10**6:06d}"
        root.mkdir(parents=True, mode=0o700)
        folder, jobs = Folder(root), dict[str, str]()
        try:
            shutil.copytree(
                _PACKAGE, folder.code / "orchestrator", ignore=shutil.ignore_patterns("__pycache__")
            )
            self._submit(folder, jobs)
            return dict(self._outcome(folder, jobs, timeout_s))
        finally:
            self._end(jobs)
            shutil.rmtree(root, ignore_errors=True)
            with contextlib.suppress(OSError):  # another doctor is at work
                root.parent.rmdir()

    def _submit(self, folder: Folder, jobs: dict[str, str]) -> None:
        context = Context(run_dir=folder.root, code=folder.code, python=sys.executable, environ=passed())
        plan = make_plan(small(self.config), context)
        for role in ROLES:
            self.say(f"submitting the probe of the {role} partition")
            jobs[role] = self.scheduler.submit(self._spec(plan.job(role), folder))

    def _spec(self, job: PlannedJob, folder: Folder) -> JobSpec:
        section = self.config.runtime if job.role == Role.RUNTIME else self.config.training
        python = shlex.quote(section.python or sys.executable)
        lines = [
            "#!/bin/bash",
            *section.setup_commands,
            f"export PYTHONPATH={shlex.quote(str(folder.code))} PYTHONDONTWRITEBYTECODE=1",
            f"exec {python} -P -m orchestrator.probe {job.role} {shlex.quote(str(folder.root))}",
        ]
        publish_bytes(folder.script(job.role), ("\n".join(lines) + "\n").encode(), 0o700)
        out, err = (str(folder.log(job.role, stream)) for stream in ("out", "err"))
        replaced = {job.out: out, job.err: err}
        return JobSpec(
            role=job.role,
            name=job.name,
            script=folder.script(job.role),
            run_dir=folder.root,
            out=out,
            err=err,
            env=job.env,
            time_limit_s=job.resources.time_limit,
            signal=job.signal,
            token=job.token,
            args=[_replaced(argument, replaced) for argument in job.args],
            requeue=False,
        )

    def _outcome(
        self, folder: Folder, jobs: dict[str, str], timeout_s: float
    ) -> Iterator[tuple[str, list[Check]]]:
        infos = self._wait(folder, jobs, timeout_s)
        reports = {role: folder.read(folder.report(role)) for role in ROLES}
        for role in ROLES:
            found = reports[role]
            if found is None:
                yield f"{role} node", [_no_report(role, infos.get(role), folder, timeout_s)]
            else:
                host = f"{role} node ({found.get('host')})"
                yield host, [*_same_python(found), *(Check.of(check) for check in found["checks"])]
        if (trained := reports[Role.TRAINING]) is not None:
            yield "between them", list(between(trained["between"]))

    def _wait(self, folder: Folder, jobs: dict[str, str], timeout_s: float) -> dict[str, JobInfo]:
        """Until both have reported, or both are over, or the time is up; the last word of the scheduler."""
        deadline = time.monotonic() + timeout_s
        pause, told = 0.1, ""
        while True:
            infos = self.scheduler.query(list(jobs.values()))
            by_role = {role: infos[job_id] for role, job_id in jobs.items()}
            missing = [role for role in ROLES if folder.read(folder.report(role)) is None]
            over = all(info.state in OVER for info in by_role.values())
            if not missing or over or time.monotonic() >= deadline:
                return by_role
            now = ", ".join(f"{role} {info.state}" for role, info in by_role.items())
            if now != told:
                self.say(f"waiting for {' and '.join(missing)}: {now}")
                told = now
            time.sleep(pause)
            pause = min(pause * 1.5, 2.0 if self.scheduler.name == "slurm" else 0.2)

    def _end(self, jobs: dict[str, str]) -> None:
        """Cancel, and wait a little: the folder is removed under a job that still writes otherwise."""
        with contextlib.suppress(SchedulerError):
            self.scheduler.cancel(list(jobs.values()))
            deadline = time.monotonic() + 15
            while time.monotonic() < deadline:
                states = {info.state for info in self.scheduler.query(list(jobs.values())).values()}
                if states <= set(OVER):
                    return
                time.sleep(0.1)


def _same_python(found: dict[str, Any]) -> list[Check]:
    here, there = platform.python_version(), str(found.get("python"))
    if here.split(".")[:2] == there.split(".")[:2]:
        return []
    return [warn("same python", f"{there}, but {here} launches", "use one environment for all")]


def _replaced(argument: str, replaced: dict[str, str]) -> str:
    for old, new in replaced.items():
        argument = argument.replace(old, new)
    return argument


def _no_report(role: str, info: JobInfo | None, folder: Folder, timeout_s: float) -> Check:
    """Why a probe said nothing."""
    if info is None:
        return fail("probe", "it was not submitted")
    if info.state in QUEUED:
        meaning = explain(info.reason)
        remedy = "give it longer with --timeout" if meaning.severity == "note" else f"see {role}.partition"
        return warn("probe", f"did not start within {timeout_s:g} s ({info.reason}): {meaning.text}", remedy)
    log = folder.log(role, "err")
    said = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    last = f": {said[-1]}" if said else f" ({info.reason or info.raw or info.state})"
    remedy = f"the node must see {folder.code.parent.parent.parent} and {role}.python (now {sys.executable})"
    return fail("probe", f"it started and reported nothing{last}", remedy)


def between(found: dict[str, Any]) -> Iterator[Check]:
    """What was measured between the two nodes, judged."""
    if not found.get("port"):
        remedy = "a firewall between the partitions, or a name that leads nowhere: see runtime.advertise_host"
        yield fail(
            "port", f"the training node does not reach the runtime node: {found.get('problem')}", remedy
        )
        return
    yield ok("port", f"{found['port']} is reachable, {1000 * found['trip_s']:.1f} ms there and back")
    skew = float(found["skew_s"])
    remedy = "nothing here depends on clocks, but logs will look out of order: ask for NTP"
    text = f"{skew:+.3f} s apart"
    yield ok("clocks", text) if abs(skew) < _SKEW_S else warn("clocks", text, remedy)
    for kind, lag in found["lag_s"].items():
        yield _lag(kind, lag)


def _lag(kind: str, lag: float | None) -> Check:
    name = f"{kind} file"
    if lag is None or lag > _BAD_LAG_S:
        text = "was not seen in time" if lag is None else f"was seen after {lag:.1f} s"
        return fail(name, text, "is run.runs_dir really shared between these nodes? Check its mount options")
    if lag > _SLOW_LAG_S:
        return warn(
            name, f"was seen after {lag:.1f} s", "attribute caching (acdirmax, lookupcache) is long there"
        )
    return ok(name, f"seen after {1000 * lag:.0f} ms")
