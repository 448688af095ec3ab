"""The scheduler loses, ends, moves or forgets something while a run trains."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from cluster import Cluster

from orchestrator.contract import JobStatus, RunDirectory

from .conftest import NewDrill
from .kit import Drill

pytestmark = [pytest.mark.drill, pytest.mark.cluster, pytest.mark.container, pytest.mark.timeout(600)]

SBATCH = """#!/bin/bash
# sbatch in front of the real one: something happens to call number {number}
n=$(cat "$0.count" 2>/dev/null || echo 0); n=$((n + 1)); echo $n > "$0.count"
if [ "$n" = "{number}" ]; then {first}; fi
out=$(/usr/bin/sbatch "$@"); rc=$?
if [ "$n" = "{number}" ]; then {then}; fi
echo "$out"; exit $rc
"""
HANG = "touch $0.waits; sleep 30; exit 1"
LOST = (
    'echo "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation" >&2; exit 1'
)


def in_front(cluster: Cluster, number: int, *, first: str = ":", then: str = ":") -> dict[str, str]:
    """PATH with an sbatch of ours in front; what it does before and after call `number`."""
    folder = cluster.shared / f"bin{time.monotonic_ns()}"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    (folder / "sbatch").write_text(SBATCH.format(number=number, first=first, then=then))
    (folder / "sbatch").chmod(0o755)
    return {"PATH": f"{folder}:{cluster.environment()['PATH']}"}


def node_of(drill: Drill, role: str) -> str:
    return next(job.nodes for job in drill.cluster.jobs() if job.id == drill.job(role))


@pytest.mark.parametrize("number", [1, 2])
def test_reply_lost(new_drill: NewDrill, number: int) -> None:
    drill = new_drill(f"the answer to sbatch number {number} is lost")
    before = len(drill.cluster.jobs())
    drill.fault()
    drill.launch(env=in_front(drill.cluster, number, then=LOST))
    assert len(drill.cluster.jobs()) == before + 2, "a job was submitted twice, or not at all"
    drill.recovers()
    drill.ends("success")
    drill.row("the job is found by its token; nothing is submitted twice")


def launch_and_kill(drill: Drill, env: dict[str, str]) -> None:
    """The launcher is killed while sbatch hangs in its second call."""
    launcher = drill.cluster.popen(["orchestrate", "launch", "--config", drill.write_config()], env=env)
    marker = Path(env["PATH"].split(":")[0]) / "sbatch.waits"
    drill.wait(marker.exists, 60, "the second submission")
    drill.fault()
    launcher.send_signal(signal.SIGKILL)
    launcher.communicate()
    drill.run = drill.latest()


def test_launcher_killed_before_the_second_job(new_drill: NewDrill) -> None:
    drill = new_drill("kill -9 of the launcher before the runtime job was submitted")
    launch_and_kill(drill, in_front(drill.cluster, 2, first=HANG))
    assert len(drill.live_jobs()) == 1
    shown = "nothing was removed yet"
    drill.wait(lambda: shown in drill.orchestrate("reap"), 60, "that reap shows the held job")
    drill.orchestrate("reap", "--yes")
    drill.over()
    drill.row("`orchestrate reap` shows the training job that would wait for ever, and ends it")


def test_launcher_killed_before_the_second_answer(new_drill: NewDrill) -> None:
    drill = new_drill("kill -9 of the launcher before it heard of the runtime job")
    launch_and_kill(drill, in_front(drill.cluster, 2, then=HANG))
    drill.ends("success")
    drill.row("the run goes on and succeeds: no launcher is needed")


def test_runtime_cancelled_while_it_waits(new_drill: NewDrill) -> None:
    drill = new_drill("scancel of the runtime job while both jobs are pending")
    drill.configure(runtime={"nodes": 1, "constraint": ""}, scheduler={"extra_args": ["--begin=now+1hour"]})
    run = drill.launch()
    ids = sorted(drill.live_jobs(), key=int)
    assert len(ids) == 2
    drill.fault()
    drill.cluster.run(["scancel", ids[-1]], check=True)
    drill.wait(lambda: len(drill.live_jobs()) == 1, 30, "the end of the runtime job")
    drill.orchestrate("reap", "--yes")
    drill.over()
    assert not run.read(run.status("training"), JobStatus)
    drill.row("`status` names the held job, `orchestrate reap` ends it")


@pytest.mark.parametrize("role", ["runtime", "training"])
def test_scancel(new_drill: NewDrill, role: str) -> None:
    drill = new_drill(f"scancel of the {role} job")
    drill.launch()
    drill.reach_step(2)
    drill.fault()
    drill.cluster.run(["scancel", drill.job(role)], check=True)
    drill.ends("cancelled", "peer_gone")
    drill.row("both jobs end, and the result says who was cancelled")


def test_cancel(new_drill: NewDrill) -> None:
    drill = new_drill("`orchestrate cancel`")
    drill.launch()
    drill.reach_step(2)
    drill.fault()
    drill.orchestrate("cancel")
    drill.ends("cancelled")
    drill.row("both jobs end in order")


@pytest.mark.parametrize("role", ["runtime", "training"])
def test_requeue_from_outside(new_drill: NewDrill, role: str) -> None:
    drill = new_drill(f"scontrol requeue of the {role} job")
    drill.launch()
    drill.reach_step(3)
    drill.fault()
    drill.cluster.run(["scontrol", "requeue", drill.job(role)], check=True)
    drill.recovers()
    drill.ends("success")
    drill.row("the job comes back, under the same id, and the run goes on")


def test_controller_away(new_drill: NewDrill) -> None:
    drill = new_drill("slurmctld does not answer for 30 s")
    drill.launch()
    drill.reach_step(2)
    drill.fault()
    drill.cluster.stop_controller()
    try:
        time.sleep(30)  # as long as it is away is the fault itself
        assert "unknown" in drill.orchestrate("status", "--json") or drill.steps()
    finally:
        drill.cluster.start_controller()
    drill.ends("success")
    drill.row("nothing: no answer is no verdict")


@pytest.mark.parametrize("role", ["runtime", "training"])
def test_node_lost(new_drill: NewDrill, role: str) -> None:
    drill = new_drill(f"loss of power of the {role} node")
    drill.launch()
    drill.reach_step(3)
    node = node_of(drill, role)
    drill.fault()
    drill.cluster.crash(node)
    try:
        drill.recovers(timeout=300)
        drill.ends("success", timeout=300)
    finally:
        drill.cluster.boot(node)
        drill.cluster.run(
            ["sh", "-c", "rm -rf /dev/shm/orc-* /tmp/orc-*"], user=False, node=node
        )  # as a boot does
    drill.cluster.run([drill.cluster.python, "-m", "runtime_server", "--sweep"], node=node)
    drill.row(
        "Slurm requeues the job on another node; the run goes on; the next server there sweeps the disk"
    )


def test_preempted(new_drill: NewDrill) -> None:
    drill = new_drill("preemption of the training job")
    drill.configure(training={"partition": "gpu_low"})
    run = drill.launch()
    drill.reach_step(3)
    node = node_of(drill, "training")
    drill.fault()
    urgent = drill.cluster.run(
        ["sbatch", "--parsable", "-p", "gpu_test", "-w", node, "-c", "128", "--wrap", "sleep 5"], check=True
    ).stdout.strip()
    drill.recovers()
    assert drill.cluster.job_state(urgent) in ("COMPLETED", "RUNNING", "COMPLETING")
    drill.ends("success")
    assert run.latest_attempt("training") == 2
    drill.row("a checkpoint within the grace time; requeued; goes on from there")


def test_walltime(new_drill: NewDrill) -> None:
    drill = new_drill("the training job reaches its walltime")
    drill.configure(
        training={"time_limit": "2m"},
        scheduler={"signal": "USR1@60"},
        trainer={"total_steps": 5000, "save_every": 10_000, "total_epochs": 5000},
    )
    drill.baseline = None
    run = drill.launch()
    drill.wait(lambda: _requeued(run), 200, "the requeue")
    drill.fault()
    drill.recovers()
    drill.orchestrate("cancel")
    drill.ends("cancelled")
    drill.row("checkpoint on the warning; requeued; goes on from there")


def _requeued(run: RunDirectory) -> bool:
    status = run.read(run.status("training"), JobStatus)
    return status is not None and status.outcome == "requeued"
