"""A part of the run is killed, or stopped, while it trains."""

from __future__ import annotations

import signal

import pytest

from .conftest import NewDrill

pytestmark = [pytest.mark.drill, pytest.mark.cluster, pytest.mark.container, pytest.mark.timeout(600)]


def test_trainer_killed(new_drill: NewDrill) -> None:
    drill = new_drill("kill -9 of the trainer")
    drill.train()
    drill.fault()
    drill.cluster.kill(drill.part("trainer"))
    assert "SIGKILL" in drill.ends("failed")
    drill.resume()
    drill.recovers()
    drill.ends("success")
    drill.row("the run fails and says why, both jobs end; `orchestrate resume` goes on from the checkpoint")


@pytest.mark.parametrize("part", ["training stub", "training wrapper"])
def test_training_job_killed(new_drill: NewDrill, part: str) -> None:
    drill = new_drill(f"kill -9 of the {part}")
    drill.train()
    drill.fault()
    drill.cluster.kill(drill.part(part))
    assert "was killed" in drill.ends("failed")
    drill.resume()
    drill.recovers()
    drill.ends("success")
    drill.row("the run fails and says why, both jobs end; `orchestrate resume` goes on from the checkpoint")


def test_server_killed(new_drill: NewDrill) -> None:
    drill = new_drill("kill -9 of the server")
    drill.train()
    drill.fault()
    drill.cluster.kill(drill.part("server"))
    drill.recovers("runtime")
    drill.ends("success")
    assert drill.lives("runtime") == (1, 2)
    drill.row("another server in the same job, at once; lost episodes are played again")


def test_server_stopped(new_drill: NewDrill) -> None:
    drill = new_drill("SIGSTOP of the server: it lives and does not answer")
    drill.train()
    drill.fault()
    drill.cluster.kill(drill.part("server"), signal.SIGSTOP)
    drill.recovers("runtime")
    drill.ends("success")
    assert drill.lives("runtime") == (1, 2)
    drill.row("its job replaces it after 15 s without an answer (half of `training.peer_grace`)")


@pytest.mark.parametrize("part", ["runtime stub", "runtime wrapper"])
def test_runtime_job_killed(new_drill: NewDrill, part: str) -> None:
    drill = new_drill(f"kill -9 of the {part}")
    drill.train()
    drill.fault()
    drill.cluster.kill(drill.part(part))
    drill.recovers("runtime")
    drill.ends("success")
    assert drill.lives("runtime") == (2, 2)
    drill.row("the job is over; the training job submits another one, waits for it, and goes on")


def test_drill_command(new_drill: NewDrill) -> None:
    drill = new_drill("`orchestrate drill --kill runtime`: scancel --batch --signal=KILL")
    drill.train()
    drill.fault()
    report = drill.orchestrate("drill", "--kill", "runtime", "--yes", "--json", timeout=200)
    assert '"recovered": true' in report, report
    drill.recovers("runtime")
    drill.ends("success")
    drill.row("as kill -9 of the runtime stub, and the command says that the run recovered")


@pytest.mark.parametrize("part", ["agent", "conmon"])
def test_sandbox_killed(new_drill: NewDrill, part: str) -> None:
    drill = new_drill(f"kill -9 of a sandbox's {part}")
    drill.train(2)
    drill.fault()
    drill.cluster.kill(drill.part(part))
    drill.recovers()
    drill.ends("success")
    drill.row("the episode is played again in a fresh sandbox")


@pytest.mark.parametrize("role", ["runtime", "training"])
def test_slurmd_killed(new_drill: NewDrill, role: str) -> None:
    drill = new_drill(f"kill -9 of slurmd on the {role} node")
    drill.train(2)
    node = drill.node(role)
    drill.fault()
    drill.cluster.kill_slurmd(node)
    drill.recovers()
    drill.cluster.start_slurmd(node)
    drill.ends("success")
    assert drill.lives("runtime") == drill.lives("training") == (1, 1)
    drill.row("nothing: the job goes on; slurmd is started again before Slurm gives the node up")
