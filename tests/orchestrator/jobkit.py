"""Real jobs for tests: scripts for the local scheduler, and whole runs with a small server and trainer.

What it is
    `Bench` makes job scripts and submits them; `Pair` is a run of two jobs, with the project's own stubs,
    a stand-in for the sandbox server (`stand_ins`) and any command as the trainer. `python_with` is for
    runs that name no commands.

What it does not do
    Nothing is replaced: scheduler, stubs, wrapper, signals and HTTP are the real ones.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from orchestrator.contract import (
    CompleteFlag,
    Env,
    JobStatus,
    Manifest,
    Result,
    Role,
    RunDirectory,
    Settings,
    Submission,
    wait_for,
)
from orchestrator.identity import Process
from orchestrator.processes import descendants, labelled
from orchestrator.schedulers import OVER, JobInfo, JobSpec, JobState
from orchestrator.schedulers.local import LocalScheduler
from orchestrator.schedulers.local_files import JobFiles, JobRecord
from orchestrator.successor import spec_record

REPOSITORY = Path(__file__).parents[2]
STAND_INS = Path(__file__).with_name("stand_ins")
SERVER = STAND_INS / "runtime_server" / "__main__.py"


def until(check: Callable[[], Any], what: str, timeout_s: float = 10.0) -> Any:
    return wait_for(lambda: check() or None, what, timeout_s, first_s=0.01, longest_s=0.05)


class Bench:
    """A local scheduler in a directory of its own."""

    def __init__(self, root: Path, **options: float) -> None:
        self.root = root
        options = {"kill_wait_s": 1.0, "requeue_delay_s": 0.05} | options
        self.scheduler = LocalScheduler(root / ".local", **options)
        self.submitted: list[str] = []

    def submit(self, text: str, **changes: Any) -> str:
        """Submit a bash script; its logs are `NAME.JOBID.out` and `.err`."""
        name = changes.pop("name", "job")
        path = self.root / f"{name}-{uuid.uuid4().hex[:6]}.sbatch"
        path.write_text("#!/bin/bash\n" + text)
        spec = JobSpec(
            role="runtime",
            name=name,
            script=path,
            run_dir=self.root,
            out=str(self.root / f"{name}.%j.out"),
            err=str(self.root / f"{name}.%j.err"),
            env={"PATH": "/usr/bin:/bin", "BENCH": str(self.root)},
            time_limit_s=60,
            signal="USR1@5",
            token=uuid.uuid4().hex,
            args=["--partition=none"],
        )
        return self.submit_spec(dataclasses.replace(spec, **changes))

    def submit_spec(self, spec: JobSpec) -> str:
        job_id = self.scheduler.submit(spec)
        self.submitted.append(job_id)
        return job_id

    def info(self, job_id: str) -> JobInfo:
        return self.scheduler.query([job_id])[job_id]

    def record(self, job_id: str) -> JobRecord:
        record = JobFiles(self.scheduler.jobs / job_id).record()
        assert record is not None
        return record

    def until(self, job_id: str, *states: JobState, timeout_s: float = 10.0) -> JobInfo:
        until(
            lambda: self.info(job_id).state in states,
            f"job {job_id} to be {states}; {self.info(job_id)}",
            timeout_s,
        )
        return self.info(job_id)

    def ended(self, job_id: str, timeout_s: float = 10.0) -> JobInfo:
        return self.until(job_id, *OVER, timeout_s=timeout_s)

    def out(self, job_id: str, name: str = "job") -> str:
        path = self.root / f"{name}.{job_id}.out"
        return path.read_text() if path.exists() else ""

    def said(self, job_id: str, text: str) -> None:
        until(lambda: text in self.out(job_id), f"{text!r} in the log of job {job_id}")

    def processes(self) -> list[int]:
        """Every live process of every job here: who looks after a job, and what carries our label."""
        pids = set(labelled("BENCH", str(self.root)))
        for keeper in self.keepers():
            pids |= {keeper, *descendants(keeper)}
        return sorted(pids)

    def keepers(self) -> list[int]:
        """Supervisors and keepers that live."""
        records = [self.record(job_id) for job_id in self.submitted]
        found = [Process(**who) for r in records for who in (r.supervisor, r.keeper) if who]
        return [process.pid for process in found if process.alive()]

    def nothing_left(self, timeout_s: float = 8.0) -> None:
        # reading the environment of every process is dear: not before nobody looks after a job any more
        wait_for(
            lambda: not (self.keepers() or self.processes()) or None,
            "the end of every process",
            timeout_s,
            longest_s=0.2,
        )

    def clean(self) -> None:
        self.scheduler.cancel(self.submitted)
        self.nothing_left(15)


class Pair(Bench):
    """A run: manifest, `env.sh`, scripts; jobs are submitted by `launch`, as the launcher does."""

    def __init__(self, root: Path, *, trainer: list[str], mode: str = "run", **settings: Any) -> None:
        super().__init__(root, kill_wait_s=4.0)
        self.run = RunDirectory.create(root)
        self.held = settings.get("start_policy", "release-on-ready") == "release-on-ready"
        server = settings.pop("server", [])
        defaults = Settings(
            signal_lead=0.5,
            ready_timeout=8,
            peer_grace=10,
            stop_timeout=2,
            heartbeat_every=0.2,
            query_every=0.1,
        )
        commands = {"runtime_command": [sys.executable, str(SERVER), *server], "training_command": trainer}
        chosen = dataclasses.replace(defaults, **{"look_every": 0.05, **commands, **settings})
        environment = {"PYTHONPATH": str(REPOSITORY), "ORCHESTRATE_PYTHON": sys.executable}
        lines = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
        self.run.env_file.write_text("\n".join(lines) + "\n")
        self.manifest = Manifest(
            run_id=self.run.run_id,
            scheduler="local",
            scheduler_args={"runs_dir": str(root)},
            mode=mode,
            settings=dataclasses.asdict(chosen),
        )
        self.run.publish(self.run.manifest, self.manifest)
        self.ids: dict[str, str] = {}

    def spec(self, role: Role, **changes: Any) -> JobSpec:
        script = self.run.script(role)
        script.write_text(f"#!/bin/bash\nexec bash {REPOSITORY}/jobs/{role}.sh {self.run.root}\n")
        spec = JobSpec(
            role=role,
            name=role,
            script=script,
            run_dir=self.run.root,
            out=str(self.run.out(role, "%j")),
            err=str(self.run.err(role, "%j")),
            env={
                "PATH": "/usr/bin:/bin",
                "BENCH": str(self.root),
                Env.RUN_DIR.value: str(self.run.root),
            },
            time_limit_s=60,
            signal="USR1@30",
            token=f"{self.run.run_id}.{role}",
            args=[],
        )
        return dataclasses.replace(spec, **changes)

    def start(self, role: Role, **changes: Any) -> str:
        spec = self.spec(role, **changes)
        jobs = self.manifest.jobs | {role.value: spec_record(spec)}
        self.manifest = dataclasses.replace(self.manifest, jobs=jobs)
        self.run.publish(self.run.manifest, self.manifest)
        job_id = self.submit_spec(spec)
        self.ids[role] = job_id
        entry = Submission(role=role, token="t", state="submitted", job_id=job_id, scheduler="local")
        entries = [*self.manifest.submissions, dataclasses.asdict(entry)]
        self.manifest = dataclasses.replace(self.manifest, submissions=entries)
        self.run.publish(self.run.manifest, self.manifest)
        return job_id

    def events_of(self, what: str) -> list[dict[str, Any]]:
        """What the events of this name say."""
        return [event.data for event in self.run.timeline() if event.what == what]

    def launch(self, **training: Any) -> None:
        """Submit both, in the launcher's order: whoever is named by the other goes first."""
        if self.held:
            self.start(Role.TRAINING, held=True, **training)
            self.start(Role.RUNTIME)
        else:
            self.start(Role.RUNTIME)
            self.start(Role.TRAINING, after=self.ids[Role.RUNTIME], **training)

    def clean(self) -> None:
        self.adopt()
        super().clean()

    # --- what the run says ---

    def status(self, role: Role) -> JobStatus | None:
        return self.run.read(self.run.status(role), JobStatus)

    def phase(self, role: Role, phase: str, timeout_s: float = 10.0) -> JobStatus:
        def there() -> JobStatus | None:
            status = self.status(role)
            return status if status is not None and status.phase == phase else None

        found: JobStatus = until(there, f"{role} to be {phase}, now {self.status(role)}", timeout_s)
        return found

    def result(self) -> Result | None:
        return self.run.read(self.run.result, Result)

    def complete(self) -> CompleteFlag | None:
        return self.run.read(self.run.complete_flag, CompleteFlag)

    def all_over(self, timeout_s: float = 12.0) -> None:
        """Every job is over and nothing of the run lives."""
        self.until_complete(timeout_s)
        self.adopt()
        for job_id in self.ids.values():
            self.ended(job_id, timeout_s)
        self.nothing_left()

    def until_complete(self, timeout_s: float) -> None:
        """The run has a result, or every job that it ever had is over."""
        until(lambda: self.complete() or self.adopt() or self.idle(), "the end of the run", timeout_s)

    def idle(self) -> bool:
        return all(self.info(job_id).state in OVER for job_id in self.submitted)

    def adopt(self) -> None:
        """Look after the jobs, too, that jobs of the run have submitted."""
        manifest = self.run.read_manifest()
        assert manifest is not None
        for role in (Role.RUNTIME, Role.TRAINING):
            if job_id := manifest.job_id(role):
                self.ids[role] = job_id
                self.submitted += [job_id] if job_id not in self.submitted else []

    def logs(self) -> str:
        files = [*self.run.root.glob("*.out"), *self.run.root.glob("*.err")]
        return "\n".join(f"--- {p.name}\n{p.read_text()}" for p in files)

    def pid_of(self, part: str) -> int:
        """Pid of a part of a running job: supervisor, keeper, stub, wrapper or command, of a role."""
        role_name, _, what = part.partition(" ")
        record = self.record(self.ids[role_name])
        stub = until(lambda: self.record(self.ids[role_name]).script_pid, "the stub's pid")
        if what == "stub":
            return int(stub)
        if what in ("supervisor", "keeper"):
            return int(getattr(record, what)["pid"])
        wrapper = until(lambda: children(stub), "a wrapper")[0]
        return wrapper if what == "wrapper" else int(until(lambda: children(wrapper), "a command")[0])


def children(pid: int) -> list[int]:
    direct = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(word) for word in direct]


# --- trainers and cases -----------------------------------------------------------------------------

TRAIN = """
import json, os, pathlib, signal, subprocess, sys, time
run = pathlib.Path(os.environ["ORCHESTRATE_RUN_DIR"])
def metrics(reason="", **numbers):
    (run / "training" / "summary.json").write_text(json.dumps({"metrics": numbers, "reason": reason}))
def up():
    subprocess.run(["setsid", "--fork", "sleep", "1000"])
    (run / "training" / "up").write_text(str(os.getpid()))
"""
HANG = "up()\ntime.sleep(1000)"


def program(body: str) -> list[str]:
    return [sys.executable, "-c", TRAIN + body]


def python_with(folder: Path, trainer: str) -> Path:
    """A Python that finds the stand-in server and this trainer before the real ones."""
    package = folder / "small" / "trainer"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(trainer)
    script = folder / "python"
    paths = f"{folder}/small:{STAND_INS}"
    script.write_text(f'#!/bin/bash\nPYTHONPATH={paths}:$PYTHONPATH exec {sys.executable} "$@"\n')
    script.chmod(0o755)
    return script


Case = TypeVar("Case")


def each(cases: Iterable[Case], check: Callable[[Case], None]) -> None:
    """Check all cases side by side, each with a run of its own: they mostly wait."""
    with ThreadPoolExecutor(5) as pool:
        futures = [(case, pool.submit(check, case)) for case in cases]
    for case, future in futures:
        try:
            future.result()
        except BaseException as error:  # raised again, with the case named
            error.add_note(f"the case: {case}")
            raise


def training_up(pair: Pair) -> None:
    up = pair.run.training / "up"
    until(lambda: up.exists() and up.read_text(), f"the trainer\n{pair.logs()}")


def events(pair: Pair) -> list[str]:
    return [event.what for event in pair.run.timeline()]
