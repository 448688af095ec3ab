"""What torchrun starts in `test_torchrun.py`: a whole small training, or an evaluation, in the world of
`training_kit`.

`torchrun_main.py FOLDER KEY=VALUE …`: trains in the run of FOLDER with its configuration and the changes;
each rank leaves its part of the result in FOLDER.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import torch
import yaml
from training_kit import World

from orchestrator.contract import Role, RunDirectory
from orchestrator.schema import Config
from trainer.__main__ import close
from trainer.assemble import assemble
from trainer.distributed import join
from trainer.errors import TrainerError
from trainer.evaluate import Evaluating, evaluate, evaluation
from trainer.interrupt import Interrupt, Interrupted, Wanted
from trainer.train import train
from trainer.weights import named_weights


async def work(folder: Path, run: RunDirectory, config: Config, asked: dict[str, str]) -> str:
    ranks = join(config.trainer.ranks_timeout)
    events = run.events_of(Role.TRAINING, "trainer" if ranks.first else f"trainer-{ranks.rank}")
    interrupt, mine = Interrupt(), asked.get("rank") == str(ranks.rank)

    def before_open(number: int) -> None:
        """Something happens to one rank in the middle of its episodes."""
        if mine and number == int(asked["at"]):
            if asked["what"] == "die":
                raise SystemExit(7)
            interrupt.ask(Wanted.CHECKPOINT if asked["what"] == "checkpoint" else Wanted.STOP)

    world = World(before_open=before_open)
    if config.evaluation.wanted:
        return await evaluated(evaluation(run, config, interrupt, events, world, ranks))
    job = assemble(run, config, interrupt, events, world, ranks)
    try:
        with interrupt.deferred():
            try:
                reason = await train(job)
            except (Interrupted, TrainerError) as error:
                return f"{type(error).__name__}: {error}"
        weights = {name: tensor.clone() for name, tensor in named_weights(job.learner.policy)}
        torch.save(weights, folder / f"policy-{ranks.rank}.pt")
        return reason
    finally:
        await close(job)


async def evaluated(job: Evaluating) -> str:
    try:
        with job.interrupt.deferred():
            return await evaluate(job)
    except (Interrupted, TrainerError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        await close(job)


def main() -> None:
    torch.set_num_threads(1)
    folder, *changes = sys.argv[1:]
    config = Config.model_validate(yaml.safe_load((Path(folder) / "config.yaml").read_text()))
    asked = dict(change.split("=") for change in changes)
    run = RunDirectory(Path((Path(folder) / "run").read_text()))
    reason = asyncio.run(work(Path(folder), run, config, asked))
    with (Path(folder) / "ends.jsonl").open("a") as file:
        file.write(json.dumps(reason) + "\n")


if __name__ == "__main__":
    main()
