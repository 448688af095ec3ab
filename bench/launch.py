"""Launching in numbers, on a real Slurm of this machine: the whole process, and what it costs the GPUs.

How to run it (as root: it starts the private cluster of tests/cluster)
    python -m bench.launch [--json] [--rounds 7]

What it measures, medians over the rounds, in seconds unless the name says otherwise
    launch_s            `orchestrate launch --config dev`, the whole process: two jobs, snapshot, fsyncs
    launch_first_s      the same into an empty directory of runs: all of the code is copied, not linked
    sbatch_s            two bare sbatch, one after the other
    submitit_s          the whole Python process that submits two jobs with submitit
    scheduling_s        Slurm's own part: from `scontrol release` to the first line of a bare held job
    ready_to_train_s    from the ready server to the trainer's process, scheduling_s included
    gpu_idle_s          how long the training job had its GPU before the server was ready
    gpu_idle_after_s    the same with a plain dependency (scheduler.start_policy=after)
    help_cpu_ms         CPU time of `orchestrate --help`

What it does not do
    Server and trainer are the tests' stand-ins: neither sandboxes nor models are measured here. The
    ways of submitting take turns in each round, so that a busy machine is unfair to none.
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from orchestrator.contract import Event, RunDirectory

ROOT = Path(__file__).resolve().parents[1]
STAND_INS = ROOT / "tests" / "orchestrator" / "stand_ins"
FEW = ["--mem=10M", "--time=5"]

SUBMITIT = """
import submitit, sys
for partition in ("test", "gpu_test"):
    executor = submitit.SlurmExecutor(folder=sys.argv[1])
    executor.update_parameters(partition=partition, time=5, mem="1GB")
    executor.submit(print, "hello")
"""

HELD = "#!/bin/bash\ndate +%s.%N >{file}.new; mv {file}.new {file}\n"


# --- in the cluster, as its user ----------------------------------------------------------------------


def inside(folder: Path, rounds: int) -> dict[str, Any]:
    """All measurements; runs on the login host of the cluster."""
    ways: dict[str, Callable[[], object]] = {
        "launch_s": lambda: launch(folder),
        "launch_first_s": lambda: launch(folder / f"first-{time.time_ns()}"),
        "sbatch_s": lambda: sbatch(folder),
        "submitit_s": lambda: run([sys.executable, "-c", SUBMITIT, str(folder / "submitit")]),
    }
    took: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            seconds = timed(way)
            if turn:  # the first one warms the caches of all
                took[name].append(seconds)
            run(["scancel", "--me"])
    found: dict[str, Any] = {name: median(values) for name, values in took.items()}
    found["scheduling_s"] = median([scheduling(folder) for _ in range(rounds)])
    ready, idle = zip(*(ready_to_train(folder) for _ in range(rounds)), strict=True)
    _, after = ready_to_train(folder, "scheduler.start_policy=after")
    found |= {"ready_to_train_s": median(ready), "gpu_idle_s": median(idle), "gpu_idle_after_s": after}
    return found | {"help_cpu_ms": help_cpu_ms(), "rounds": rounds}


def median(values: Sequence[float]) -> float:
    return round(statistics.median(values), 3)


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def run(argv: Sequence[str]) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise SystemExit(f"{argv[:4]}: {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def sbatch(folder: Path) -> None:
    for partition in ("test", "gpu_test"):
        run(["sbatch", *FEW, f"--partition={partition}", f"--chdir={folder}", "--wrap=true"])


def launch(folder: Path, *assignments: str) -> str:
    """The whole process. Returns the path of the run."""
    first = f"export PYTHONPATH={STAND_INS}:$PYTHONPATH PYTHONDONTWRITEBYTECODE=1"
    argv = [
        *("orchestrate", "launch", "--config", "dev", f"run.runs_dir={folder}/runs", "--json"),
        *("runtime.partition=test", "training.partition=gpu_test"),
        *(f"{role}.setup_commands={json.dumps([first])}" for role in ("runtime", "training")),
        *assignments,
    ]
    return str(json.loads(run(argv))["path"])


def scheduling(folder: Path) -> float:
    """From the release of a held job to its first line."""
    file = folder / f"started-{time.time_ns()}"
    script = file.with_suffix(".sh")
    script.write_text(HELD.format(file=file))
    where = ["--partition=gpu_test", "--gres=gpu:1", f"--chdir={folder}"]
    job_id = run(["sbatch", "--parsable", "--hold", *FEW, *where, str(script)]).strip()
    released = time.time()
    run(["scontrol", "release", job_id])
    wait(file.exists, f"job {job_id}")
    return float(file.read_text()) - released


def ready_to_train(folder: Path, *assignments: str) -> tuple[float, float]:
    """Seconds from ready to training, and seconds that the training job was there before it was ready."""
    run_dir = RunDirectory(launch(folder, *assignments))
    wait(lambda: run_dir.complete_flag.stat().st_size > 0, f"the end of {run_dir.root}")
    at = {event.what: event for event in reversed(run_dir.timeline())}

    def between(first: str, second: str) -> float:
        return moment(at, second) - moment(at, first)

    idle = max(0.0, between("training.waiting", "runtime.ready"))
    return round(between("runtime.ready", "training.running"), 3), round(idle, 3)


def moment(at: dict[str, Event], what: str) -> float:
    if what not in at:
        raise SystemExit(f"the run has no event {what}, only {sorted(at)}")
    return at[what].at


def wait(check: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
    end = time.monotonic() + timeout_s
    while not check():
        if time.monotonic() > end:
            raise SystemExit(f"{what} did not come within {timeout_s:g} s")
        time.sleep(0.02)


def help_cpu_ms() -> float:
    def once() -> float:
        before = os.times()
        run(["orchestrate", "--help"])
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    return round(1000 * statistics.median(once() for _ in range(7)), 1)


# --- outside ------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.launch", description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print nothing but the line of numbers")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        print(json.dumps(inside(options.inside, options.rounds)))
        return 0
    if not options.json:
        print("starting a private Slurm, and launching runs on it …", flush=True)
    print(json.dumps(in_cluster(options.rounds)))
    return 0


def in_cluster(rounds: int) -> dict[str, Any]:
    from tests.cluster.cluster import Cluster

    # the cluster's user cannot write beside the sources; whoever installs or runs them first does
    compileall.compile_dir(ROOT / "orchestrator", quiet=2)
    git = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "safe.directory", "GIT_CONFIG_VALUE_0": "*"}
    with Cluster() as cluster:
        folder = Path(tempfile.mkdtemp(dir=cluster.shared))
        os.chown(folder, cluster.uid, cluster.uid)
        command = [cluster.python, "-m", "bench.launch", "--inside", folder, "--rounds", rounds]
        # the checkout belongs to someone else there, which git asks to be told
        done = cluster.run(command, cwd=cluster.repo, env=git, timeout=900, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    sys.exit(main())
