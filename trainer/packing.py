"""Sequences one after the other in a single row, without padding: what `trainer.packing` switches on.

What it is
    `pack` drops from padded rows whatever no action depends on (padding, and what was observed after the last
    action) and lines up the rest. Rows that begin with the same prompt, as the rollouts of a group do, have
    it once between them: each layer computes it once, and attention lets each of them look back at it. Every
    layer but attention sees tokens one by one anyway; attention goes over each sequence alone and never looks
    across a border. On GPUs in half precision torch's variable-length kernel does it in one call.

How to use it
    install(policy)                       # before a critic is made from it
    logprobs, entropy = score(policy, ids, mask, temperature)        # `trainer.model` packs by itself

What it does not do
    Nothing after the first action is shared, however alike two episodes go on. No sliding windows, no capped
    or sunk attention: `install` proves on random tokens that the packed form gives what the padded one gives,
    and refuses a model where it does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.errors import ModelError

NAME = "orchestrate_packed"
TOLERANCE = 1e-4  # in float32; wrong attention is wrong by far more


class Piece(NamedTuple):
    """Where a sequence lies in the row: its prompt, which others may share, and what is its own. `first` of
    those that share it, whose own part follows right behind it."""

    prompt_at: int
    prompt: int
    at: int
    length: int
    first: bool

    def of(self, x: Tensor) -> Tensor:
        """The whole sequence out of [1, heads, tokens, width]."""
        if self.at == self.prompt_at + self.prompt:
            return x[:, :, self.prompt_at : self.at + self.length]
        prompt = x[:, :, self.prompt_at : self.prompt_at + self.prompt]
        return torch.cat([prompt, x[:, :, self.at : self.at + self.length]], dim=2)

    @property
    def asks(self) -> int:
        """Tokens that are computed for it."""
        return self.length + self.prompt * self.first


@dataclass(frozen=True)
class Layout:
    """The sequences of a row for which something is computed, in its order."""

    pieces: Sequence[Piece]
    device: torch.device

    @cached_property
    def keys(self) -> Tensor | None:
        """[tokens of all sequences] Where what each of them looks at lies; None where nothing is shared."""
        if all(piece.first for piece in self.pieces):
            return None
        places = [
            torch.arange(start, start + size)
            for piece in self.pieces
            for start, size in ((piece.prompt_at, piece.prompt), (piece.at, piece.length))
        ]
        return torch.cat(places).to(self.device)

    @cached_property
    def borders(self) -> tuple[Tensor, Tensor]:
        """Ends of the sequences among what asks and what is asked, from 0 on, [sequences + 1] each."""
        return self._ends([piece.asks for piece in self.pieces]), self._ends(
            [piece.prompt + piece.length for piece in self.pieces]
        )

    def _ends(self, sizes: list[int]) -> Tensor:
        return torch.tensor([0, *sizes]).cumsum(0).to(self.device, torch.int32)


@dataclass(frozen=True)
class Packed:
    """Rows in a row.

    ids, positions [1, tokens]    positions start from 0 in each sequence
    layout                        where each sequence lies
    before [actions]              of each action, row by row, the place of the token before it
    """

    ids: Tensor
    positions: Tensor
    layout: Layout
    before: Tensor

    def arguments(self) -> dict[str, Any]:
        """For the trunk of a transformers model, which hands on what it does not know to its attention."""
        return {"input_ids": self.ids, "position_ids": self.positions, "packed": self.layout}


def pack(ids: Tensor, mask: Tensor) -> Packed:
    """Padded rows → one row. ids, mask [rows, tokens]; there is always at least one token."""
    places = torch.arange(ids.shape[1], device=ids.device)
    acts = mask > 0
    last = (places * acts).amax(dim=1)  # the token at `last` is predicted, not read
    if not bool((last > 0).any()):
        last[0] = 1  # nothing to compute, but ranks that compute together all make the call
    first = torch.where(acts.any(dim=1), acts.int().argmax(dim=1), last)
    pieces = dict(_arranged(ids.tolist(), first.tolist(), last.tolist()))
    of_prompt, of_own = torch.zeros_like(last), torch.zeros_like(last)
    for row, piece in pieces.items():
        of_prompt[row], of_own[row] = piece.prompt_at, piece.at - piece.prompt
    where = places + torch.where(places < first[:, None], of_prompt[:, None], of_own[:, None])
    kept = places < last[:, None]
    packed = ids.new_zeros(2, int(where[kept].max()) + 1)
    packed[0, where[kept]], packed[1, where[kept]] = ids[kept], places.expand_as(ids)[kept]
    layout = Layout(tuple(piece for piece in pieces.values() if piece.asks), ids.device)
    return Packed(packed[:1], packed[1:], layout, where[functional.pad(acts[:, 1:], (0, 1))])


def _arranged(ids: list[list[int]], first: list[int], last: list[int]) -> Iterator[tuple[int, Piece]]:
    """(row, where it goes), those with one prompt one after the other; rows without actions go nowhere."""
    families: dict[tuple[int, ...], list[int]] = {}
    for row, (line, start, end) in enumerate(zip(ids, first, last, strict=True)):
        if end:
            families.setdefault(tuple(line[:start]), []).append(row)
    at = 0
    for prompt, rows in families.items():
        prompt_at, at = at, at + len(prompt)
        for row in rows:
            own = last[row] - first[row]
            yield row, Piece(prompt_at, len(prompt), at, own, row == rows[0])
            at += own


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    packed: Layout | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: [1, heads, tokens, width] → [1, tokens, heads, width].

    Without `packed` (sampling, one plain forward pass) it is transformers' own.
    """
    if packed is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **others
        )
        return found
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        return _varlen(query, key, value, scaling, packed), None
    grouped = query.shape[1] != key.shape[1]
    out = []
    for piece in packed.pieces:  # a shared prompt asks again, for nothing: a mask would cost more than it
        q, k, v = (piece.of(x) for x in (query, key, value))
        seen = functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped
        )
        out.append(seen[:, :, -piece.asks :])
    return torch.cat(out, dim=2).transpose(1, 2), None


def _varlen(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, packed: Layout) -> Tensor:
    """Where more is asked than asks, the kernel takes what asks for the end of it."""
    from torch.nn.attention.varlen import varlen_attn

    asks, asked = packed.borders
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if packed.keys is not None:
        k, v = k[packed.keys], v[packed.keys]
    most = [
        max(column) for column in zip(*((p.asks, p.prompt + p.length) for p in packed.pieces), strict=True)
    ]
    grouped = query.shape[1] != key.shape[1]
    found: Any = varlen_attn(
        q, k, v, asks, asked, *most, scale=scaling, window_size=(-1, 0), enable_gqa=grouped
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
    """States before the actions of made-up rows, two of them with one prompt, packed or padded as the policy
    is."""
    from trainer.model import states_before, trunk_of

    device, vocabulary = next(policy.parameters()).device, policy.get_input_embeddings().num_embeddings
    ids = (torch.arange(72, device=device).reshape(3, 24) * 7 + 3) % vocabulary
    ids[2, :5] = ids[1, :5]
    mask = torch.zeros(3, 24, device=device)
    mask[0, 3:9], mask[1, 5:24:2], mask[2, 5:20] = 1, 1, 1
    return states_before(trunk_of(policy), ids, mask).float()


def _refusal(policy: Any, why: str) -> ModelError:
    return ModelError(f"{type(policy).__name__} cannot be packed: {why}. Set trainer.packing=false")
