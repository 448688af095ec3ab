"""Trajectories for reading: one JSON line per episode, `step-000012.jsonl` per step.

What it is
    `write_rollouts` puts down what a person wants to see of a step: what the policy typed, what it saw,
    what it was worth and how long it took. `mask` tells the parts in order: p prompt, a action,
    o observation, each with its number of tokens.

How to use it
    write_rollouts(run.rollouts, step, episodes)

What it does not do
    No token ids and no log-probabilities: this is for people, not for training on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from orchestrator.contract import publish_bytes
from trainer.episode import Episode


def rollout_file(directory: Path, step: int, kind: str = "step") -> Path:
    """Where the trajectories of a step are, or of the validation after so many steps."""
    return directory / f"{kind}-{step:06d}.jsonl"


def write_rollouts(directory: Path, step: int, episodes: Sequence[Episode], kind: str = "step") -> Path:
    """Publish a step's trajectories at once, replacing those of an earlier try of the same step."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(line(episode) | {"step": step}, ensure_ascii=False) for episode in episodes]
    path = rollout_file(directory, step, kind)
    publish_bytes(path, ("\n".join(lines) + "\n").encode(errors="replace"))
    return path


def line(episode: Episode) -> dict[str, Any]:
    """One episode as a JSON object."""
    return {
        "task": episode.task_id,
        "group": episode.group,
        "status": str(episode.status),
        "reward": episode.reward,
        "error": episode.error,
        "turns": [asdict(turn) for turn in episode.turns],
        "mask": mask_summary(episode),
        "tokens": len(episode.ids),
        "action_tokens": episode.action_tokens,
        "weight_version": episode.weight_version,
        "spans": episode.spans,
        "number": episode.number,
        "failure": str(episode.failure),
        "timings": {name: round(seconds, 4) for name, seconds in episode.timings.items()},
    }


def mask_summary(episode: Episode) -> str:
    """The parts of an episode in order, like "p2 a13 o16 a20"."""
    after = episode.mask[episode.prompt_length :]
    parts = [f"{'a' if acted else 'o'}{len(list(run))}" for acted, run in groupby(after)]
    return " ".join([f"p{episode.prompt_length}", *parts])
