"""Sequences one after the other in a single row, without padding: what `trainer.packing` switches on.

What it is
    `pack` drops from padded rows whatever no action depends on (padding, and what was observed after the last
    action) and lines up the rest. Every layer but attention sees tokens one by one anyway; attention goes
    over each sequence alone, so that it costs what the sequences cost, and never looks across a border.
    On GPUs in half precision torch's variable-length kernel does it in one call.

How to use it
    install(policy)                       # before a critic is made from it
    logprobs, entropy = score(policy, ids, mask, temperature)        # `trainer.model` packs by itself

What it does not do
    No sliding windows, no capped or sunk attention: `install` proves on random tokens that the packed form
    gives what the padded one gives, and refuses a model where it does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.errors import ModelError

NAME = "orchestrate_packed"
TOLERANCE = 1e-4  # in float32; wrong attention is wrong by far more


@dataclass(frozen=True)
class Packed:
    """Rows in a row.

    ids, positions [1, tokens]    positions start from 0 in each sequence
    lengths                       tokens of each sequence, in order; adds up to tokens
    before [tokens]               True where the next token is an action
    """

    ids: Tensor
    positions: Tensor
    lengths: list[int]
    before: Tensor

    def arguments(self) -> dict[str, Any]:
        """For the trunk of a transformers model, which hands on what it does not know to its attention."""
        return {"input_ids": self.ids, "position_ids": self.positions, "packed_lengths": self.lengths}


def pack(ids: Tensor, mask: Tensor) -> Packed:
    """Padded rows → one row. ids, mask [rows, tokens]; there is always at least one token."""
    places = torch.arange(ids.shape[1], device=ids.device)
    last = (places * (mask > 0)).amax(dim=1)  # the token at `last` is predicted, not read
    if not bool((last > 0).any()):
        last[0] = 1  # nothing to compute, but ranks that compute together all make the call
    kept = places < last[:, None]
    follows = torch.nn.functional.pad(mask[:, 1:] > 0, (0, 1))
    positions = places.expand_as(ids)[kept]
    return Packed(ids[kept][None], positions[None], [n for n in last.tolist() if n], follows[kept])


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    packed_lengths: list[int] | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: [1, heads, tokens, width] → [1, tokens, heads, width].

    Without `packed_lengths` (sampling, one plain forward pass) it is transformers' own.
    """
    if packed_lengths is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **others
        )
        return found
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        return _varlen(query, key, value, scaling, packed_lengths), None
    parts = zip(*(torch.split(x, packed_lengths, dim=2) for x in (query, key, value)), strict=True)
    grouped = query.shape[1] != key.shape[1]
    out = [
        functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)
        for q, k, v in parts
    ]
    return torch.cat(out, dim=2).transpose(1, 2), None


def _varlen(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, lengths: list[int]) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    borders = torch.tensor([0, *lengths]).cumsum(0).to(query.device, torch.int32)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    longest, grouped = max(lengths), query.shape[1] != key.shape[1]
    found: Any = varlen_attn(
        q, k, v, borders, borders, longest, longest, scale=scaling, window_size=(-1, 0), enable_gqa=grouped
    )
    out: Tensor = found[None]
    return out


def install(policy: Any) -> None:
    """Let `policy`, and every copy of it, be computed packed. Raises ModelError when it cannot be."""
    from transformers import AttentionInterface

    kinds = set(getattr(policy.config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise _refusal(policy, f"it has layers of the kinds {', '.join(sorted(kinds))}")
    AttentionInterface.register(NAME, attention)
    whole = _probe(policy)
    policy.set_attn_implementation(NAME)
    if not torch.allclose(whole, _probe(policy), atol=TOLERANCE, rtol=TOLERANCE):
        policy.set_attn_implementation("sdpa")
        raise _refusal(policy, "packed it computes something else than padded")


def installed(model: Any) -> bool:
    """Whether `install` was called on it, or on what it is a copy of."""
    return bool(getattr(model.config, "_attn_implementation", "") == NAME)


@torch.no_grad()
def _probe(policy: Any) -> Tensor:
    """States before the actions of two made-up rows, packed or padded as the policy is."""
    from trainer.model import states_before, trunk_of

    device, vocabulary = next(policy.parameters()).device, policy.get_input_embeddings().num_embeddings
    ids = (torch.arange(48, device=device).reshape(2, 24) * 7 + 3) % vocabulary
    mask = torch.zeros(2, 24, device=device)
    mask[0, 3:9], mask[1, 5:24:2] = 1, 1
    return states_before(trunk_of(policy), ids, mask).float()


def _refusal(policy: Any, why: str) -> ModelError:
    return ModelError(f"{type(policy).__name__} cannot be packed: {why}. Set trainer.packing=false")
