"""Numbers for the log are the same however rows are spread over micro-batches and ranks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from ranks_kit import together

from trainer import ppo
from trainer.ranks import Ranks
from trainer.stats import Numbers, Tally


@pytest.mark.parametrize("size", [1, 2, 3])
def test_masked_stats_against_numpy_on_any_number_of_ranks(size: int) -> None:
    random = np.random.default_rng(6)
    x, mask = random.normal(size=(7, 5)), (random.random((7, 5)) < 0.5) * 1.0

    def work(ranks: Ranks) -> Numbers:
        own = slice(ranks.rank, None, ranks.size)
        return ppo.masked_stats(torch.tensor(x[own]), torch.tensor(mask[own]), ranks)

    chosen = x[mask > 0]
    expected = {"mean": chosen.mean(), "min": chosen.min(), "max": chosen.max(), "std": chosen.std(ddof=1)}
    for found in together(size, work):
        assert found.keys() == expected.keys()
        assert all(math.isclose(found[name], expected[name], rel_tol=1e-12) for name in expected)


def test_a_rank_without_actions_changes_no_number() -> None:
    def work(ranks: Ranks) -> Numbers:
        return ppo.masked_stats(
            torch.tensor([3.0, 5.0]) + ranks.rank, torch.tensor([1.0, 1]) * (1 - ranks.rank), ranks
        )

    assert together(2, work) == [{"mean": 4.0, "min": 3.0, "max": 5.0, "std": math.sqrt(2)}] * 2


@pytest.mark.parametrize("size", [1, 2, 3])
def test_mismatch_on_any_number_of_ranks(size: int) -> None:
    """The worked differences [0, 0.01, -0.02], one to a row."""
    old = torch.tensor([[0.0, 7.0], [0.01, 7.0], [-0.02, 7.0]], dtype=torch.float64)
    mask = torch.tensor([[1.0, 0.0]] * 3, dtype=torch.float64)

    def work(ranks: Ranks) -> Numbers:
        own = slice(ranks.rank, None, ranks.size)
        return ppo.mismatch_stats(old[own], torch.zeros_like(old[own]), mask[own], ranks)

    for found in together(size, work):
        assert abs(found["k3"] - 8.2947e-5) < 1e-9
        assert math.isclose(found["mean"], 0.01) and found["max"] == 0.02 and found["outside"] == 0.0


def test_a_tally_adds_up_and_keeps_the_ends() -> None:
    def work(ranks: Ranks) -> Numbers:
        tally = Tally()
        for x in (1.0, 4.0):
            scalar = torch.tensor(x + ranks.rank)
            tally.add({"sum": scalar}, {"high": scalar}, {"low": scalar})
        return tally.close(ranks)

    assert together(2, work) == [{"sum": 12.0, "high": 5.0, "low": 1.0}] * 2
    assert Tally().close() == {}


def test_an_extreme_over_nothing_loses_against_every_number() -> None:
    assert ppo.peak(torch.ones(3), torch.zeros(3)) == -torch.inf
    assert ppo.peak(torch.tensor([1.0, 9.0]), torch.tensor([1.0, 0.0])) == 1.0
