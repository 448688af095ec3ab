"""An evaluation with every real part: a run's checkpoint, the command line, the local scheduler, real
sandboxes; warned in the middle, and gone on with by a second life."""

from __future__ import annotations

import json

import pytest
from test_run import Orchestrate, orchestrate, soon

from orchestrator import checkpoints
from orchestrator.contract import Evaluation, Manifest, RunDirectory, read_json_lines
from orchestrator.schedulers import open_scheduler
from trainer.tasks import lucky_seven, write_tasks

__all__ = ["orchestrate"]
pytestmark = [pytest.mark.container, pytest.mark.slow, pytest.mark.timeout(200)]
TASKS, SAMPLES = 8, 4
EXACT = ("rollout.engine=torch", "run.seed=7")


def test_a_run_is_evaluated_and_interrupted_and_every_sample_counts_once(orchestrate: Orchestrate) -> None:
    orchestrate.run(*orchestrate.launch("--follow", *EXACT, "trainer.total_steps=1"))
    trained = orchestrate.last
    data = orchestrate.runs / "held-out.parquet"
    write_tasks(data, lucky_seven()[:TASKS])
    words = ("eval", str(trained.root), "--data", str(data), "--samples", str(SAMPLES), "--k", "1,2,4")
    said = json.loads(orchestrate.run(*words, "--no-follow", "--json", "rollout.max_parallel_episodes=2"))
    run = RunDirectory(said["path"])
    soon(lambda: checkpoints.judged(run) >= 3, "a few judged episodes", 120)
    manifest = run.read(run.manifest, Manifest)
    assert manifest is not None
    open_scheduler("local", orchestrate.runs).signal(manifest.job_id("training"), "USR1")
    soon(lambda: bool(run.read_text(run.complete_flag)), "the end of the evaluation", 120)

    found, result = run.read(run.evaluation, Evaluation), orchestrate.result()
    assert result.outcome == "success" and result.metrics["judged"] == TASKS * SAMPLES, result
    assert found is not None and found.complete and (found.judged, found.lost) == (TASKS * SAMPLES, 0)
    assert set(found.pass_at) == {"1", "2", "4"} and found.step == 1
    episodes = read_json_lines(run.rollouts / "validation-000001.jsonl")
    assert [one["number"] for one in episodes] == list(range(TASKS * SAMPLES))
    assert all(one["timings"]["create_s"] > 0 for one in episodes), "each has had a sandbox"
    ended = [event.data["outcome"] for event in run.timeline() if event.what == "training.ended"]
    assert ended == ["requeued", "success"] and len(list(run.judged.iterdir())) == 2
    assert checkpoints.judged(run) == TASKS * SAMPLES, "nothing was judged twice"
    assert "pass@4" in orchestrate.run("status", str(run.root))
    assert "validation 1" in orchestrate.run("rollouts", str(run.root), "--validation")
    orchestrate.nothing_left()
