"""Padding, division into micro-batches, and what is left out of training."""

from __future__ import annotations

import pytest
import torch
from ranks_kit import together

from trainer.batch import STATUSES, Batch, divide, trainable
from trainer.episode import Episode, Status
from trainer.ranks import Ranks


def episode(*turns: int, prompt: int = 2, status: Status = Status.OK, reward: float = 0.0) -> Episode:
    """One episode: `turns` are sampled lengths, with an observation of one token between them."""
    found = Episode.start("t", 0, list(range(1, prompt + 1)))
    for number, length in enumerate(turns):
        if number:
            found.observed([9])
        found.sampled([5] * length, [-1.0] * length)
    return found.finish(reward, status)


def test_rows_are_padded_on_the_right_and_masked_by_length_not_by_id() -> None:
    zeros = Episode.start("t", 0, [0])  # id 0 is also what padding is filled with
    zeros.sampled([0, 0], [-0.5, -0.25])
    batch = Batch.of([zeros, episode(2, 1)])
    assert batch.ids.tolist() == [[0, 0, 0, 0, 0, 0], [1, 2, 5, 5, 9, 5]]
    assert batch.mask.tolist() == [[0, 1, 1, 0, 0, 0], [0, 0, 1, 1, 0, 1]]
    assert batch.rollout.tolist() == [[0, -0.5, -0.25, 0, 0, 0], [0, 0, -1, -1, 0, -1]]
    assert batch.lengths.tolist() == [3, 6]


def test_taking_rows_cuts_to_their_longest_and_putting_writes_back() -> None:
    batch = Batch.of([episode(1), episode(4), episode(2)])
    part = batch.take([2, 0])
    assert part.ids.shape == (2, 4) and part.outcomes.shape == (2,)
    batch.put("old", [2, 0], part.mask * 7)
    assert batch.old.tolist() == [[0, 0, 7, 0, 0, 0], [0] * 6, [0, 0, 7, 7, 0, 0]]


@pytest.mark.parametrize("budget", [1, 7, 20, 64, 10_000])
@pytest.mark.parametrize("minibatches", [1, 2, 3])
def test_every_row_is_in_exactly_one_micro_batch_within_the_budget(budget: int, minibatches: int) -> None:
    lengths = torch.tensor([3, 9, 4, 12, 5, 5, 7, 1, 30, 2, 8])
    divided = divide(lengths, minibatches, budget)
    assert sorted(row for mini in divided for rows in mini for row in rows) == list(range(len(lengths)))
    for rows in (rows for mini in divided for rows in mini):
        assert len(rows) * int(lengths[rows].max()) <= budget or len(rows) == 1
    sizes = [sum(map(len, mini)) for mini in divided]
    assert len(divided) == minibatches and max(sizes) - min(sizes) <= 1


def test_the_division_depends_on_the_generator_alone() -> None:
    lengths = torch.arange(1, 40)
    torch.manual_seed(5)
    first, second = divide(lengths, 2, 64), divide(lengths, 2, 64)
    torch.manual_seed(5)
    assert divide(lengths, 2, 64) == first != second


def test_more_minibatches_than_rows_leaves_none_empty() -> None:
    assert len(divide(torch.tensor([3, 4]), 5, 100)) == 2


def test_infrastructure_failures_and_empty_episodes_are_not_trained_on() -> None:
    lost = episode(3, status=Status.INFRA, reward=1.0)
    cut = episode(3, status=Status.TRUNCATED)
    silent = Episode.start("t", 0, [1])
    good = episode(2, status=Status.TIMEOUT)
    assert lost.reward == 0.0 and not any(lost.mask)
    assert trainable([lost, cut, silent, good]) == [cut, good]
    assert trainable([lost, cut, silent, good], truncated="mask") == [good]


def test_malformed_episodes_are_refused() -> None:
    longer = episode(3)
    longer.mask.append(1)  # a mask longer than its ids: the error of TRL#5144
    trained_prompt = episode(3)
    trained_prompt.mask[1] = 1
    for wrong in (longer, trained_prompt):
        with pytest.raises(ValueError, match="equally long and the mask 0"):
            Batch.of([wrong])
    with pytest.raises(ValueError, match="at least one"):
        Batch.of([])


def test_tokens_and_rows_are_counted_over_the_whole_minibatch() -> None:
    batch = Batch.of([episode(1), episode(4, 2), episode(2, status=Status.INFRA)])
    assert batch.totals([[0], [1, 2]]).tolist() == [7.0, 2.0]


@pytest.mark.parametrize("budget", [1, 7, 20, 64, 10_000])
@pytest.mark.parametrize("minibatches", [1, 2, 3])
def test_packed_rows_fill_the_budget_with_real_tokens(budget: int, minibatches: int) -> None:
    lengths = torch.tensor([3, 9, 4, 12, 5, 5, 7, 1, 30, 2, 8])
    torch.manual_seed(0)
    packed = divide(lengths, minibatches, budget, packed=True)
    torch.manual_seed(0)
    padded = divide(lengths, minibatches, budget)
    assert sorted(row for mini in packed for rows in mini for row in rows) == list(range(len(lengths)))
    for rows in (rows for mini in packed for rows in mini):
        assert int(lengths[rows].sum()) <= budget or len(rows) == 1
    for real, wide in zip(packed, padded, strict=True):
        same = [{row for rows in mini for row in rows} for mini in (real, wide)]
        assert same[0] == same[1]  # the same minibatches, cut differently
        assert len(real) <= len(wide)


def test_packing_leaves_less_than_half_of_the_budget_empty() -> None:
    torch.manual_seed(0)
    lengths = torch.randint(1, 60, (200,))
    (mini,) = divide(lengths, 1, 100, packed=True)
    fills = sorted(int(lengths[rows].sum()) for rows in mini)
    assert all(fill > 50 for fill in fills[1:]) and len(mini) <= 1.1 * float(lengths.sum()) / 100 + 1


def test_rows_of_one_prompt_keep_together_and_count_it_once() -> None:
    prompts = [(row % 3, 20) for row in range(12)]
    lengths = torch.tensor([20 + 3 + row for row in range(12)])

    def cost(rows: list[int]) -> int:
        return 20 * len({row % 3 for row in rows}) + sum(3 + row for row in rows)

    (mini,) = divide(lengths, 1, 62, packed=True, prompts=prompts)
    assert sorted(row for rows in mini for row in rows) == list(range(12))
    assert sorted(cost(rows) for rows in mini) == [50, 54, 58] and all(cost(rows) <= 62 for rows in mini)
    (small,) = divide(lengths, 1, 40, packed=True, prompts=prompts)
    assert all(cost(rows) <= 40 or len(rows) == 1 for rows in small) and len(small) > len(mini)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rows", [(9, 4), (5, 0, 2), (1, 7, 3)])
def test_every_rank_makes_as_many_passes_as_the_others(rows: tuple[int, ...], packed: bool) -> None:
    """As a sharded model needs it; a rank with nothing left makes empty ones."""

    def work(ranks: Ranks) -> list[list[list[int]]]:
        count = rows[ranks.rank]
        lengths = torch.arange(count) * (1 + ranks.rank) + 3
        return divide(lengths, 2, 12, packed, ranks)

    found = together(len(rows), work)
    shapes = [[len(mini) for mini in division] for division in found]
    assert shapes.count(shapes[0]) == len(shapes)
    for count, division in zip(rows, found, strict=True):
        assert sorted(row for mini in division for micro in mini for row in micro) == list(range(count))


def test_an_empty_micro_batch_is_a_row_of_nothing() -> None:
    batch = Batch.of([episode(1), episode(4)])
    part = batch.take([])
    assert part.mask.tolist() == [[0, 0]] and part.ids.shape == (1, 2)
    batch.put("old", [], part.mask + 1)
    assert not batch.old.any() and batch.totals([[]]).tolist() == [0, 0]
    assert Batch.nothing().acting.tolist() == [False]


def test_a_batch_knows_groups_status_and_response_lengths() -> None:
    first, second = episode(2, 1), episode(3, prompt=4, status=Status.TRUNCATED)
    first.group, second.group = 7, 3
    batch = Batch.of([first, second])
    assert batch.groups.tolist() == [7, 3] and batch.responses.tolist() == [4, 3]
    assert [STATUSES[i] for i in batch.status.tolist()] == [Status.OK, Status.TRUNCATED]
    batch.drop(torch.tensor([True, False]))
    assert batch.acting.tolist() == [False, True]
