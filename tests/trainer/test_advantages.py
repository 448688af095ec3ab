"""Estimators against numbers worked out by hand, and against plain loops in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from ranks_kit import together
from torch import Tensor

from orchestrator.plan_algorithm import WITH_CRITIC, WITH_TIME
from orchestrator.schema_algorithm import Algorithm
from trainer import ppo
from trainer.ranks import Ranks

E_MASK = [1, 1, 0, 0, 1, 1]
E_REWARD = [0, 0, 0, 0, 0, 1]
A = [0, 1, 4, 5]  # the action places of the worked episode


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def close(found: Any, expected: Any, tolerance: float = 1e-6) -> None:
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=0, atol=tolerance)


def groups(*numbers: int) -> Tensor:
    return torch.tensor(numbers)


# --- per token ---------------------------------------------------------------------------------------


def test_reward_to_go_neither_decays_through_observations_nor_starts_again_there() -> None:
    found = ppo.reward_to_go(row(*E_REWARD), row(*[9] * 6), row(*E_MASK), 0.9, 0.5)
    close(found[0], [0.729, 0.81, 0, 0, 0.9, 1.0])


def test_reward_to_go_against_a_plain_loop() -> None:
    random = np.random.default_rng(1)
    r, m = random.normal(size=(20, 15)), (random.random((20, 15)) < 0.5) * 1.0
    expected = np.zeros_like(r)
    for i, t in np.ndindex(*r.shape):
        later = [u for u in range(t, 15) if m[i, u]]
        expected[i, t] = m[i, t] * sum(0.9**k * r[i, u] for k, u in enumerate(later))
    found = ppo.reward_to_go(torch.tensor(r), torch.tensor(r), torch.tensor(m), 0.9, 1.0)
    close(found, expected, 1e-12)


def test_whitening_alone_on_each_of_two_ranks_would_be_something_else() -> None:
    x, mask = row(0.9, 0.8, 0.7, 0.6), row(1, 1, 1, 1)
    part = x[:, :2], mask[:, :2]
    close(ppo.whiten(*part, ppo.moments(*part))[0], [0.707106, -0.707106], 1e-5)

    def work(ranks: Ranks) -> Tensor:
        own = slice(2 * ranks.rank, 2 * ranks.rank + 2)
        mine = x[:, own], mask[:, own]
        return ppo.whiten(*mine, ranks.sum(ppo.moments(*mine)))

    close(torch.cat(together(2, work), 1)[0], [1.161895, 0.387298, -0.387298, -1.161895], 1e-5)


# --- per row -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (ppo.grpo, [1.499997, -0.499999, -0.499999, -0.499999]),
        (ppo.rloo, [1.0, -1 / 3, -1 / 3, -1 / 3]),
        (ppo.dr_grpo, [0.75, -0.25, -0.25, -0.25]),
    ],
)
def test_one_success_of_four(rule: Any, expected: list[float]) -> None:
    close(rule(torch.tensor([1.0, 0, 0, 0]), groups(7, 7, 7, 7)), expected)


@pytest.mark.parametrize("rule", [ppo.grpo, ppo.rloo, ppo.dr_grpo])
def test_alone_in_its_group_or_equal_to_all_others_a_row_teaches_nothing(rule: Any) -> None:
    found = rule(torch.tensor([1.0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]), groups(3, 5, 5, 5, 5, 5, 5))
    assert found.tolist() == [0.0] * 7  # exactly: the mean of six times 0.1 is not quite 0.1


@pytest.mark.parametrize(
    ("name", "expected", "wrong"),
    [
        ("rloo", [0.5, -1.0, 0.5], 0.666667),
        ("grpo", [0.577349, -1.154699, 0.577349], 0.866024),
    ],
)
def test_a_row_that_was_lost_is_in_no_group(name: str, expected: list[float], wrong: float) -> None:
    outcomes, mask = torch.tensor([1.0, 0, 1, 0]), torch.ones(4, 3)
    estimate = ppo.ESTIMATORS[name]

    def found(mask: Tensor) -> list[float]:
        rewards = ppo.place_rewards(outcomes, mask)
        return estimate(rewards, rewards, mask, groups(0, 0, 0, 0), 1.0, 1.0)[:, 0].tolist()

    close(np.abs(found(mask)), [wrong] * 4)  # scored 0, an outage looks like a failure
    mask[3] = 0
    close(found(mask), [*expected, 0.0])


def numpy_rule(name: str, scores: Any, numbers: Any) -> Any:
    out = np.zeros_like(scores)
    for i, number in enumerate(numbers):
        mine = scores[numbers == number]
        if len(mine) < 2:
            continue
        others = (mine.sum() - scores[i]) / (len(mine) - 1)
        deviation = np.sqrt(((mine - mine.mean()) ** 2).sum() / (len(mine) - 1))
        centred = scores[i] - mine.mean()
        out[i] = {"rloo": scores[i] - others, "grpo": centred / (deviation + 1e-6)}.get(name, centred)
    return out


@pytest.mark.parametrize("name", ["grpo", "rloo", "dr-grpo", "reinforce++-baseline"])
def test_groups_of_any_size_in_any_order_against_numpy(name: str) -> None:
    random = np.random.default_rng(2)
    for _ in range(20):
        scores, numbers = random.normal(size=30), random.integers(0, 12, size=30)
        rule = ppo.ESTIMATORS[name].per_row
        assert rule is not None
        close(rule(torch.tensor(scores), torch.tensor(numbers)), numpy_rule(name, scores, numbers), 1e-9)


@pytest.mark.parametrize("name", list(ppo.ESTIMATORS))
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_that_share_groups_estimate_like_one(name: str, size: int) -> None:
    draw = torch.Generator().manual_seed(3)
    outcomes, values = torch.rand(10, generator=draw), torch.rand(10, 6, generator=draw)
    mask = (torch.rand(10, 6, generator=draw) < 0.6).float()
    mask[4] = 0
    numbers, rewards = torch.arange(10) % 3, ppo.place_rewards(outcomes, mask)

    def work(ranks: Ranks) -> Tensor:
        own = slice(ranks.rank, None, ranks.size)
        return ppo.ESTIMATORS[name](
            rewards[own], values[own], mask[own], numbers[own], 0.99, 0.9, ranks=ranks
        )

    (whole,) = together(1, work)
    for rank, part in enumerate(together(size, work)):
        assert torch.equal(part, whole[rank::size])


def test_a_rank_without_any_row_takes_part() -> None:
    def work(ranks: Ranks) -> list[float]:
        mask = torch.full((2, 1), float(ranks.rank == 0))
        rewards = ppo.place_rewards(torch.tensor([1.0, 0.0]), mask)
        estimate = ppo.ESTIMATORS["rloo"]
        return estimate(rewards, rewards, mask, groups(0, 0), 1.0, 1.0, ranks)[:, 0].tolist()

    assert together(2, work) == [[1.0, -1.0], [0.0, 0.0]]


def test_groups_that_teach_nothing_are_counted() -> None:
    scores = torch.tensor([1.0, 1, 1, 1, 1, 0, 1, 0.5])
    found = ppo.group_stats(scores, groups(0, 0, 0, 0, 1, 1, 2, 3))
    assert found == {"groups/count": 4.0, "groups/alone": 2.0, "groups/flat": 0.5}
    assert ppo.group_stats(scores[:0], groups())["groups/flat"] == 0.0


def test_rows_whose_group_lies_on_another_rank_are_not_alone() -> None:
    def work(ranks: Ranks) -> list[bool]:
        numbers = groups(0, 1, 9) if ranks.rank == 0 else groups(1, 0, 5)
        acting = torch.tensor([True, True, ranks.rank == 0])
        return ppo.GroupReport.of(torch.ones(3), numbers, acting, ranks).alone.tolist()

    assert together(2, work) == [[False, False, True], [False, False, False]]


# --- lengths, names ----------------------------------------------------------------------------------


def test_the_penalty_grows_over_the_last_tokens_that_are_allowed() -> None:
    lengths = torch.tensor([10, 80, 85, 90, 100, 140])
    close(ppo.length_penalty(lengths, 100, 20), [0, 0, -0.25, -0.5, -1, -1])


def test_every_estimator_that_can_be_configured_exists_and_is_checked_for_what_it_is() -> None:
    assert set(Algorithm.model_fields["estimator"].choices) == set(ppo.ESTIMATORS)
    assert {name for name, e in ppo.ESTIMATORS.items() if e.critic} == WITH_CRITIC
    assert {name for name, e in ppo.ESTIMATORS.items() if e.per_token} == WITH_TIME
    assert {name for name, e in ppo.ESTIMATORS.items() if e.whiten} == {
        "gae", "reinforce++", "reinforce++-baseline",
    }  # fmt: skip
