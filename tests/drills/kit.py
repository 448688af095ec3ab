"""One run on the test cluster, its numbers, and what is left of it: what every drill stands on.

How to use it
    drill = Drill(cluster, site, "the trainer is killed"); drill.launch(); drill.reach_step(2)
    drill.cluster.kill(drill.part("trainer")); drill.fault(); drill.ends("success"); drill.row()

What it measures
    recovery_s      from the fault until a step was finished that was not before, or until every job was over
    steps_lost      steps that were done again
    counted_twice   steps whose numbers differ from those of the run without a fault: an update that was
                    applied twice, or lost, changes every loss after it
    left            jobs, processes of the user and sandboxes that are still there a minute after the end

What it does not do
    It injects nothing; the drills do (test_*.py).
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from cluster import Cluster, Process

from orchestrator.contract import JobStatus, Result, RunDirectory, read_json_lines

T = TypeVar("T")
LIVE = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED")
PARTS = {
    "runtime stub": ("bash", "runtime.sh"),
    "training stub": ("bash", "training.sh"),
    "runtime wrapper": ("orchestrator.job", "runtime"),
    "training wrapper": ("orchestrator.job", "training"),
    "server": ("runtime_server", "--run-dir"),
    "trainer": ("trainer", "--run-dir"),
    "conmon": ("conmon",),
    "agent": ("/.orchestrate/agent",),
}
MEASURED = ("time/", "tokens_per_s", "lost_tries")
"""How long it took and how often it was tried; every other number of a step must be exactly the same."""
STEP_LINE = re.compile(r"^step +(\d+) ", re.MULTILINE)
STEPS = 8
BASELINE_STEPS = 30
"""Of the run without a fault: as many as the longest drill has."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    fault: str
    happened: str
    recovery_s: float | None
    steps_lost: int
    counted_twice: int
    jobs_left: int
    processes_left: int
    sandboxes_left: int


def settings(cluster: Cluster, image: Path) -> dict[str, Any]:
    """A small exact run: the deterministic engine, real sandboxes, both jobs on nodes of their own."""
    once = {"minibatches": 1, "ppo_epochs": 1}
    return {
        "extends": "local",
        "run": {"name": "drill", "runs_dir": str(cluster.shared / "runs")},
        "scheduler": {"kind": "slurm"},
        "runtime": {
            "partition": "test",
            "host": "0.0.0.0",
            "image_archives": [str(image)],
            "sandbox": {"command_timeout": "20s"},
        },
        "training": {"partition": "gpu_test", "cpus": 1, "peer_grace": "30s"},
        "model": {"warmstart_steps": 60},
        "rollout": {"engine": "torch", "prompts_per_step": 4, "rollouts_per_prompt": 4},
        # constant rates: a run is compared step by step with a longer one
        "trainer": {"total_steps": STEPS, "save_every": 2, "critic_warmup_steps": 1}
        | {"lr_schedule": "constant", "lr_min_ratio": 0.0}
        | once,
    }


class Drill:
    """One run and its clock. `baseline` are the rows of the run without a fault."""

    def __init__(
        self, cluster: Cluster, image: Path, fault: str, baseline: list[dict[str, Any]] | None
    ) -> None:
        self.cluster, self.name, self.baseline = cluster, fault, baseline
        self.config = settings(cluster, image)
        self.run: RunDirectory | None = None
        self.runs = cluster.shared / "runs"
        self.before = {job.id for job in cluster.jobs()}
        self._at = self._steps_at = 0.0
        self._recovered: float | None = None

    # --- the run ---

    def configure(self, **sections: dict[str, Any]) -> None:
        for name, values in sections.items():
            self.config[name] = {**self.config.get(name, {}), **values}

    def on_small_disk(self, megabytes: int) -> Path:
        """Runs go to a filesystem of so many megabytes; returns where that is."""
        place = self.cluster.shared / f"disk{time.monotonic_ns()}"
        self.cluster.small_disk(place, megabytes)
        self.runs = place / "runs"
        self.configure(run={"runs_dir": str(self.runs)})
        return place

    def launch(self, *words: str, env: dict[str, str] | None = None) -> RunDirectory:
        """`orchestrate launch` by the user on the login host."""
        done = self.cluster.run(
            ["orchestrate", "launch", "--config", self.write_config(), "--json", *words], env=env, timeout=60
        )
        assert done.returncode == 0, done.stdout + done.stderr
        self.run = self.latest()
        return self.run

    def train(self, number: int = 3) -> RunDirectory:
        """Launch, and let so many steps be done."""
        run = self.launch()
        self.reach_step(number)
        return run

    def write_config(self) -> Path:
        path = self.cluster.shared / "drill.yaml"
        path.write_text(yaml.safe_dump(self.config))
        return path

    def latest(self) -> RunDirectory:
        """As it is seen from here, the directory of the newest run."""
        runs = [p for p in self.cluster.inside(self.runs).iterdir() if p.name[0].isdigit()]
        return RunDirectory(max(runs))

    @property
    def root(self) -> Path:
        """The run directory as the hosts see it."""
        assert self.run is not None
        return self.runs / self.run.run_id

    def orchestrate(self, *words: str, timeout: float = 120) -> str:
        """A command of the command line on this run."""
        done = self.cluster.run(["orchestrate", words[0], str(self.root), *words[1:]], timeout=timeout)
        return done.stdout + done.stderr

    def resume(self) -> None:
        """What a person does after a failure; the clock of the recovery runs on."""
        self._steps_at = float(len(self.steps()))
        said = self.orchestrate("resume")
        assert self.live_jobs(), said

    def jobs(self, role: str) -> list[str]:
        """Ids of every job of a role that was submitted for the run."""
        manifest = self.run.read_manifest() if self.run else None
        assert manifest is not None
        mine = [entry["job_id"] for entry in manifest.submissions if entry["role"] == role]
        return list(dict.fromkeys(job_id for job_id in mine if job_id))

    def lives(self, role: str) -> tuple[int, int]:
        """(jobs, attempts) of a role so far."""
        assert self.run is not None
        return len(self.jobs(role)), self.run.latest_attempt(role)

    def job(self, role: str) -> str:
        """The job's id as its own record says."""
        assert self.run is not None
        status = self.run.read(self.run.status(role), JobStatus)
        if status is not None:
            return status.job_id
        return self.jobs(role)[-1]

    def node(self, role: str) -> str:
        """Where a job of the run is."""
        return next(job.nodes for job in self.cluster.jobs() if job.id == self.job(role))

    # --- looking ---

    def steps(self) -> list[dict[str, Any]]:
        return read_json_lines(self.run.metrics) if self.run else []

    def reach_step(self, number: int, timeout: float = 120) -> None:
        self.wait(lambda: len(self.steps()) >= number, timeout, f"step {number}")

    def wait(self, check: Callable[[], T], timeout: float, what: str) -> T:
        end = time.monotonic() + timeout
        while not (found := check()):
            assert time.monotonic() < end, f"{what}: not within {timeout:g} s\n{self.story()}"
            time.sleep(0.1)
        return found

    def story(self) -> str:
        """What a person would look at first."""
        if self.run is None:
            return ""
        events = [f"{e.at:.1f} {e.what} {e.data}" for e in self.run.timeline()][-25:]
        logs = [p for p in sorted(self.run.root.glob("*_*.err")) if p.stat().st_size]
        tails = [f"--- {p.name}\n" + p.read_text(errors="replace")[-1500:] for p in logs]
        return "\n".join([*events, *tails, str(self.cluster.jobs())])

    def part(self, name: str, timeout: float = 30) -> Process:
        """A process of the run by what it is."""
        return self.wait(lambda: next(iter(self._parts(name)), None), timeout, f"a process of {name}")  # type: ignore[return-value]

    def _parts(self, name: str) -> list[Process]:
        words = PARTS[name]
        found = [p for p in self.cluster.processes() if all(any(w in a for a in p.argv) for w in words)]
        if words[0] != "bash":
            return [p for p in found if Path(p.argv[0]).name != "bash"]
        return [p for p in found if Path(p.argv[0]).name == "bash"]

    # --- the fault and the end ---

    def fault(self) -> None:
        """Now. The clock of the recovery starts; without a call there is nothing to recover from."""
        self._at, self._steps_at = time.monotonic(), float(len(self.steps()))

    def recovers(self, role: str = "", timeout: float = 180) -> None:
        """A further step was finished; with a role, in or after a second life of its job."""
        if role:
            self.wait(lambda: self.lives(role)[1] > 1, timeout, f"a second life of the {role} job")
            self._steps_at = float(len(self.steps()))
        self.wait(self._went_on, timeout, "a step after the fault")
        self._recovered = time.monotonic()

    def _went_on(self) -> bool:
        result = self.run.read(self.run.result, Result) if self.run else None
        over = result is not None and result.outcome != "success" and not self.live_jobs()
        assert not over, f"{result}\n{self.story()}"
        return len(self.steps()) > self._steps_at

    def ends(self, *outcomes: str, timeout: float = 240) -> str:
        """Every job over and the result written; returns its reason."""
        run = self.run
        assert run is not None
        self.wait(lambda: run.read(run.result, Result) is not None, timeout, "the result")
        self.wait(lambda: not self.live_jobs(), 120, "the end of every job")
        if self._recovered is None:
            self._recovered = time.monotonic()
        result = run.read(run.result, Result)
        assert result is not None
        assert result.outcome in outcomes, f"{result}\n{self.story()}"
        return str(result.reason)

    def over(self) -> None:
        """For runs that end without a trainer's result."""
        self.wait(lambda: not self.live_jobs(), 180, "the end of every job")
        self._recovered = time.monotonic()

    def live_jobs(self) -> list[str]:
        """Jobs that were submitted since the drill began and are not over."""
        return [job.id for job in self.cluster.jobs() if job.state in LIVE and job.id not in self.before]

    def clean(self) -> None:
        """Whatever a failed drill leaves must not fail the next one."""
        if left := self.live_jobs():
            self.cluster.run(["scancel", *left])
            self.wait(lambda: not self.live_jobs(), 60, "the end of jobs that a failed drill left")
        if self.sandboxes():
            for node in self.cluster.nodes:
                everything = ["sh", "-c", "rm -rf /dev/shm/orc-* /var/tmp/orc-* /tmp/orc-*"]
                self.cluster.run(everything, user=False, node=node)

    # --- the row ---

    def row(self, happened: str) -> Row:
        """Check that nothing is left, and that no step differs from the run without a fault."""
        differing = self.differing()
        row = Row(
            fault=self.name,
            happened=happened,
            recovery_s=round(self._recovered - self._at, 1) if self._recovered and self._at else None,
            steps_lost=self.done_again(),
            counted_twice=len(differing),
            jobs_left=len(self.live_jobs()),
            processes_left=self.settled(self.user_processes),
            sandboxes_left=self.settled(self.sandboxes),
        )
        record(row)
        left = (row.jobs_left, row.processes_left, row.sandboxes_left)
        assert left == (0, 0, 0), f"left: {self.user_processes()} {self.sandboxes()}"
        assert not differing, f"{differing}\n{self.story()}"
        return row

    def differing(self) -> list[str]:
        """Steps whose numbers are not those of the run without a fault, each with the first of these."""
        if self.baseline is None:
            return []
        plain = {row["step"]: row for row in self.baseline}
        mine = {row["step"]: row for row in self.steps()}
        keys = {step: _first_difference(mine[step], plain[step]) for step in sorted(mine.keys() & plain)}
        return [f"step {step}: {key}" for step, key in keys.items() if key]

    def done_again(self) -> int:
        """Steps that the trainer says it has finished, more than once each; its log is appended to."""
        logs = self.run.root.glob("training_*.out") if self.run else ()
        said = [number for log in logs for number in STEP_LINE.findall(log.read_text(errors="replace"))]
        return len(said) - len(set(said))

    def user_processes(self) -> list[str]:
        known = {"root"}
        return [" ".join(p.argv)[:120] for p in self.cluster.processes() if p.user not in known]

    def sandboxes(self) -> list[str]:
        """Directories of sandbox servers that nobody removed."""
        found = []
        for node in self.cluster.nodes:
            script = "ls -d /dev/shm/orc-* /var/tmp/orc-* /tmp/orc-* 2>/dev/null"
            answer = self.cluster.run(["sh", "-c", script], user=False, node=node)
            found += [f"{node}:{line}" for line in answer.stdout.split()]
        return found

    def settled(self, look: Callable[[], list[str]], timeout: float = 60) -> int:
        end = time.monotonic() + timeout
        while (left := look()) and time.monotonic() < end:
            time.sleep(0.2)
        return len(left)


def _first_difference(mine: dict[str, Any], plain: dict[str, Any]) -> str:
    exact = [key for key in plain if not key.startswith(MEASURED)]
    return next((f"{k} {mine.get(k)} != {plain[k]}" for k in exact if mine.get(k) != plain[k]), "")


def record(row: Row) -> None:
    """A line for the table, when one is being made (`make drills`)."""
    if out := os.environ.get("ORCHESTRATE_DRILLS"):
        with Path(out).open("a") as file:
            file.write(json.dumps(dataclasses.asdict(row)) + "\n")
