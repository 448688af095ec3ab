"""A part of the run is killed, or stopped, while it trains."""

from __future__ import annotations

import signal

import pytest

from .conftest import NewDrill
from .kit import BASELINE_STEPS, Drill

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


# Run as root on the node, for a sandbox of these runs is gone within a second: kills a process, any, whose
# command line says the word, and which is process 1 of a namespace of its own if that is asked for. It, or
# its parent, belongs to the cluster's user: other drills may be under way.
STRIKE = """
import contextlib, os, pathlib, random, sys, time
word, first, user, end = sys.argv[1].encode(), sys.argv[2] == "first", sys.argv[3], time.monotonic() + 30
def status(p):
    return dict(line.split(":", 1) for line in (p / "status").read_text().splitlines())
def is_it(p):
    told = status(p)
    numbers = told["NSpid"].split()
    alone = numbers[-1] == "1" and len(numbers) > 1
    if word not in (p / "cmdline").read_bytes().split(b"\\0")[0] or alone != first:
        return False
    return user in (told["Uid"].split()[0], status(p.parent / told["PPid"].strip())["Uid"].split()[0])
def found():
    for p in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            if is_it(p):
                yield int(p.name)
        except (OSError, KeyError):
            pass
while time.monotonic() < end:
    if pids := list(found()):
        with contextlib.suppress(OSError):
            os.kill(random.choice(pids), 9)
            sys.exit(0)
sys.exit(1)
"""


def strike(drill: Drill, word: str, which: str) -> None:
    """Kill one, at once, on the runtime node."""
    command = [drill.cluster.python, "-c", STRIKE, word, which, str(drill.cluster.uid)]
    drill.cluster.run(command, user=False, node=drill.node("runtime"), check=True)


def test_agent_killed(new_drill: NewDrill) -> None:
    drill = new_drill("kill -9 of a sandbox's agent, its first process")
    drill.configure(trainer={"total_steps": BASELINE_STEPS})
    run = drill.train(2)
    log = run.err("training", drill.job("training"))
    drill.fault()
    for _ in range(20):  # one that was just done with its work loses nothing
        strike(drill, "agent", "first")
        done = len(drill.steps())
        drill.wait(lambda: "attempt 1:" in log.read_text() or len(drill.steps()) > done, 60, "a lost episode")  # noqa: B023
        if "attempt 1:" in log.read_text():
            break
    else:
        pytest.fail(f"no episode was hit\n{drill.story()}")
    drill.recovers()
    drill.ends("success")
    drill.row("its episode is lost, masked, and played again in a fresh sandbox")


def test_conmon_killed(new_drill: NewDrill) -> None:
    drill = new_drill("kill -9 of a sandbox's conmon")
    drill.train(2)
    drill.fault()
    strike(drill, "conmon", "")  # once: an episode that is hit at each of its tries is masked, and rightly so
    drill.recovers()
    drill.ends("success")
    drill.row("no episode is lost for good; a sandbox that was just being made is made again")


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
