"""Losses and how they become one number: by hand, by finite differences, and under any split."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from orchestrator.schema_algorithm import Algorithm
from trainer import ppo

LOSSES, MASK = torch.tensor([[1.0, 1.0], [3.0, 77.0]]), torch.tensor([[1.0, 1.0], [1.0, 0.0]])


def close(found: Any, expected: Any, tolerance: float = 1e-6) -> None:
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=0, atol=tolerance)


# --- per token ---------------------------------------------------------------------------------------


def test_masked_places_must_be_zero_on_both_sides() -> None:
    close(ppo.ratio(torch.zeros(1), torch.zeros(1)), [1.0])
    close(ppo.ratio(torch.zeros(1), torch.ones(1)), [math.exp(-1)])  # 1 as filling on one side


def test_truncated_sampling_would_multiply_every_ratio_by_the_mass_that_was_kept() -> None:
    true = torch.tensor([0.5, 0.3, 0.2]).double().log()
    kept = true[:2] - true[:2].exp().sum().log()  # what an engine with top_p = 0.8 says
    close(kept, [-0.470004, -0.980829])
    close(true[:2], [-0.693147, -1.203973])
    close(ppo.ratio(true[:2], kept), [0.8, 0.8])
    ten = torch.ones(1, 10)
    close(ppo.row_ratio(true[0] * ten, kept[0] * ten, ten, "product"), [[0.107374]])


def test_no_key_of_the_configuration_asks_for_truncated_sampling() -> None:
    from orchestrator.schema_training import Rollout

    assert not {"top_p", "top_k", "min_p", "repetition_penalty"} & set(Rollout.model_fields)


@pytest.mark.parametrize(
    ("rho", "advantage", "clip"),
    [
        (1.5, 1.0, "high"),
        (1.2, 1.0, None),
        (0.5, 1.0, None),
        (0.5, -1.0, "low"),
        (1.5, -1.0, None),
        (5.0, -1.0, "dual"),
        (5.0, 0.0, None),
    ],
)
def test_a_token_counts_as_clipped_where_its_gradient_is_gone(
    rho: float, advantage: float, clip: str | None
) -> None:
    logprobs = torch.tensor([rho]).double().log().requires_grad_()
    given = torch.tensor([advantage]).double()
    bounds = (0.2, 0.28, 3.0)
    torch.autograd.backward(ppo.policy_loss(logprobs, torch.zeros(1), given, *bounds).sum())
    assert logprobs.grad is not None
    assert (logprobs.grad.item() == 0) == (clip is not None or advantage == 0)
    found = ppo.clipped_tokens(torch.tensor([rho]), given, *bounds)
    assert {name for name, x in found.items() if x.item()} == ({f"clipped_{clip}"} if clip else set())


def gradcheck(function: Callable[..., Tensor], *inputs: Tensor) -> bool:
    """Whether the gradient is that of finite differences, in float64."""
    return bool(torch.autograd.gradcheck(function, tuple(x.double().requires_grad_() for x in inputs)))


def test_gradients_are_those_of_finite_differences() -> None:
    draw = torch.Generator().manual_seed(0)
    x, y, z = (torch.randn(4, 5, generator=draw).double() for _ in range(3))
    assert gradcheck(lambda lp: ppo.policy_loss(lp, y, z, 0.2, 0.28, 3.0), x)
    assert gradcheck(lambda v: ppo.value_loss(v, y, z, 0.2), x)
    assert gradcheck(ppo.entropy, x)
    for name in ("k1", "k2", "k3"):
        assert gradcheck(partial(ppo.KL[name], reference=y), x)
    mask, totals = (z > 0).double(), torch.tensor([7.0, 3.0])
    for how in ppo.AGGREGATIONS:
        assert gradcheck(lambda v, how=how: ppo.aggregate(v, mask, how, totals, 9.0), x)


def test_the_gradient_of_the_entropy_is_minus_p_times_log_p_plus_h() -> None:
    logits = torch.tensor([0.0, math.log(3)], dtype=torch.float64, requires_grad=True)
    torch.autograd.backward(ppo.entropy(logits))
    p = np.array([0.25, 0.75])
    assert logits.grad is not None
    close(logits.grad, -p * (np.log(p) - (p * np.log(p)).sum()), 1e-12)


# --- aggregation -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("token-mean", 1.666667),
        ("seq-mean-token-sum", 2.5),
        ("seq-mean-token-mean", 2.0),
        ("constant", 0.625),
    ],
)
def test_the_worked_losses(how: str, expected: float) -> None:
    close(ppo.aggregate(LOSSES, MASK, how, ppo.totals_of(MASK), 4.0), expected)


def test_every_aggregation_can_be_configured() -> None:
    assert Algorithm.model_fields["aggregation"].choices == ppo.AGGREGATIONS


def numpy_aggregate(x: Any, mask: Any, how: str, constant: float) -> float:
    """Row by row, in float64; rows without an action are not there."""
    rows = [values[m > 0] for values, m in zip(x, mask, strict=True) if m.any()]
    if how == "token-mean":
        return float(np.concatenate(rows).mean())
    parts = [values.mean() if how == "seq-mean-token-mean" else values.sum() for values in rows]
    return float(np.mean(parts) / (constant if how == "constant" else 1.0))


@pytest.mark.parametrize("how", ppo.AGGREGATIONS)
def test_loss_and_gradient_are_the_same_under_any_split_and_padding(how: str) -> None:
    """Rows cut into micro-batches on ranks, at random, with random columns of padding between them."""
    random = np.random.default_rng(4)
    for _ in range(30):
        x, mask = random.normal(size=(7, 6)), (random.random((7, 6)) < 0.6) * 1.0
        mask[3] = 0
        per_token = torch.tensor(x, requires_grad=True)
        totals = ppo.totals_of(torch.tensor(mask))
        found = torch.zeros(())
        for rows in np.array_split(random.permutation(7), random.integers(1, 8)):
            wide = torch.nn.functional.pad(per_token[rows], (0, int(random.integers(0, 4))), value=torch.nan)
            padded = torch.nn.functional.pad(torch.tensor(mask[rows]), (0, wide.shape[1] - 6))
            found = found + ppo.aggregate(wide, padded, how, totals, 11.0)
        torch.autograd.backward(found)
        close(found.detach(), numpy_aggregate(x, mask, how, 11.0), 1e-12)
        whole = torch.tensor(x, requires_grad=True)
        torch.autograd.backward(ppo.aggregate(whole, torch.tensor(mask), how, totals, 11.0))
        assert per_token.grad is not None
        close(per_token.grad, whole.grad, 1e-12)


@pytest.mark.parametrize("how", ppo.AGGREGATIONS)
def test_what_is_not_finite_at_masked_places_reaches_neither_loss_nor_gradient(how: str) -> None:
    x = torch.tensor([[1.0, torch.nan], [torch.inf, torch.nan]], requires_grad=True)
    mask = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    loss = ppo.aggregate(x, mask, how, ppo.totals_of(mask), 1.0)
    torch.autograd.backward(loss)
    assert loss.item() == 1.0 and x.grad is not None and x.grad.tolist() == [[1.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("how", ppo.AGGREGATIONS)
def test_nothing_to_learn_from_is_a_loss_of_zero(how: str) -> None:
    nothing = torch.zeros(2, 3)
    assert ppo.aggregate(torch.ones(2, 3), nothing, how, ppo.totals_of(nothing), 5.0) == 0.0
