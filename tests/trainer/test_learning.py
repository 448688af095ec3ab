"""Does it learn? The short form of the demo's task: real vLLM, real PPO, an unconfined shell for sandbox.

The demo's configuration, thirty steps of 32 episodes. It starts at no more than chance and ends well
above; and in every step the engine sampled from the very policy that was trained.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from statistics import mean

import pytest
import yaml

from orchestrator.contract import Role, RunDirectory, read_json_lines
from orchestrator.schema import Config
from trainer.assemble import assemble
from trainer.environments.local import LocalEnvironment
from trainer.interrupt import Interrupt
from trainer.train import train

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(400)]
STEPS = 30


def demo() -> Config:
    """The demo's own configuration, cut to the trainer's part, with numbers for a short run."""
    path = Path(__file__).parents[2] / "config" / "local.yaml"
    written = yaml.safe_load(path.read_text())
    parts = ("model", "data", "rollout", "algorithm", "trainer", "training")
    config = Config.model_validate({part: written[part] for part in parts if part in written})
    config.trainer.total_steps, config.trainer.save_every = STEPS, STEPS
    config.rollout.prompts_per_step, config.rollout.rollouts_per_prompt = 8, 4
    config.trainer.ppo_epochs, config.trainer.minibatches = 4, 2
    config.trainer.policy_lr, config.trainer.critic_lr = 4e-4, 1e-3
    config.trainer.critic_warmup_steps = 3
    return config


async def test_the_success_rate_rises(tmp_path: Path) -> None:
    run, world = RunDirectory.create(tmp_path), LocalEnvironment()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vLLM's own, at import and start
        job = assemble(run, demo(), Interrupt(), run.events_of(Role.TRAINING), world)
    try:
        assert await train(job) == f"{STEPS} steps done"
    finally:
        await job.engine.close()
    rows = read_json_lines(run.metrics)
    success = [row["success_rate"] for row in rows]
    shown = [round(mean(success[at : at + 5]), 2) for at in range(0, STEPS, 5)]
    assert mean(success[:3]) <= 0.3, shown
    assert mean(success[-5:]) >= 0.6, shown
    assert max(row["probe"] for row in rows) < 1e-4
    assert max(row["mismatch_max"] for row in rows) < 1e-3
    assert sum(row["status/infra"] for row in rows) == 0
    assert len(list(run.rollouts.glob("step-*.jsonl"))) == STEPS
