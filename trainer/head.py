"""From hidden states to log-probabilities and entropies, without all the logits at once.

What it is
    The logits of a step are its largest tensors: 32 thousand tokens of a vocabulary of 152 thousand take
    19 GB in float32. `token_scores` makes them for a part of the tokens at a time, uses them in place, and
    drops them; the backward pass makes them again, or, when all fit into one part, uses the kept ones. The
    gradient is written down here, so that neither pass holds more than two tensors of a part's size.

How to use it
    logprobs, entropy = token_scores(states, head.weight, head.bias, ids, temperature=1.0, with_entropy=True)

What it does not do
    No model, no masks: one state and one id per place. Everything after the matrix product is float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LOGITS_AT_ONCE = 1 << 28  # elements; in float32 a gigabyte


def token_scores(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    temperature: float,
    with_entropy: bool = False,
    half: bool = False,
    logits_at_once: int = LOGITS_AT_ONCE,
) -> tuple[Tensor, Tensor]:
    """Log-probability of `ids` and entropy (nats) under softmax(weight·state ÷ temperature).

    states [n, width], weight [vocabulary, width], ids [n] → two float32 tensors [n]. Entropies are 0 unless
    asked for. `half` multiplies in bfloat16.
    """
    dtype = torch.bfloat16 if half else weight.dtype
    size = max(1, logits_at_once // weight.shape[0])
    found: tuple[Tensor, Tensor] = _TokenScores.apply(  # type: ignore[no-untyped-call]
        states.to(dtype), weight.to(dtype), bias, ids, temperature, with_entropy, size
    )
    return found


def _log_softmax(states: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    """[n, vocabulary] in float32."""
    logits = torch.nn.functional.linear(states, weight, None if bias is None else bias.to(states.dtype))
    logits = logits.float() if temperature == 1.0 else logits.float().div_(temperature)
    return logits.sub_(logits.logsumexp(-1, keepdim=True))


def _entropy(logs: Tensor) -> Tensor:
    return logs.exp().mul_(logs).sum(-1).neg_()


class _TokenScores(torch.autograd.Function):
    """z = (W·x + b)/T, l = z - log Σ eᶻ, s = l[id], H = -Σ eˡ·l.

    ∂s/∂z = 1[id] - eˡ and ∂H/∂z = -eˡ·(l + H).
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        temperature: float,
        with_entropy: bool,
        size: int,
    ) -> tuple[Tensor, Tensor]:
        keep = len(ids) <= size and any(ctx.needs_input_grad)
        logprobs, entropy, kept = [], [], None
        for part, chosen in zip(torch.split(states, size), torch.split(ids, size), strict=True):
            logs = _log_softmax(part, weight, bias, temperature)
            logprobs.append(logs.gather(1, chosen[:, None])[:, 0])
            entropy.append(_entropy(logs) if with_entropy else logs.new_zeros(len(part)))
            kept = logs if keep else None
        entropies = torch.cat(entropy)
        ctx.save_for_backward(states, weight, bias, ids, entropies, kept)
        ctx.settings = temperature, with_entropy, size
        return torch.cat(logprobs), entropies

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, bias, ids, entropies, kept = ctx.saved_tensors
        temperature, with_entropy, size = ctx.settings
        wants_states, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        of_states, of_weight = [], torch.zeros_like(weight) if wants_weight else None
        of_bias = torch.zeros_like(bias) if wants_bias else None
        columns = (torch.split(x, size) for x in (states, ids, entropies, *upstream))
        for part, chosen, spread, g_logprob, g_entropy in zip(*columns, strict=True):
            logs = kept if kept is not None else _log_softmax(part, weight, bias, temperature)
            slope = _slope(logs, chosen, g_logprob, (g_entropy, spread) if with_entropy else None)
            if of_bias is not None:
                of_bias += slope.sum(0).div_(temperature)
            slope = slope.div_(temperature).to(states.dtype)
            if wants_states:
                of_states.append(slope @ weight)
            if of_weight is not None:
                of_weight.addmm_(slope.t(), part)
        return (torch.cat(of_states) if wants_states else None, of_weight, of_bias, *([None] * 4))


def _slope(logs: Tensor, ids: Tensor, g_logprob: Tensor, spread: tuple[Tensor, Tensor] | None) -> Tensor:
    """Gradient by z·T, [n, vocabulary], a new tensor."""
    p = logs.exp()
    if spread is None:
        out = p.mul_(-g_logprob[:, None])
    else:  # -p·(g + g_H·(l + H))
        g_entropy, entropy = spread
        inner = torch.addcmul((g_logprob + g_entropy * entropy)[:, None], logs, g_entropy[:, None])
        out = p.mul_(inner).neg_()
    return out.scatter_add_(1, ids[:, None], g_logprob[:, None])
