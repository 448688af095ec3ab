"""Packed rows against padded ones: the same numbers, for policy and critic, values and gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from training_kit import made_episodes

from trainer import packing
from trainer.batch import Batch
from trainer.errors import ModelError
from trainer.model import make_critic, recompute_blocks, score, tiny_policy, value
from trainer.packing import Piece


def pair() -> tuple[torch.nn.Module, torch.nn.Module]:
    """The same policy twice, the second packed."""
    first, second = tiny_policy(0), tiny_policy(0)
    packing.install(second)
    return first, second


@pytest.fixture(scope="module")
def batch() -> Batch:
    return Batch.of(made_episodes(8))


def test_a_row_is_cut_after_its_last_action_and_rows_start_anew() -> None:
    ids = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 0, 0], [9, 9, 9, 9, 9]])
    mask = torch.tensor([[0.0, 0, 1, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0]])
    packed = packing.pack(ids, mask)
    assert packed.ids.tolist() == [[1, 2, 6, 7]]
    assert packed.positions.tolist() == [[0, 1, 0, 1]]
    assert packed.layout.pieces == (Piece(0, 2, 2, 0, True), Piece(2, 1, 3, 1, True))
    assert packed.before.tolist() == [1, 2, 3]


def test_rows_without_any_action_still_make_one_token() -> None:
    packed = packing.pack(torch.tensor([[5, 6], [7, 8]]), torch.zeros(2, 2))
    assert packed.ids.tolist() == [[5]] and packed.layout.pieces == (Piece(0, 1, 1, 0, True),)
    assert not len(packed.before)


def test_a_prompt_of_several_rows_is_there_once() -> None:
    ids = torch.tensor([[1, 2, 3, 4], [7, 8, 9, 0], [1, 2, 5, 6], [1, 2, 3, 0]])
    mask = torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, 0], [0, 0, 1, 1], [0, 0, 1, 0]])
    packed = packing.pack(ids, mask)
    assert packed.ids.tolist() == [[1, 2, 3, 5, 7, 8]]
    assert packed.positions.tolist() == [[0, 1, 2, 2, 0, 1]]
    assert packed.layout.pieces == (
        Piece(0, 2, 2, 1, True),
        Piece(0, 2, 3, 1, False),
        Piece(4, 2, 6, 0, True),
    )
    assert packed.before.tolist() == [1, 2, 5, 1, 3, 1]  # the last row's only action follows the prompt
    assert packed.layout.keys is not None and packed.layout.keys.tolist() == [0, 1, 2, 0, 1, 3, 4, 5]
    assert [ends.tolist() for ends in packed.layout.borders] == [[0, 3, 4, 6], [0, 3, 6, 8]]


@pytest.fixture(scope="module")
def groups() -> Batch:
    """Nine rows of three prompts, mixed, of many lengths; what follows the prompt may begin alike."""
    torch.manual_seed(3)
    ids = torch.randint(0, 250, (9, 30))
    lengths = torch.randint(14, 31, (9,))
    mask = torch.zeros(9, 30)
    for row in range(9):
        prompt = 5 + row % 3
        ids[row, : prompt + 1] = torch.arange(prompt + 1) + 40 * (row % 3)
        mask[row, prompt : prompt + 4] = 1
        mask[row, prompt + 7 : int(lengths[row])] = 1
    one = Batch.of(made_episodes(9))
    return replace(one, ids=ids, mask=mask)


def test_shared_prompts_give_the_scores_and_gradients_of_rows_alone(groups: Batch) -> None:
    padded, packed = pair()
    (expected, theirs), (found, mine) = losses(padded, groups), losses(packed, groups)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    computed = packing.pack(groups.ids, groups.mask).ids.shape[1]
    apart = sum(packing.pack(groups.ids[n : n + 1], groups.mask[n : n + 1]).ids.shape[1] for n in range(9))
    assert computed == apart - 2 * (5 + 6 + 7)


def losses(policy: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
    policy.zero_grad()
    logprobs, entropy = score(policy, batch.ids, batch.mask, 0.7, with_entropy=True)
    torch.autograd.backward((logprobs * torch.cos(logprobs)).sum() / 50 + entropy.mean())
    return torch.stack([logprobs, entropy]).detach(), [
        p.grad.clone() for p in policy.parameters() if p.grad is not None
    ]


@pytest.mark.parametrize("recompute", [False, True])
def test_packed_scores_and_gradients_are_the_padded_ones(batch: Batch, recompute: bool) -> None:
    padded, packed = pair()
    if recompute:
        recompute_blocks(packed)
    (expected, theirs), (found, mine) = losses(padded, batch), losses(packed, batch)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert len(mine) == len(theirs)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_packed_values_are_the_padded_ones(batch: Batch) -> None:
    padded, packed = pair()
    critics = [make_critic(policy) for policy in (padded, packed)]
    for critic in critics:
        critic.head.weight.data = torch.linspace(-1, 1, 96)[None]
    expected, found = (value(critic, batch.ids, batch.mask).detach() for critic in critics)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_row_does_not_see_the_one_before(batch: Batch) -> None:
    _, packed = pair()
    with torch.no_grad():
        together, _ = score(packed, batch.ids, batch.mask, 1.0)
        for row in range(len(batch.ids)):
            alone, _ = score(packed, batch.ids[row : row + 1], batch.mask[row : row + 1], 1.0)
            torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-5)


def test_a_packed_policy_samples_and_saves_as_before(batch: Batch, tmp_path: Any) -> None:
    padded, packed = pair()
    ids = batch.ids[:1, :9]
    with torch.no_grad():
        assert torch.equal(padded(input_ids=ids).logits, packed(input_ids=ids).logits)
        first = packed(input_ids=ids[:, :8], use_cache=True)
        second = packed(input_ids=ids[:, 8:], past_key_values=first.past_key_values)
        torch.testing.assert_close(second.logits, padded(input_ids=ids).logits[:, -1:], atol=1e-5, rtol=1e-5)
    packed.save_pretrained(tmp_path)  # type: ignore[operator]
    assert packing.NAME not in (tmp_path / "config.json").read_text()


def test_grouped_heads_are_packed_as_well() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    packing.install(LlamaForCausalLM(config).eval())  # compares packed with padded itself


def test_a_model_with_windows_is_refused_with_the_remedy() -> None:
    from transformers import MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    qwen = Qwen2ForCausalLM(
        Qwen2Config(**sizes, use_sliding_window=True, sliding_window=4, max_window_layers=0)
    )
    with pytest.raises(ModelError, match=r"sliding.*Set trainer\.packing=false"):
        packing.install(qwen.eval())
    mistral = MistralForCausalLM(MistralConfig(**sizes, sliding_window=4))
    with pytest.raises(ModelError, match=r"Set trainer\.packing=false"):
        packing.install(mistral.eval())
