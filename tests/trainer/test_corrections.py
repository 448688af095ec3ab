"""Corrections for the difference between engine and trainer, on the worked differences [0, 0.5, 1]."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from trainer import ppo

OLD = torch.tensor([[0.0, 0.5, 1.0, 9.0]], dtype=torch.float64)
NONE, MASK = torch.zeros_like(OLD), torch.tensor([[1.0, 1.0, 1.0, 0.0]], dtype=torch.float64)
ROOT = math.exp(0.5)


def close(found: Any, expected: Any, tolerance: float = 1e-6) -> None:
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=0, atol=tolerance)


def weights(**wanted: Any) -> Any:
    return ppo.correction(OLD, NONE, MASK, ppo.Correction(**wanted))[0, :3]


def test_truncated_importance_weights() -> None:
    close(weights(cap=2.0), [1, 1.648721, 2])
    close(weights(cap=None), [1, 1, 1])


def test_icepop_keeps_the_weight_inside_of_its_band_and_drops_what_is_outside() -> None:
    close(weights(cap=2.0, mask="token", low=0.5, high=2.0), [1, 1.648721, 0])
    close(weights(cap=None, mask="token", low=1.2, high=3.0), [0, 1, 1])


@pytest.mark.parametrize(("how", "expected"), [("product", 4.481689), ("geometric", 1.648721)])
def test_the_ratio_of_a_row(how: str, expected: float) -> None:
    close(ppo.row_ratio(OLD, NONE, MASK, how), [[expected]])
    assert ppo.row_ratio(OLD, NONE, NONE, how).tolist() == [[1.0]]


def test_weights_of_whole_rows() -> None:
    close(weights(cap=2.0, weight="product"), [2, 2, 2])
    close(weights(cap=10.0, weight="product"), [4.481689] * 3)
    close(weights(cap=2.0, weight="geometric"), [ROOT] * 3)


def test_masks_of_whole_rows() -> None:
    close(weights(cap=None, mask="product", low=0.5, high=2.0), [0, 0, 0])
    close(weights(cap=None, mask="geometric", low=0.5, high=2.0), [1, 1, 1])
    close(weights(cap=2.0, mask="geometric", low=0.5, high=2.0), [1, ROOT, 2])  # token weights, row mask


def test_a_long_row_that_differs_everywhere_stays_finite() -> None:
    found = ppo.row_ratio(torch.full((1, 5000), 3.0), torch.zeros(1, 5000), torch.ones(1, 5000), "product")
    assert found.isfinite().all()


def test_weights_carry_no_gradient() -> None:
    old = OLD.clone().requires_grad_()
    for level in ("token", "product", "geometric"):
        wanted = ppo.Correction(2.0, level, level, 0.5, 2.0)
        assert not ppo.correction(old, NONE, MASK, wanted).requires_grad


@pytest.mark.parametrize("level", ["token", "product", "geometric"])
@pytest.mark.parametrize("masked", ["none", "token", "product", "geometric"])
def test_every_combination_against_numpy(level: str, masked: str) -> None:
    random = np.random.default_rng(5)
    old, rollout = random.normal(size=(6, 8)), random.normal(size=(6, 8))
    mask = (random.random((6, 8)) < 0.7) * 1.0

    def at(how: str, i: int, t: int) -> float:
        delta = (old[i] - rollout[i])[mask[i] > 0]
        token = float(old[i, t] - rollout[i, t])
        return math.exp({"token": token, "product": delta.sum(), "geometric": delta.mean()}[how])

    found = ppo.correction(
        *(torch.tensor(x) for x in (old, rollout, mask)), ppo.Correction(1.5, level, masked, 0.4, 2.5)
    )
    for i, t in zip(*np.nonzero(mask), strict=True):
        kept = masked == "none" or 0.4 <= at(masked, i, t) <= 2.5
        close(found[i, t], min(at(level, i, t), 1.5) * kept, 1e-9)
