"""The output layer in parts, with its own gradient, against autograd over plain logits in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.head import token_scores

N, WIDTH, VOCABULARY = 13, 8, 37


def given(seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    ids = torch.randint(VOCABULARY, (N,), generator=draw)
    found = {"states": tensor(N, WIDTH), "weight": tensor(VOCABULARY, WIDTH), "bias": tensor(VOCABULARY)}
    return found | {"ids": ids, "of_logprob": tensor(N), "of_entropy": tensor(N)}


def plain(x: dict[str, Tensor], temperature: float) -> tuple[Tensor, Tensor]:
    logs = ((x["states"] @ x["weight"].T + x["bias"]) / temperature).log_softmax(-1)
    return logs[torch.arange(N), x["ids"]], -(logs.exp() * logs).sum(-1)


def gradients(x: dict[str, Tensor], pair: tuple[Tensor, Tensor]) -> list[Tensor]:
    loss = (pair[0] * x["of_logprob"]).sum() + (pair[1] * x["of_entropy"]).sum()
    return list(torch.autograd.grad(loss, [x["states"], x["weight"], x["bias"]]))


def live(x: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        name: tensor.to(dtype).requires_grad_() if tensor.is_floating_point() else tensor
        for name, tensor in x.items()
    }


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("logits_at_once", [VOCABULARY * N, VOCABULARY * 5, 1])
def test_values_and_gradients_are_those_of_plain_logits(temperature: float, logits_at_once: int) -> None:
    exact, single = live(given(), torch.float64), live(given(), torch.float32)
    names = ("states", "weight", "bias", "ids")
    found = token_scores(
        *(single[n] for n in names), temperature, with_entropy=True, logits_at_once=logits_at_once
    )
    expected = plain(exact, temperature)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs, atol=2e-6, rtol=2e-6)
    for mine, theirs in zip(gradients(single, found), gradients(exact, expected), strict=True):
        torch.testing.assert_close(mine.double(), theirs, atol=2e-5, rtol=2e-5)


def test_parts_change_no_bit_of_the_values() -> None:
    x = live(given(), torch.float32)
    names = ("states", "weight", "bias", "ids")
    whole, parts = (
        token_scores(*(x[n] for n in names), 1.0, with_entropy=True, logits_at_once=size)
        for size in (1 << 20, VOCABULARY * 4)
    )
    torch.testing.assert_close(whole, parts, atol=1e-6, rtol=1e-6)


def test_without_entropy_there_is_none_and_frozen_weights_get_no_gradient() -> None:
    x = live(given(), torch.float32)
    weight = x["weight"].detach()
    logprobs, entropy = token_scores(x["states"], weight, None, x["ids"], 1.0)
    assert not entropy.any()
    torch.autograd.backward(logprobs.sum())
    assert x["states"].grad is not None and weight.grad is None


def test_no_action_at_all_is_a_sum_over_nothing() -> None:
    x = live(given(), torch.float32)
    logprobs, entropy = token_scores(x["states"][:0], x["weight"], x["bias"], x["ids"][:0], 1.0, True)
    torch.autograd.backward(logprobs.sum() + entropy.sum())
    assert logprobs.shape == entropy.shape == (0,)
    assert x["weight"].grad is not None and not x["weight"].grad.any()


def largest_kept(logits_at_once: int) -> int:
    """Elements of the largest tensor that a forward pass keeps for its backward pass."""
    sizes: list[int] = [0]

    def note(tensor: Tensor) -> Any:
        sizes.append(tensor.numel())
        return tensor

    x = live(given(), torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda packed: packed):
        token_scores(x["states"], x["weight"], None, x["ids"], 1.0, logits_at_once=logits_at_once)
    return max(sizes)


def test_in_parts_no_logits_are_kept() -> None:
    assert largest_kept(VOCABULARY * N) == VOCABULARY * N
    assert largest_kept(VOCABULARY * 5) == VOCABULARY * WIDTH  # the weight itself


def test_half_precision_is_near() -> None:
    x = live(given(), torch.float32)
    exact, _ = token_scores(x["states"], x["weight"], None, x["ids"], 1.0)
    near, _ = token_scores(x["states"], x["weight"], None, x["ids"], 1.0, half=True)
    assert near.dtype == torch.float32
    torch.testing.assert_close(exact, near, atol=0.1, rtol=0.05)
