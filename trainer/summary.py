"""What a step's metrics say about its episodes: rewards, failures by kind, lengths, tools, ages.

What it is
    Pure functions from episodes to numbers, for a row of metrics.

What it does not do
    No tensors: what the update saw is the learner's to say.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import fmean, pstdev

from trainer.episode import Episode, Failure, Status

SAME = 1e-8
"""Rewards that differ by less are one reward."""


def summary(episodes: Sequence[Episode]) -> dict[str, float]:
    """Shares by status and failure, and of the valid ones rewards, lengths and tools."""
    valid = [episode for episode in episodes if episode.valid]
    rewards = [episode.reward for episode in valid]
    return {
        **{f"status/{status}": _share(e.status is status for e in episodes) for status in Status},
        **{f"failure/{f}": _share(e.failure is f for e in episodes) for f in Failure if f},
        "reward_mean": _mean(rewards),
        "reward_std": pstdev(rewards) if rewards else 0.0,
        "success_rate": _share(reward > 0.5 for reward in rewards),
        **lengths(valid),
        **tools(valid),
    }


def lengths(episodes: Sequence[Episode]) -> dict[str, float]:
    """In tokens, but `turns`."""
    responses = [float(episode.response_length) for episode in episodes]
    return {
        "length/prompt": _mean(float(episode.prompt_length) for episode in episodes),
        "length/response": _mean(responses),
        "length/response_max": max(responses, default=0.0),
        "length/actions": _mean(float(episode.action_tokens) for episode in episodes),
        "length/turns": _mean(float(len(episode.turns)) for episode in episodes),
    }


def tools(episodes: Sequence[Episode]) -> dict[str, float]:
    """Calls by episode, and the shares of those that went wrong; nothing where there are no tools."""
    used = [call for episode in episodes for turn in episode.turns for call in turn.used]
    if not used:
        return {}
    return {
        "tools/calls": len(used) / len(episodes),
        "tools/problems": _share(bool(call.problem) for call in used),
        "tools/timed_out": _share(call.timed_out for call in used),
    }


def staleness(episodes: Sequence[Episode], version: int) -> dict[str, float]:
    """How many updates ago the tokens were sampled, seen from the weights that are about to learn."""
    ages: dict[int, int] = defaultdict(int)
    for episode in episodes:
        starts = [*(start for start, _ in episode.spans[1:]), len(episode.ids)]
        for (start, sampled_by), end in zip(episode.spans, starts, strict=False):
            ages[version - sampled_by] += sum(episode.mask[start:end])
    tokens = sum(ages.values())
    mean = sum(age * count for age, count in ages.items()) / tokens if tokens else 0.0
    return {"staleness/mean": mean, "staleness/max": float(max(ages, default=0))}


# --- groups ------------------------------------------------------------------------------------------


def groups(episodes: Iterable[Episode]) -> dict[int, list[Episode]]:
    """The valid episodes by group; a group that has none is not there."""
    found: dict[int, list[Episode]] = defaultdict(list)
    for episode in episodes:
        if episode.valid:
            found[episode.group].append(episode)
    return found


def dull(episodes: Iterable[Episode]) -> list[int]:
    """Groups of two and more that all earned the same: nothing can be learned from comparing them."""
    return [
        number
        for number, members in sorted(groups(episodes).items())
        if len(members) > 1 and max(e.reward for e in members) - min(e.reward for e in members) < SAME
    ]


def dull_share(episodes: Iterable[Episode]) -> float:
    """Of the groups of two and more."""
    episodes = list(episodes)
    comparable = sum(len(members) > 1 for members in groups(episodes).values())
    return len(dull(episodes)) / comparable if comparable else 0.0


def _share(flags: Iterable[bool]) -> float:
    found = list(flags)
    return sum(found) / max(len(found), 1)


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return fmean(found) if found else 0.0
