"""A Slurm scheduler over the test cluster, and whole launches in there as its ordinary user.

What it is
    `Over` carries Slurm's commands into the cluster: the transport seam of the scheduler, used. `Desk` makes
    batch scripts and submits them; `Launches` runs `orchestrate` on the login host.
"""

from __future__ import annotations

import json
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster import Cluster
from jobkit import STAND_INS

from orchestrator.contract import RunDirectory
from orchestrator.schedulers import OVER, JobInfo, JobSpec, JobState
from orchestrator.schedulers.slurm import SlurmScheduler
from orchestrator.schedulers.slurm_commands import TIMED_OUT, Answer


class Over:
    """`Commands` by way of the cluster's login host. `lose` makes the answer of a command get lost."""

    def __init__(self, cluster: Cluster, user: bool = True) -> None:
        self.cluster, self.user = cluster, user
        self.lose: dict[str, int] = {}
        self.ran: list[list[str]] = []

    def run(
        self,
        argv: Sequence[str],
        *,
        input: str = "",
        timeout: float = 30.0,
        env: Mapping[str, str] | None = None,
    ) -> Answer:
        self.ran.append(list(argv))
        try:
            done = self.cluster.run(argv, user=self.user, env=env, input=input, timeout=timeout)
        except subprocess.TimeoutExpired:
            return Answer(TIMED_OUT, "", f"{argv[0]} gave no answer within {timeout:g} s")
        if self.lose.get(argv[0], 0):
            self.lose[argv[0]] -= 1
            return Answer(1, "", f"{argv[0]}: error: Socket timed out on send/recv operation")
        return Answer(done.returncode, done.stdout, done.stderr)


class Desk:
    """Submits small batch scripts; every job is cancelled at the end."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.over = Over(cluster)
        self.scheduler = SlurmScheduler(self.over)
        self.submitted: list[str] = []
        found = cluster.run(["mktemp", "-d", str(cluster.shared / "desk.XXXXXX")], check=True)
        self.root = Path(found.stdout.strip())

    def spec(self, text: str, *args: str, **changes: Any) -> JobSpec:
        token = uuid.uuid4().hex
        script = self.root / f"{token}.sbatch"
        script.write_text("#!/bin/bash\n" + text + "\n")
        label = f"run={self.root.name};role=runtime;token={token}"
        out, err = str(self.root / "job.%j.out"), str(self.root / "job.%j.err")
        ours = ["--job-name=desk", f"--comment={label}", f"--chdir={self.root}", "--open-mode=append"]
        values: dict[str, Any] = {
            "role": "runtime",
            "name": "desk",
            "script": script,
            "run_dir": self.root,
            "out": out,
            "err": err,
            "env": {},
            "time_limit_s": 600,
            "signal": "USR1@90",
            "token": token,
            "args": [*ours, f"--output={out}", f"--error={err}", "--mem=10M", "--export=ALL", *args],
        }
        return JobSpec(**(values | changes))

    def submit(self, text: str, *args: str, **changes: Any) -> str:
        return self.take(self.spec(text, *args, **changes))

    def take(self, spec: JobSpec) -> str:
        self.submitted.append(job_id := self.scheduler.submit(spec))
        return job_id

    def info(self, job_id: str) -> JobInfo:
        return self.scheduler.query([job_id], fresh=True)[job_id]

    def until(self, job_id: str, *states: JobState, timeout_s: float = 40) -> JobInfo:
        self.wait(lambda: self.info(job_id).state in states, f"{states} of job {job_id}", timeout_s)
        return self.info(job_id)

    def said(self, job_id: str, text: str) -> None:
        out = self.root / f"job.{job_id}.out"
        self.wait(lambda: out.exists() and text in out.read_text(), f"{text!r} in {out}", 40)

    def wait(self, check: Callable[[], object], what: str, timeout_s: float = 40) -> None:
        self.cluster.wait(check, timeout_s, what)

    def clean(self) -> None:
        self.scheduler.cancel(self.submitted)
        for job_id in self.submitted:
            self.until(job_id, *OVER)


class Launches:
    """`orchestrate` on the login host, as the user, with stand-ins for server and trainer."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        found = cluster.run(["mktemp", "-d", str(cluster.shared / "launch.XXXXXX")], check=True)
        self.home = Path(found.stdout.strip())
        self.runs_dir = self.home / "runs"
        self.before = {process.pid for process in cluster.processes()}  # other tests have the cluster too

    def orchestrate(
        self, *argv: object, timeout: float = 90, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        return self.cluster.run(self.line(*argv), timeout=timeout, cwd=self.home, env=self.environment(env))

    def environment(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        git = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "safe.directory", "GIT_CONFIG_VALUE_0": "*"}
        return {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(self.cluster.repo), **git, **(more or {})}

    def line(self, *argv: object) -> list[str]:
        return [self.cluster.python, "-m", "orchestrator", *(str(word) for word in argv)]

    def launch(self, *assignments: str, **variables: str) -> list[str]:
        """The arguments of a launch of the development configuration with stand-ins."""
        commands = [f"export PYTHONPATH={STAND_INS}:$PYTHONPATH PYTHONDONTWRITEBYTECODE=1"]
        commands += [f"export {name}={value}" for name, value in variables.items()]
        return [
            *("launch", "-c", "dev", f"run.runs_dir={self.runs_dir}"),
            *("training.gpus_per_node=1", "environment.debug=false"),  # one process: no torchrun
            f"runtime.setup_commands={json.dumps(commands)}",
            f"training.setup_commands={json.dumps(commands)}",
            *assignments,
        ]

    def start(self, *assignments: str, **variables: str) -> RunDirectory:
        done = self.orchestrate(*self.launch(*assignments, **variables), "--json")
        assert done.returncode == 0, done.stdout + done.stderr
        return RunDirectory(json.loads(done.stdout)["path"])

    def status(self, run: RunDirectory) -> dict[str, Any]:
        done = self.orchestrate("status", run.root, "--json")
        assert done.returncode == 0, done.stdout + done.stderr
        look: dict[str, Any] = json.loads(done.stdout)
        return look

    def ended(self, run: RunDirectory, timeout_s: float = 90) -> dict[str, Any]:
        """The state of the run once all of it is over."""
        end = time.monotonic() + timeout_s
        while True:
            look = self.status(run)
            if look["state"] not in ("pending", "running", "ending", "unknown"):
                return look
            assert time.monotonic() < end, (look, self.logs(run))
            time.sleep(0.5)

    def nothing_left(self, run: RunDirectory) -> None:
        """No job of the run, and no process of the user on any node."""
        label = f"run={run.run_id};"
        answer = self.cluster.run(["squeue", "-h", "-o", "%i %T %k"], check=True).stdout
        assert label not in answer, answer
        self.cluster.wait(lambda: not self.processes(), 20, f"the end of {self.processes()}")

    def processes(self) -> list[list[str]]:
        user = self.cluster.user
        found = [p for node in self.cluster.nodes for p in self.cluster.processes(node) if p.user == user]
        return [process.argv for process in found if process.pid not in self.before]

    def logs(self, run: RunDirectory) -> str:
        files = [*run.root.glob("*.out"), *run.root.glob("*.err")]
        return "\n".join(f"--- {p.name}\n{p.read_text()}" for p in files)
