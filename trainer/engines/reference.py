"""The trainer's own word on a sample: log-probabilities of the live module, by one plain forward pass.

What it is
    What both engines are measured against after a weight sync (`Engine.probe`).

What it does not do
    No batching, no gradient; it is for one short sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

PROBE_TOKENS = 16


def logprobs(model: nn.Module, prompt: list[int], ids: list[int], temperature: float) -> Tensor:
    """Log-probabilities, shape [len(ids)], float32, of `ids` after `prompt`, at `temperature`."""
    device = next(model.parameters()).device
    whole = torch.tensor([prompt + ids], device=device)
    with torch.no_grad():
        logits: Tensor = model(input_ids=whole).logits[0, len(prompt) - 1 : -1].float()
    scores = (logits / temperature).log_softmax(-1)
    return scores.gather(1, whole[0, len(prompt) :, None])[:, 0].cpu()


def difference(
    model: nn.Module,
    prompt: list[int],
    ids: list[int],
    engine: list[float],
    temperature: float,
    exact: bool = True,
) -> float:
    """How far the engine's log-probabilities are from the module's, in nats.

    The largest difference when the engine is `exact` (float32). In half precision single tokens are
    noisy by themselves, so there it is the mean, which still jumps when weights are stale.
    """
    gap = (logprobs(model, prompt, ids, temperature) - torch.tensor(engine)).abs()
    return float(gap.max() if exact else gap.mean())
