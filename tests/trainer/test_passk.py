"""pass@k against the enumeration of every subset of samples, and its mean and error against NumPy."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from trainer.passk import Counted, over_tasks, pass_at_k


@pytest.mark.parametrize("samples", range(1, 9))
def test_it_is_the_share_of_the_subsets_that_hold_a_success(samples: int) -> None:
    for successes in range(samples + 1):
        solved = [n < successes for n in range(samples)]
        for k in range(1, samples + 1):
            subsets = [any(subset) for subset in combinations(solved, k)]
            assert pass_at_k(samples, successes, k) == pytest.approx(sum(subsets) / len(subsets), abs=1e-15)


def test_it_is_exact_where_binomials_are_beyond_a_float() -> None:
    assert pass_at_k(4000, 1, 1000) == 0.25
    assert pass_at_k(4000, 0, 1000) == 0.0 and pass_at_k(4000, 3001, 1000) == 1.0


def test_it_is_unbiased() -> None:
    """Over all outcomes of 6 samples that each succeed with probability 0.3: 1 − 0.7³ is right for k = 3, and
    what 1 − (1 − c/n)³ says is not."""
    from math import comb

    def mean(estimate: list[float]) -> float:
        return sum(comb(6, c) * 0.3**c * 0.7 ** (6 - c) * estimate[c] for c in range(7))

    assert mean([pass_at_k(6, c, 3) for c in range(7)]) == pytest.approx(1 - 0.7**3, abs=1e-12)
    assert abs(mean([1 - (1 - c / 6) ** 3 for c in range(7)]) - (1 - 0.7**3)) > 0.01


@pytest.mark.parametrize(
    ("samples", "successes", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0), (0, 0, 1)]
)
def test_what_is_no_number_is_refused(samples: int, successes: int, k: int) -> None:
    with pytest.raises(ValueError, match="there is no such number"):
        pass_at_k(samples, successes, k)


def test_the_mean_over_tasks_and_its_error() -> None:
    counted = [Counted("a", 4, 0), Counted("b", 4, 1), Counted("c", 4, 4), Counted("d", 2, 1)]
    found = over_tasks(counted, [1, 2, 4, 8])
    at_1 = np.array([0, 0.25, 1, 0.5], dtype=np.float64)
    assert found["1"] == pytest.approx({"value": at_1.mean(), "stderr": at_1.std(ddof=1) / 2, "tasks": 4})
    assert found["2"]["value"] == pytest.approx((0 + 0.5 + 1 + 1) / 4)
    assert found["4"] == pytest.approx(
        {"value": 2 / 3, "stderr": 1 / 3, "tasks": 3}
    )  # d has two samples only
    assert found["8"] == {"value": None, "stderr": None, "tasks": 0}


def test_one_task_has_no_error() -> None:
    assert over_tasks([Counted("a", 2, 1)], [1])["1"] == {"value": 0.5, "stderr": None, "tasks": 1}
