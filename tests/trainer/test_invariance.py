"""One optimiser step is the same whatever micro-batches, padding and ranks it is cut into: losses, gradients.

Ranks are threads, each with models of its own and a part of the rows; what they would exchange they do, and
gradients are averaged over them, as data parallelism has it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from ranks_kit import together
from torch import Tensor
from training_kit import made_episodes, small_learner

from orchestrator.schema import Config
from trainer import ppo
from trainer.batch import Batch, MiniBatch, divide
from trainer.episode import Episode, Status
from trainer.learner import Learner
from trainer.model import tiny_policy
from trainer.ranks import Ranks
from trainer.stats import Numbers

EVERYTHING: dict[str, Any] = {"entropy_coef": 0.01, "importance_mask": "token"}


def config(**algorithm: Any) -> Config:
    wanted = EVERYTHING | {"kl_coef": 0.1} | algorithm
    return Config.model_validate({"model": {"dtype": "float32"}, "algorithm": wanted})


def episodes() -> list[Episode]:
    """Three prompts, rewards of all kinds, engine log-probabilities that are a little off."""
    found = made_episodes(10)
    draw = torch.Generator().manual_seed(9)
    for number, episode in enumerate(found):
        episode.group, episode.reward = number % 3, float(number % 4) / 2
        noise = torch.randn(len(episode.ids), generator=draw).tolist()
        episode.logprobs = [
            m * (x + 0.3 * e) for m, x, e in zip(episode.mask, episode.logprobs, noise, strict=True)
        ]
    return found


@dataclass
class Watching(Learner):
    """Keeps the gradients of its steps, averaged over the ranks, and moves nothing."""

    gradients: list[Tensor] = field(default_factory=list)

    def _move(self, train_policy: bool) -> Numbers:
        models = [self.policy, *([self.critic] if self.critic is not None else [])]
        every = torch.cat([p.grad.flatten() for m in models for p in m.parameters() if p.grad is not None])
        self.gradients.append(self.ranks.sum(every.double()) / self.ranks.size)
        for model in models:
            model.zero_grad()
        return {"skipped": 0.0}


@cache
def elsewhere() -> dict[str, Tensor]:
    """Weights of another policy than the one that sampled."""
    return tiny_policy(2).state_dict()


def made(kind: type[Learner], wanted: Config, count: int) -> list[Any]:
    """Equal learners, one for each rank; made one after the other, for they draw from one generator."""
    inner = [small_learner(wanted, seed=1) for _ in range(count)]
    return [kind(**{name: getattr(i, name) for name in Learner.__dataclass_fields__}) for i in inner]


Step = tuple[Numbers, Tensor]


def stepped(learner: Watching, batch: Batch, division: list[MiniBatch]) -> Step:
    """One minibatch, from a policy that has already left the one that sampled."""
    row = learner.prepare(batch, division)
    learner.policy.load_state_dict(elsewhere())
    row |= learner.update(batch, division, train_policy=True)
    return row, learner.gradients[0]


def alone(wanted: Config, batch: Batch, division: list[MiniBatch]) -> Step:
    return stepped(made(Watching, wanted, 1)[0], batch, division)


def on_ranks(wanted: Config, batches: list[Batch]) -> list[Step]:
    """The same step on as many ranks as there are batches."""
    learners: list[Watching] = made(Watching, wanted, len(batches))
    elsewhere()

    def work(ranks: Ranks) -> Step:
        learner, batch = learners[ranks.rank], batches[ranks.rank]
        learner.ranks = ranks
        return stepped(learner, batch, divide(batch.lengths, 1, 60, ranks=ranks))

    return together(len(batches), work)


def agree(found: tuple[Numbers, Tensor], expected: tuple[Numbers, Tensor]) -> None:
    """Every number of the row, and every gradient, but for rounding in float32."""
    assert found[0].keys() == expected[0].keys()
    for name, number in expected[0].items():
        assert found[0][name] == pytest.approx(number, rel=2e-4, abs=2e-5), name
    scale = float(expected[1].abs().max())
    torch.testing.assert_close(found[1], expected[1], rtol=2e-3, atol=2e-5 * scale)
    assert scale > 1e-4


def whole(wanted: Config) -> Step:
    return alone(wanted, Batch.of(episodes()), [[list(range(10))]])


CASES = [
    config(estimator="gae", lam=0.9, aggregation="token-mean"),
    config(estimator="grpo", aggregation="seq-mean-token-mean"),
    config(estimator="rloo", aggregation="seq-mean-token-sum", importance_weight="product"),
    config(estimator="dr-grpo", aggregation="constant", importance_mask="geometric"),
    config(estimator="reinforce++", kl_coef=0.0, kl_reward_coef=0.1, gamma=0.98),
    config(estimator="reinforce++-baseline", old_logprobs="rollout", importance_mask="none"),
]
NAMES = [case.algorithm.estimator for case in CASES]


@pytest.mark.parametrize("wanted", CASES, ids=NAMES)
def test_micro_batches_and_padding_change_nothing(wanted: Config) -> None:
    expected = whole(wanted)
    for budget, packed in ((60, False), (1, False), (60, True)):
        batch = Batch.of(episodes())
        agree(alone(wanted, batch, divide(batch.lengths, 1, budget, packed)), expected)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("wanted", CASES, ids=NAMES)
def test_the_number_of_ranks_changes_nothing(wanted: Config, size: int) -> None:
    """Uneven parts: groups lie across ranks, and with three of them one has hardly anything."""
    expected = whole(wanted)
    parts = {2: [slice(0, 7), slice(7, 10)], 3: [slice(0, 5), slice(5, 6), slice(6, 10)]}[size]
    for found in on_ranks(wanted, [Batch.of(episodes()[part]) for part in parts]):
        agree(found, expected)


def test_a_rank_that_lost_all_its_episodes_changes_nothing() -> None:
    wanted = CASES[1]
    for found in on_ranks(wanted, [Batch.nothing(), Batch.of(episodes())]):
        agree(found, whole(wanted))


@pytest.mark.parametrize("wanted", CASES, ids=NAMES)
def test_an_episode_lost_to_infrastructure_changes_nothing(wanted: Config) -> None:
    """No gradient, not in a group's mean, not in whitening, not in a denominator."""
    lost = made_episodes(1, seed=5)[0]
    lost.group = 1
    batch = Batch.of([*episodes(), lost.finish(5.0, Status.INFRA)])
    agree(alone(wanted, batch, [[list(range(11))]]), whole(wanted))


def test_an_episode_without_another_of_its_prompt_is_left_out_where_they_are_compared() -> None:
    lonely = made_episodes(1, seed=5)[0]
    lonely.group = 77
    for estimator, same in (("grpo", True), ("reinforce++", False)):
        wanted = config(estimator=estimator)
        row, gradient = alone(wanted, Batch.of([*episodes(), lonely]), [[list(range(11))]])
        assert row["groups/alone"] == 1.0
        assert torch.allclose(gradient, whole(wanted)[1], rtol=1e-3, atol=1e-6) is same


@dataclass
class Averaging(Learner):
    """Replicas whose gradients are averaged over the ranks before they step."""

    def _move(self, train_policy: bool) -> Numbers:
        for p in [*self.policy.parameters(), *(self.critic.parameters() if self.critic else ())]:
            if p.grad is not None:
                p.grad.copy_(self.ranks.sum(p.grad) / self.ranks.size)
        return super()._move(train_policy)


def trained(wanted: Config, size: int, minibatches: int, spoil: int | None = None) -> list[Tensor]:
    """The policy's weights on each rank after an update of several real steps, of rows in equal shares.

    The batch of rank `spoil` holds advantages that are not finite; then gradients are not averaged either, as
    if each were a shard that only its rank sees.
    """
    learners: list[Learner] = made(Averaging if spoil is None else Learner, wanted, size)

    def work(ranks: Ranks) -> Tensor:
        learner, batch = learners[ranks.rank], Batch.of(episodes())
        learner.ranks = ranks
        mine = torch.arange(10) * size // 10 == ranks.rank
        batch.drop(~mine)
        division: list[MiniBatch] = [
            [[row for row in range(10) if mine[row] and row % minibatches == mini]]
            for mini in range(minibatches)
        ]
        learner.prepare(batch, division)
        if spoil == ranks.rank:
            batch.advantages[mine] = torch.nan
        row = learner.update(batch, division, train_policy=True)
        assert row["nonfinite"] == (0 if spoil is None else row["optimizer_steps"])
        return torch.cat([p.detach().flatten() for p in learner.policy.parameters()])

    return together(size, work)


@pytest.mark.parametrize("minibatches", [1, 2])
def test_real_steps_on_ranks_end_where_one_process_ends(minibatches: int) -> None:
    wanted = config(estimator="gae")
    wanted.trainer.policy_lr, wanted.trainer.ppo_epochs = 1e-3, 2
    (expected,) = trained(wanted, 1, minibatches)
    first, second = trained(wanted, 2, minibatches)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("spoil", [0, 1])
def test_one_rank_without_a_finite_gradient_means_that_no_rank_moves(spoil: int) -> None:
    before = torch.cat([p.detach().flatten() for p in tiny_policy(1).parameters()])
    assert all(torch.equal(found, before) for found in trained(config(estimator="grpo"), 2, 1, spoil))


def test_the_worked_ranks_whiten_over_the_whole_batch() -> None:
    x = torch.tensor([[0.9, 0.8, 0.7, 0.6]])

    def work(ranks: Ranks) -> float:
        own = x[:, 2 * ranks.rank : 2 * ranks.rank + 2]
        mask = torch.ones_like(own)
        return float(ppo.whiten(own, mask, ranks.sum(ppo.moments(own, mask)))[0, 0])

    assert together(2, work) == pytest.approx([1.161895, -0.387298], abs=1e-5)
