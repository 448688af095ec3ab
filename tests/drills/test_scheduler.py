"""The scheduler loses, ends, moves or forgets something while a run trains."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from cluster import Cluster

from orchestrator.contract import JobStatus, RunDirectory

from .conftest import NewDrill
from .kit import BASELINE_STEPS, Drill

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


@pytest.mark.parametrize("number", [1, 2])
def test_reply_lost(new_drill: NewDrill, number: int) -> None:
    drill = new_drill(f"the answer to sbatch number {number} is lost")
    before = len(drill.cluster.jobs())
    drill.launch(env=in_front(drill.cluster, number, then=LOST))
    assert len(drill.cluster.jobs()) == before + 2, "a job was submitted twice, or not at all"
    drill.ends("success")
    drill.row("the launcher finds the job by its token; nothing is submitted twice, the run succeeds")


def launch_and_kill(drill: Drill, env: dict[str, str]) -> None:
    """The launcher is killed while sbatch hangs in its second call."""
    launcher = drill.cluster.popen(["orchestrate", "launch", "--config", drill.write_config()], env=env)
    marker = Path(env["PATH"].split(":")[0]) / "sbatch.waits"
    drill.wait(marker.exists, 60, "the second submission")
    drill.fault()
    launcher.send_signal(signal.SIGKILL)
    launcher.communicate()
    drill.run = drill.latest()


def reap_held_job(drill: Drill) -> None:
    """One job waits for ever: a person asks what is left, sees it, and says yes."""
    (held,) = drill.live_jobs()
    drill.wait(lambda: held in drill.orchestrate("reap"), 60, "that reap shows the held job")
    assert drill.live_jobs() == [held], "reap acted without a yes"
    drill.orchestrate("reap", "--yes")
    drill.over()


def test_launcher_killed_before_the_second_job(new_drill: NewDrill) -> None:
    drill = new_drill("kill -9 of the launcher before the runtime job was submitted")
    launch_and_kill(drill, in_front(drill.cluster, 2, first=HANG))
    reap_held_job(drill)
    drill.row("`orchestrate reap` shows the training job that would wait for ever, and ends it")


def test_launcher_killed_before_the_second_answer(new_drill: NewDrill) -> None:
    drill = new_drill("kill -9 of the launcher before it heard of the runtime job")
    launch_and_kill(drill, in_front(drill.cluster, 2, then=HANG))
    drill.recovers()
    drill.ends("success")
    drill.row("the run starts, goes on and succeeds: once sbatch was called, no launcher is needed")


def test_runtime_cancelled_while_it_waits(new_drill: NewDrill) -> None:
    drill = new_drill("scancel of the runtime job while both jobs are pending")
    drill.configure(runtime={"nodes": 1, "constraint": ""}, scheduler={"extra_args": ["--begin=now+1hour"]})
    run = drill.launch()
    ids = sorted(drill.live_jobs(), key=int)
    assert len(ids) == 2
    drill.fault()
    drill.cluster.run(["scancel", ids[-1]], check=True)
    drill.wait(lambda: len(drill.live_jobs()) == 1, 30, "the end of the runtime job")
    assert "the training will never start" in drill.orchestrate("status")
    reap_held_job(drill)
    assert not run.read(run.status("training"), JobStatus)
    drill.row("`orchestrate status` says that the training will never start; `orchestrate reap` ends it")


@pytest.mark.parametrize("role", ["runtime", "training"])
def test_scancel(new_drill: NewDrill, role: str) -> None:
    drill = new_drill(f"scancel of the {role} job")
    drill.train(2)
    drill.fault()
    drill.cluster.run(["scancel", drill.job(role)], check=True)
    reason = drill.ends("cancelled" if role == "training" else "peer_gone")
    assert "cancelled" in reason and ("runtime" in reason) == (role == "runtime"), reason
    drill.row("both jobs end; the result says which was cancelled, and nothing brings the run back")


def test_cancel(new_drill: NewDrill) -> None:
    drill = new_drill("`orchestrate cancel`")
    drill.train(2)
    drill.fault()
    drill.orchestrate("cancel")
    drill.ends("cancelled")
    drill.row("the trainer is told, then both jobs end; the result says that it was cancelled")


@pytest.mark.parametrize("role", ["runtime", "training"])
def test_requeue_from_outside(new_drill: NewDrill, role: str) -> None:
    drill = new_drill(f"scontrol requeue of the {role} job")
    drill.train()
    drill.fault()
    drill.cluster.run(["scontrol", "requeue", drill.job(role)], check=True)
    drill.recovers(role)
    drill.ends("success")
    assert drill.lives(role) == (1, 2)
    drill.row("the job comes back under its id (6 s of Slurm's own delay) and the run goes on")


def test_controller_away(new_drill: NewDrill) -> None:
    drill = new_drill("slurmctld does not answer for half a minute")
    drill.train(2)
    drill.fault()
    drill.cluster.stop_controller()
    try:
        drill.recovers()
        assert "unknown" in drill.orchestrate("status", "--json")
        time.sleep(30)  # how long it is away is the fault itself
    finally:
        drill.cluster.start_controller()
    drill.ends("success")
    assert drill.lives("runtime") == drill.lives("training") == (1, 1)
    drill.row("nothing: no answer is no verdict; both jobs go on")


@pytest.mark.parametrize("role", ["runtime", "training"])
def test_node_lost(new_drill: NewDrill, role: str) -> None:
    drill = new_drill(f"loss of power of the {role} node")
    drill.train()
    node = drill.node(role)
    drill.fault()
    drill.cluster.crash(node)
    try:
        drill.recovers(role, timeout=300)
        drill.ends("success", timeout=300)
        assert drill.node(role) != node
    finally:
        drill.cluster.boot(node)
        empty = ["sh", "-c", "rm -rf /dev/shm/orc-* /tmp/orc-*"]  # in memory, on most machines
        drill.cluster.run(empty, user=False, node=node)
    drill.cluster.run([drill.cluster.python, "-m", "runtime_server", "--sweep"], node=node)
    assert drill.lives(role) == (1, 2)
    drill.row(
        "Slurm notices after 15 to 35 s and requeues the job on another node; the run goes on; once the "
        "node is back, a sweep removes what is on its disk"
    )


def test_preempted(new_drill: NewDrill) -> None:
    drill = new_drill("preemption of the training job")
    low = {"partition": "gpu_low", "gpus_per_node": 1}
    drill.configure(training=low, trainer={"total_steps": BASELINE_STEPS})
    drill.train()
    node = drill.node("training")
    drill.fault()
    # both GPUs of that node: there is no room for them beside the job of lower rank
    wanted = ["-p", "gpu_test", "-w", node, "--gres=gpu:2", "--wrap", "sleep 5"]
    urgent = drill.cluster.run(["sbatch", "--parsable", *wanted], check=True).stdout.strip()
    drill.recovers("training")
    assert drill.cluster.job_state(urgent) in ("COMPLETED", "RUNNING", "COMPLETING")
    drill.ends("success")
    assert drill.lives("training") == (1, 2)
    assert drill.done_again() == 0
    drill.row(
        "Slurm says nothing to a batch shell in the grace time of 10 s; TERM after it: a checkpoint; "
        "requeued; goes on from there"
    )


def test_walltime(new_drill: NewDrill) -> None:
    drill = new_drill("the training job reaches its walltime")
    drill.configure(
        training={"time_limit": "2m"},
        scheduler={"signal": "USR1@60"},
        trainer={"total_steps": BASELINE_STEPS, "save_every": 100},
    )
    run = drill.launch()
    drill.wait(lambda: _requeued(run), 200, "the requeue")
    drill.fault()
    drill.recovers("training")
    drill.ends("success")
    jobs, attempts = drill.lives("training")
    assert jobs == 1 and attempts >= 2 and drill.done_again() == 0
    drill.row("a checkpoint on the warning; requeued; goes on from there")


def _requeued(run: RunDirectory) -> bool:
    status = run.read(run.status("training"), JobStatus)
    return status is not None and status.outcome == "requeued"
