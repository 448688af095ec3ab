"""The demo's task learned twice: by our trainer, and by TRL's GRPO with the same budget of rollouts.

What it is
    Both start from the same warm-started model, play the same number of episodes a step in the same
    environment (`sh` in temporary directories, as user nobody), with the same optimiser settings, and
    are timed until the success rate, as a mean over five steps, first reaches `TARGET`.

What it does not do
    No containers: making them costs both the same. TRL plays its episodes through `rollout_func`, all
    turns in lockstep with transformers' `generate`, as its documentation shows it.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.trainer_peers import grpo
from trainer.engines import Sample
from trainer.environments.local import LocalEnvironment
from trainer.formats.shell import Shell
from trainer.model import EOS, PAD, ByteTokenizer
from trainer.tasks import Task

TARGET, WINDOW = 0.8, 5


@dataclass
class Curve:
    """Success rate by step with its time, and when the target was reached."""

    start: float = field(default_factory=time.perf_counter)
    points: list[tuple[float, float]] = field(default_factory=list)

    def add(self, success: float) -> bool:
        """True once the target is reached."""
        self.points.append((time.perf_counter() - self.start, success))
        return self.reached_s is not None

    @property
    def reached_s(self) -> float | None:
        rates = [success for _, success in self.points]
        for n in range(WINDOW, len(rates) + 1):
            if sum(rates[n - WINDOW : n]) / WINDOW >= TARGET:
                return self.points[n - 1][0]
        return None

    def numbers(self) -> dict[str, float | None]:
        last = [success for _, success in self.points[-WINDOW:]]
        return {
            "reached_s": self.reached_s,
            "steps": len(self.points),
            "total_s": self.points[-1][0],
            "last": sum(last) / max(len(last), 1),
        }


class Lockstep:
    """TRL's `rollout_func`: episodes of the shell format, every turn generated for all of them at once."""

    def __init__(self, task: Task, turns: int, tokens: int, observed: int) -> None:
        self.task, self.turns, self.tokens, self.observed = task, turns, tokens, observed
        self.form = Shell(ByteTokenizer())
        self.rewards: list[float] = []

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        return asyncio.run(self._play(len(prompts), trainer.model))

    async def _play(self, count: int, model: Any) -> dict[str, Any]:
        start = self.form.prompt(self.task.prompt)
        ids, masks = [list(start) for _ in range(count)], [list[int]() for _ in range(count)]
        running = [*range(count)]
        async with AsyncExitStack() as stack:
            world = LocalEnvironment()
            desks = await asyncio.gather(
                *(stack.enter_async_context(world.open(self.task)) for _ in range(count))
            )
            for turn in range(self.turns):
                samples = self._generate(model, [ids[n] for n in running])
                said = [self.form.action(sample) for sample in samples]
                for n, sample in zip(running, samples, strict=True):
                    ids[n] += sample.ids
                    masks[n] += [1] * len(sample.ids)
                await asyncio.gather(
                    *(
                        self._act(desks[n], action.command, ids[n], masks[n], last=turn == self.turns - 1)
                        for n, action in zip(running, said, strict=True)
                        if action.complete and action.command is not None
                    )
                )
                running = [n for n, a in zip(running, said, strict=True) if a.complete and not a.last]
                if not running:
                    break
            verdicts = await asyncio.gather(*(desk.verify() for desk in desks))
        self.rewards = [verdict.reward for verdict in verdicts]
        done = [row[len(start) :] for row in ids]
        return {
            "prompt_ids": [list(start)] * count,
            "completion_ids": done,
            "logprobs": [[0.0] * len(row) for row in done],
            "env_mask": masks,
        }

    async def _act(self, desk: Any, command: str, ids: list[int], mask: list[int], last: bool) -> None:
        result = await desk.run(command, 10.0, 1024)
        if not last:
            observed = self.form.observation(result.output, self.observed)[1]
            ids += observed
            mask += [0] * len(observed)

    def _generate(self, model: Any, histories: list[list[int]]) -> list[Sample]:
        width = max(map(len, histories))
        padded = torch.tensor([[PAD] * (width - len(row)) + row for row in histories])
        with torch.no_grad():
            out = model.generate(
                padded,
                attention_mask=(padded != PAD).long(),
                do_sample=True,
                top_k=0,
                max_new_tokens=self.tokens,
                eos_token_id=[*self.form.stop_token_ids, EOS],
                pad_token_id=PAD,
            )
        return [self._cut(row[width:].tolist()) for row in out]

    def _cut(self, ids: list[int]) -> Sample:
        stops = {*self.form.stop_token_ids, EOS}
        end = next((n + 1 for n, token in enumerate(ids) if token in stops), None)
        kept = ids[:end]
        return Sample(kept, [0.0] * len(kept), "length" if end is None else "stop")


def trl_demo(folder: Path, task: Task, config: Any) -> dict[str, float | None]:
    """TRL on the demo's task, with the demo's own settings where TRL has them."""
    from transformers import TrainerCallback

    wanted, rollout = config.trainer, config.rollout
    episodes = rollout.prompts_per_step * rollout.rollouts_per_prompt
    play = Lockstep(task, rollout.max_turns, rollout.max_tokens_per_turn, rollout.max_observation_bytes)
    updates = wanted.ppo_epochs * wanted.minibatches
    curve = Curve()

    class Stop(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % updates == 0:
                control.should_training_stop = curve.add(sum(play.rewards) / len(play.rewards))

    trainer = grpo(
        folder,
        play,
        lambda completions, **_: play.rewards,
        per_device_train_batch_size=episodes // wanted.minibatches,
        steps_per_generation=wanted.minibatches,
        num_iterations=wanted.ppo_epochs,
        num_generations=rollout.rollouts_per_prompt,
        max_completion_length=rollout.max_response_length,
        learning_rate=wanted.policy_lr,
        max_grad_norm=wanted.max_grad_norm,
        beta=config.algorithm.kl_coef,
        epsilon=config.algorithm.clip_low,
        epsilon_high=config.algorithm.clip_high,
        adam_beta2=0.999,
        gradient_checkpointing=False,
        max_steps=wanted.total_steps * updates,
    )
    trainer.add_callback(Stop())
    curve.start = time.perf_counter()
    trainer.train()
    return curve.numbers()


def our_demo(folder: Path, estimator: str) -> dict[str, float | None]:
    """Our trainer on the demo's task, as `config/local.yaml` has it, with the estimator named."""
    import shutil
    import tempfile

    from orchestrator.config import load
    from orchestrator.contract import Role, RunDirectory
    from trainer.assemble import assemble
    from trainer.interrupt import Interrupt
    from trainer.train import train

    with tempfile.TemporaryDirectory() as place:
        run = RunDirectory.create(Path(place) / "runs")
        config = load("local", [f"algorithm.estimator={estimator}", "trainer.save_every=1000"]).config
        shutil.copytree(folder, run.checkpoints / "origin")
        curve = Curve()
        job = assemble(run, config, Interrupt(), run.events_of(Role.TRAINING, "bench"), LocalEnvironment())
        log = job.metrics.log

        def watched(row: dict[str, float]) -> None:
            log(row)
            if curve.add(row["success_rate"]):
                job.steps = job.step

        job.metrics.log = watched  # type: ignore[method-assign]

        async def play() -> None:
            await train(job)
            await job.engine.close()

        asyncio.run(play())
    return curve.numbers()
