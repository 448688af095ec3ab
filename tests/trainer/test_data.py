"""Task rows from parquet, and the order in which they are drawn."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from trainer.data import Sampler, read_rows, steps_in, write_rows
from trainer.errors import TaskError

MESSAGES = [{"role": "user", "content": "Mend it."}]


def written(tmp_path: Path, rows: list[dict[str, Any]]) -> Path:
    write_rows(tmp_path / "tasks.parquet", rows)
    return tmp_path / "tasks.parquet"


def test_rows_pass_through_with_their_instance(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Mend it.", "data_source": "r2e-gym", "instance": {"instance_id": "a", "repo": "x"}},
        {"prompt": "More.", "data_source": "r2e-gym", "instance": {"instance_id": "b", "repo": "y"}},
    ]
    assert read_rows(written(tmp_path, rows)) == rows


def test_a_prompt_may_be_messages_and_absent_struct_fields_stay_absent(tmp_path: Path) -> None:
    rows = [
        {"prompt": MESSAGES, "instance": {"instance_id": "a", "setup": {"x": "1"}}},
        {"prompt": MESSAGES, "instance": {"instance_id": "b", "setup": {"y": "2"}}},
    ]
    assert read_rows(written(tmp_path, rows)) == rows


@pytest.mark.parametrize("prompt", ["", None, [], [{"content": "no role"}], 7])
def test_a_row_without_a_usable_prompt_is_named(tmp_path: Path, prompt: Any) -> None:
    path = written(tmp_path, [{"prompt": prompt}])
    with pytest.raises(TaskError, match=r"row 0, column `prompt`: it holds"):
        read_rows(path)


def test_a_missing_broken_or_empty_file_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 this is no parquet file")
    with pytest.raises(TaskError, match="cannot be read as parquet"):
        read_rows(broken)
    with pytest.raises(TaskError, match="is missing"):
        read_rows(tmp_path / "absent.parquet")
    with pytest.raises(TaskError, match="no rows"):
        read_rows(written(tmp_path, []))


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_epoch_has_every_index_once_whatever_the_batch(shuffle: bool) -> None:
    sampler = Sampler(7, seed=3, shuffle=shuffle)
    drawn = [i for _ in range(7) for i in sampler.take(4)]
    epochs = [drawn[i : i + 7] for i in range(0, 28, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert (epochs[0] == epochs[1]) is not shuffle


def test_a_batch_larger_than_the_data_repeats_it() -> None:
    assert Counter(Sampler(1, seed=0).take(24)) == {0: 24}


@pytest.mark.parametrize("done", [0, 1, 2, 3, 5])
def test_a_restored_sampler_goes_on_exactly_also_on_the_edge_of_an_epoch(done: int) -> None:
    whole, first, second = (Sampler(6, seed=1) for _ in range(3))
    expected = [whole.take(2) for _ in range(8)]
    found = [first.take(2) for _ in range(done)]
    second.load_state_dict(first.state_dict())
    assert found + [second.take(2) for _ in range(8 - done)] == expected
    assert second.state_dict() == whole.state_dict()


def test_seeds_differ() -> None:
    assert Sampler(50, seed=0).take(50) != Sampler(50, seed=1).take(50)


def test_a_cursor_of_other_data_is_refused() -> None:
    saved = Sampler(6, seed=1).state_dict()
    for other in (Sampler(7, seed=1), Sampler(6, seed=2)):
        with pytest.raises(TaskError, match=r"trainer\.resume=never"):
            other.load_state_dict(saved)


def test_steps_of_an_epoch_round_up() -> None:
    assert [steps_in(n, 4, 1) for n in (1, 4, 5)] == [1, 1, 2]
    assert steps_in(6, 4, 2) == 3
