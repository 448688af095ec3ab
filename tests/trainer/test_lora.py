"""Adapters: at first they change nothing, only they learn, and off they are the reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from training_kit import made_episodes

from trainer import lora
from trainer.batch import Batch
from trainer.errors import ModelError
from trainer.model import make_critic, recompute_blocks, score, tiny_policy, value

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def batch() -> Batch:
    return Batch.of(made_episodes(6))


def adapted_policy(targets: str = lora.ALL) -> torch.nn.Module:
    return lora.inject(tiny_policy(0), rank=4, alpha=8, targets=targets, seed=3)


def spoil(policy: torch.nn.Module) -> None:
    """As if it had learned."""
    for layer in lora.adapted(policy):
        layer.lora_B[lora.ADAPTER].weight.data.normal_(std=0.2)


def test_fresh_adapters_change_no_bit_and_come_from_the_seed(batch: Batch) -> None:
    before = torch.get_rng_state()
    plain, policy, again = tiny_policy(0), adapted_policy(), adapted_policy()
    assert torch.equal(torch.get_rng_state(), before)
    with torch.no_grad():
        expected, found = (score(p, batch.ids, batch.mask, 1.0)[0] for p in (plain, policy))
    assert torch.equal(expected, found)
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), again.parameters(), strict=True))


def test_only_adapters_learn_and_the_output_layer_has_none(batch: Batch) -> None:
    policy = adapted_policy()
    torch.autograd.backward(score(policy, batch.ids, batch.mask, 1.0)[0].sum())
    learning = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert learning and all("lora_" in name for name in learning)
    assert {name for name, p in policy.named_parameters() if p.grad is not None} == learning
    assert len(lora.adapted(policy)) == 2 * 7
    share = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert share < 0.15 * sum(p.numel() for p in policy.parameters())


def test_off_it_is_the_reference_and_then_on_again(batch: Batch) -> None:
    plain, policy = tiny_policy(0), adapted_policy()
    spoil(policy)
    reference = lora.AdapterOff(policy)
    assert not list(reference.parameters())
    with torch.no_grad():
        moved = score(policy, batch.ids, batch.mask, 1.0)[0]
        assert torch.equal(
            score(reference, batch.ids, batch.mask, 1.0)[0], score(plain, batch.ids, batch.mask, 1.0)[0]
        )
        assert torch.equal(score(policy, batch.ids, batch.mask, 1.0)[0], moved)
    assert not torch.equal(moved, score(plain, batch.ids, batch.mask, 1.0)[0])
    assert all(p.requires_grad for n, p in policy.named_parameters() if "lora_" in n)


def test_named_layers_alone_are_adapted_and_wrong_names_are_told() -> None:
    assert len(lora.adapted(adapted_policy("q_proj, v_proj"))) == 2 * 2
    with pytest.raises(ModelError, match="it has down_proj, gate_proj, k_proj"):
        adapted_policy("qkv")


def test_a_critic_of_an_adapted_policy_has_adapters_of_its_own(batch: Batch) -> None:
    policy = adapted_policy()
    critic = recompute_blocks(make_critic(policy))
    torch.autograd.backward(value(critic, batch.ids, batch.mask).sum())  # type: ignore[arg-type]
    learning = [name for name, p in critic.named_parameters() if p.requires_grad]
    assert {"head.weight", "head.bias"} < set(learning) and len(learning) == 2 + 2 * 7 * 2
    mine = {p.data_ptr() for p in critic.parameters() if p.requires_grad}
    assert not mine & {p.data_ptr() for p in policy.parameters()}


def test_the_weights_given_away_are_merged(batch: Batch, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from trainer.weights import save_model

    policy = adapted_policy()
    spoil(policy)
    save_model(policy, tmp_path / "merged")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert [name for name, _ in found.named_parameters()] == [
        name for name, _ in tiny_policy(0).named_parameters()
    ]
    with torch.no_grad():
        mine, theirs = (score(p, batch.ids, batch.mask, 1.0)[0] for p in (policy, found))
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
