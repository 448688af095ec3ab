"""Models, and what PPO asks of them, against plain forward passes and NumPy in float64."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from training_kit import made_episodes

from trainer import optim
from trainer.batch import Batch
from trainer.errors import ModelError
from trainer.head import LOGITS_AT_ONCE, token_scores
from trainer.model import ByteTokenizer, Critic, load_policy, make_critic, score, tiny_policy, value
from trainer.weights import save_model


@pytest.fixture(scope="module")
def policy() -> torch.nn.Module:
    return tiny_policy(0)


@pytest.fixture(scope="module")
def batch() -> Batch:
    return Batch.of(made_episodes(6))


def test_the_tiny_model_has_the_size_that_it_says(policy: torch.nn.Module) -> None:
    assert sum(p.numel() for p in policy.parameters()) == 252_512
    assert sum(p.numel() for p in make_critic(policy).parameters()) == 252_609


def test_the_seed_alone_makes_the_tiny_model() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, second, other = tiny_policy(7), tiny_policy(7), tiny_policy(8)
    assert torch.equal(torch.get_rng_state(), before)
    pairs = list(zip(first.parameters(), second.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not all(torch.equal(a, c) for a, _, c in pairs)


def test_bytes_are_their_own_ids() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("a\né") == [97, 10, 195, 169]
    assert tokenizer.decode([97, 256, 10, 319, 195, 169]) == "a\né"


@torch.no_grad()
def test_scores_are_those_of_one_sequence_alone(policy: torch.nn.Module, batch: Batch) -> None:
    """Padding, other rows and the gathering of action places change nothing; logits[t-1] score token t."""
    found, entropy = score(policy, batch.ids, batch.mask, temperature=0.7, with_entropy=True)
    for row, length in enumerate(batch.lengths.tolist()):
        ids, mask = batch.ids[row, :length], batch.mask[row, :length].bool()
        logits = policy(input_ids=ids[None]).logits[0].double().numpy() / 0.7
        z = logits - logits.max(-1, keepdims=True)
        logprobs = z - np.log(np.exp(z).sum(-1, keepdims=True))
        expected = np.array([0.0] + [logprobs[t - 1, ids[t]] for t in range(1, length)])
        spread = np.concatenate([[0.0], -(np.exp(logprobs) * logprobs).sum(-1)[:-1]])
        np.testing.assert_allclose(found[row, :length], np.where(mask, expected, 0), atol=2e-5)
        np.testing.assert_allclose(entropy[row, :length], np.where(mask, spread, 0), atol=2e-5)
        assert not found[row, length:].any()


def test_temperature_divides_the_logits() -> None:
    """The worked pair: logits [0, ln 3]."""
    weight = torch.tensor([[0.0], [math.log(3)]])
    ids, states = torch.tensor([0, 1]), torch.ones(2, 1)
    for temperature, expected in ((0.7, [-1.758545, -0.189099]), (1.0, [-1.386294, -0.287682])):
        found, entropy = token_scores(states, weight, None, ids, temperature, with_entropy=True)
        np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(entropy, [0.562335] * 2, atol=1e-6)


def test_logits_in_parts_give_the_same_loss_and_gradient(policy: torch.nn.Module, batch: Batch) -> None:
    gradients = []
    for size in (LOGITS_AT_ONCE, 320 * 7):
        policy.zero_grad()
        logprobs, _ = score(policy, batch.ids, batch.mask, 1.0, logits_at_once=size)
        torch.autograd.backward((logprobs**2).sum())
        gradients.append([p.grad.clone() for p in policy.parameters() if p.grad is not None])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4)


def test_a_fresh_critic_says_zero_everywhere(policy: torch.nn.Module, batch: Batch) -> None:
    critic = make_critic(policy)
    assert not value(critic, batch.ids, batch.mask).any()
    critic.head.bias.data += 0.5
    found = value(critic, batch.ids, batch.mask).detach()
    assert torch.equal(found, 0.5 * batch.mask)


def test_the_critic_shares_no_weight_with_the_policy(policy: torch.nn.Module) -> None:
    critic: Critic = make_critic(policy)
    mine = {p.data_ptr() for p in critic.parameters()}
    assert not mine & {p.data_ptr() for p in policy.parameters()}


def test_a_saved_policy_is_the_same_bit_for_bit(tmp_path: Path, policy: torch.nn.Module) -> None:
    save_model(policy, tmp_path / "saved")
    assert not list(tmp_path.rglob("*.bin"))
    found = load_policy(tmp_path / "saved").state_dict()
    assert all(torch.equal(found[name], x) for name, x in policy.state_dict().items())


def test_what_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no model"):
        load_policy(tmp_path)


def test_a_model_that_reshapes_its_logits_is_refused(tmp_path: Path) -> None:
    from transformers import GraniteConfig, GraniteForCausalLM

    config = GraniteConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, logits_scaling=4.0,
    )  # fmt: skip
    GraniteForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="changes its logits"):
        load_policy(tmp_path)


# --- the optimiser -----------------------------------------------------------------------------------


def test_one_rank_with_inf_means_that_no_rank_moves() -> None:
    ranks = [torch.nn.Parameter(torch.zeros(3)) for _ in range(2)]
    optimizers = [optim.adamw([p], lr=0.1, weight_decay=0.0, eps=1e-8) for p in ranks]
    ranks[0].grad, ranks[1].grad = torch.ones(3), torch.full((3,), torch.inf)
    total = optim.squared_norm(optimizers[0]) + optim.squared_norm(optimizers[1])
    for parameter, optimizer in zip(ranks, optimizers, strict=True):
        norm, moved = optim.step(optimizer, total, max_norm=1.0)
        assert not moved and not math.isfinite(norm)
        assert not parameter.any() and parameter.grad is None
        assert not optimizer.state_dict()["state"]


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        (("constant", 0, 0.0), [1, 1, 1, 1, 1]),
        (("constant", 3, 0.0), [1 / 4, 2 / 4, 3 / 4, 1, 1]),
        (("linear", 0, 0.2), [1, 0.8, 0.6, 0.4, 0.2]),
        (("linear", 2, 0.0), [1 / 3, 2 / 3, 1, 0.5, 0]),
        (("cosine", 0, 0.0), [1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5, 0]),
    ],
)
def test_shares_of_the_learning_rate(plan: tuple[str, int, float], expected: list[float]) -> None:
    found = [optim.share_of_rate(step, 5, *plan) for step in range(5)]
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_a_run_of_one_step_or_longer_than_planned_has_a_rate() -> None:
    assert optim.share_of_rate(0, 1, "linear", 0, 0.1) == 1
    assert optim.share_of_rate(9, 5, "cosine", 0, 0.1) == pytest.approx(0.1)


def test_gradients_are_clipped_to_the_global_norm() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    parameter.grad = torch.tensor([3.0, 4.0])
    assert optim.step(optimizer, optim.squared_norm(optimizer), max_norm=1.0) == (5.0, True)
    np.testing.assert_allclose(parameter.detach(), [-0.6, -0.8], atol=1e-5)


def test_adamw_against_numpy() -> None:
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = optim.adamw([parameter], lr=0.1, weight_decay=0.01, eps=1e-8)
    x, m, v = np.array([1.0, -2.0]), np.zeros(2), np.zeros(2)
    for t, g in enumerate(([0.3, -0.1], [0.2, 0.4]), start=1):
        parameter.grad = torch.tensor(g)
        optim.step(optimizer, optim.squared_norm(optimizer), max_norm=10.0)
        gradient = np.array(g)
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        x = x * (1 - 0.1 * 0.01) - 0.1 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    np.testing.assert_allclose(parameter.detach(), x, atol=1e-6)
