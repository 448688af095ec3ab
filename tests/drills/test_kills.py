"""Each part of a run is killed while it trains."""

from __future__ import annotations

import pytest

from .conftest import NewDrill

pytestmark = [pytest.mark.drill, pytest.mark.cluster, pytest.mark.container, pytest.mark.timeout(600)]


def test_trainer_killed(new_drill: NewDrill) -> None:
    drill = new_drill("kill -9 of the trainer")
    drill.launch()
    drill.reach_step(3)
    drill.fault()
    drill.cluster.kill(drill.part("trainer"))
    drill.ends("failed")
    drill.row("the run fails and says why; both jobs end; `orchestrate resume` goes on")


@pytest.mark.parametrize("part", ["training stub", "training wrapper"])
def test_training_job_killed(new_drill: NewDrill, part: str) -> None:
    drill = new_drill(f"kill -9 of the {part}")
    drill.launch()
    drill.reach_step(3)
    drill.fault()
    drill.cluster.kill(drill.part(part))
    drill.ends("failed", "peer_gone", "cancelled")
    drill.row("the run fails and says so; both jobs end")


@pytest.mark.parametrize("part", ["server", "runtime wrapper"])
def test_runtime_killed(new_drill: NewDrill, part: str) -> None:
    drill = new_drill(f"kill -9 of the {part}")
    drill.launch()
    drill.reach_step(3)
    drill.fault()
    drill.cluster.kill(drill.part(part))
    drill.recovers()
    drill.ends("success")
    drill.row("the runtime job is requeued and comes back; the training waits and goes on")


@pytest.mark.parametrize("part", ["agent", "conmon"])
def test_sandbox_killed(new_drill: NewDrill, part: str) -> None:
    drill = new_drill(f"kill -9 of a sandbox's {part}")
    drill.launch()
    drill.reach_step(2)
    drill.fault()
    drill.cluster.kill(drill.part(part))
    drill.recovers()
    drill.ends("success")
    drill.row("the episode is masked and played again")


def test_slurmd_killed(new_drill: NewDrill) -> None:
    drill = new_drill("kill -9 of slurmd on the training node")
    drill.launch()
    drill.reach_step(2)
    node = next(job.nodes for job in drill.cluster.jobs() if job.id == drill.job("training"))
    drill.fault()
    drill.cluster.kill_slurmd(node)
    drill.recovers()
    drill.cluster.start_slurmd(node)
    drill.ends("success")
    drill.row("nothing: job and sandboxes go on; slurmd is started again")
