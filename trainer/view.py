"""Trajectories for reading: written as one JSON line per episode, shown turn by turn in a terminal.

What it is
    `write_rollouts` puts down what a person wants to see of a step: what the policy typed, what it saw,
    what it was worth and how long it took, in `step-000012.jsonl`, or `validation-000012.jsonl` after so many
    steps. `mask` tells the parts of an episode in order: p prompt, a action (trained on), o observation, each
    with its number of tokens. `main` shows these files.

How to use it
    write_rollouts(run.rollouts, step, episodes)
    python -m trainer.view RUN_DIR [--step N] [--task ID] [--validation] [--all] [--json]
    orchestrate rollouts RUN ...            the same, by the run's name

What it does not do
    No token ids and no log-probabilities: this is for people, not for training on. What a sandbox printed is
    shown without its control characters.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from orchestrator.contract import RunDirectory, publish_bytes, read_json_lines
from trainer.episode import Episode

Line = dict[str, Any]
"""One episode, as `line` makes it."""
PROMPT_KEPT = 4000
"""Characters of a task's text that are written with each episode."""


# --- written -----------------------------------------------------------------------------------------


def rollout_file(directory: Path, step: int, kind: str = "step") -> Path:
    """Where the trajectories of a step are, or of the validation after so many steps."""
    return directory / f"{kind}-{step:06d}.jsonl"


def write_rollouts(directory: Path, step: int, episodes: Sequence[Episode], kind: str = "step") -> Path:
    """Publish a step's trajectories at once, replacing those of an earlier try of the same step."""
    return write_lines(directory, step, [line(episode) for episode in episodes], kind)


def write_lines(directory: Path, step: int, lines: Sequence[Line], kind: str = "step") -> Path:
    """The same of what `line` has made of them."""
    directory.mkdir(parents=True, exist_ok=True)
    texts = [json.dumps(one | {"step": step}, ensure_ascii=False) for one in lines]
    path = rollout_file(directory, step, kind)
    publish_bytes(path, ("\n".join(texts) + "\n").encode(errors="replace"))
    return path


def line(episode: Episode) -> Line:
    """One episode as a JSON object."""
    return {
        "task": episode.task_id,
        "group": episode.group,
        "number": episode.number,
        "status": str(episode.status),
        "failure": str(episode.failure),
        "reward": episode.reward,
        "error": episode.error,
        "prompt": episode.prompt[:PROMPT_KEPT],
        "turns": [asdict(turn) for turn in episode.turns],
        "mask": mask_summary(episode),
        "tokens": len(episode.ids),
        "action_tokens": episode.action_tokens,
        "weight_version": episode.weight_version,
        "spans": episode.spans,
        "timings": {name: round(seconds, 4) for name, seconds in episode.timings.items()},
    }


def mask_summary(episode: Episode) -> str:
    """The parts of an episode in order, like "p2 a13 o16 a20"."""
    after = episode.mask[episode.prompt_length :]
    parts = [f"{'a' if acted else 'o'}{len(list(run))}" for acted, run in groupby(after)]
    return " ".join([f"p{episode.prompt_length}", *parts])


# --- read --------------------------------------------------------------------------------------------


class Nothing(Exception):
    """There is nothing to show; the message says why and what there is."""


def directory_of(run: RunDirectory) -> Path:
    """Where a run writes its trajectories: in itself, unless its configuration names another place."""
    import yaml

    whole = yaml.safe_load(run.config.read_text()) if run.config.is_file() else None
    given = ((whole or {}).get("trainer") or {}).get("rollout_dir")
    return Path(given or run.rollouts)


def steps(directory: Path, kind: str) -> list[int]:
    """Those that there are, in order."""
    names = (path.stem.rpartition("-")[2] for path in directory.glob(f"{kind}-*.jsonl"))
    return sorted(int(name) for name in names if name.isdigit())


def read_rollouts(directory: Path, kind: str, step: int | None, task: str) -> tuple[int, list[Line]]:
    """The step, by default the newest, and its episodes, of one task if one is named. Raises Nothing."""
    there = steps(directory, kind)
    if not there:
        raise Nothing(f"no trajectories in {directory} yet: they are written after each {_what(kind)}")
    chosen = there[-1] if step is None else step
    if chosen not in there:
        raise Nothing(f"no {_what(kind)} {chosen} in {directory}; there are {_ranges(there)}")
    found = read_json_lines(rollout_file(directory, chosen, kind))
    mine = [one for one in found if task in ("", one["task"])]
    if not mine:
        tasks = sorted({str(one["task"]) for one in found})
        raise Nothing(f"no task {task!r} in {_what(kind)} {chosen}; there are {', '.join(tasks[:20])}")
    return chosen, mine


def _what(kind: str) -> str:
    return "validation" if kind == "validation" else "step"


def _ranges(numbers: Sequence[int]) -> str:
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers))


# --- the command line --------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """`python -m trainer.view`. Exit code 1 when there is nothing to show."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.view", description="Show a run's trajectories, turn by turn."
    )
    parser.add_argument("run_dir", type=Path, help="the run directory")
    parser.add_argument("--step", type=int, help="which step; default: the newest")
    parser.add_argument("--task", default="", help="only this task's episodes, all of them in full")
    parser.add_argument("--validation", action="store_true", help="of a validation, instead of a step")
    parser.add_argument("--all", action="store_true", help="every episode in full, not only a few")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    given = parser.parse_args(arguments)
    run, kind = RunDirectory(given.run_dir), "validation" if given.validation else "step"
    try:
        step, lines = read_rollouts(directory_of(run), kind, given.step, given.task)
    except Nothing as nothing:
        print(f"error: {nothing}", file=sys.stderr)
        return 1
    if given.json:
        print(json.dumps(lines))
        return 0
    from orchestrator.view import console
    from trainer.view_text import shown

    console().print(shown(run.run_id, _what(kind), step, lines, bool(given.all or given.task)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
