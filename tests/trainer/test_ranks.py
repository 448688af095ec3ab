"""What ranks say to each other: alone for nothing, together the same on all of them."""

from __future__ import annotations

import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from rank_kit import on_ranks

from trainer.ranks import ALONE, Ranks, another_voice, digest


def test_alone_everything_is_what_it_was() -> None:
    x = torch.tensor([1.0, float("nan")])
    assert ALONE.sum(x) is x and ALONE.max(x) is x
    assert ALONE.any(True) and not ALONE.any(False) and ALONE.same(object()) and ALONE.first
    assert ALONE.broadcast_object("o") == "o" and ALONE.gather_objects("o") == ["o"]
    ALONE.barrier()


def test_alone_costs_no_process_group() -> None:
    code = "import sys, trainer.ranks as r; r.ALONE.barrier(); print('trainer.distributed' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_digest_names_bits_shape_and_type() -> None:
    one = torch.tensor([1.0, 2.0])
    assert digest(one) == digest(one.clone())
    others = [one.double(), one[:1], one[None], torch.tensor([1.0, 2.0000002]), "text", 1]
    assert len({digest(x) for x in [one, *others]}) == 7
    assert digest(torch.tensor(0.0)) != digest(torch.tensor(-0.0))


def say(ranks: Ranks, base: float) -> dict[str, Any]:
    """What one rank hears; runs on each of them."""
    mine = torch.tensor([base + ranks.rank, 1.0], dtype=torch.float64)
    odd = torch.tensor([float("nan") if ranks.rank == 1 else 1.0, float(ranks.rank)])
    return {
        "sum": ranks.sum(mine).tolist(),
        "kept": mine.tolist(),
        "max": ranks.max(odd).tolist(),
        "integer": ranks.max(torch.tensor([ranks.rank, -ranks.rank])).tolist(),
        "any": (ranks.any(ranks.rank == 1), ranks.any(False)),
        "same": (ranks.same(torch.ones(3)), ranks.same(ranks.rank), ranks.same({"a": 1})),
        "told": ranks.broadcast_object({"step": 7} if ranks.first else None),
        "gathered": ranks.gather_objects("x" * ranks.rank),
    }


def wait_alone(ranks: Ranks) -> str:
    """Rank 1 never comes: what does rank 0 get, and when?"""
    group = another_voice(Ranks(ranks.rank, ranks.size, None, timedelta(seconds=2)))
    if not ranks.first:
        ranks.barrier()
        return ""
    start = time.monotonic()
    try:
        group.gather_objects("here")
        return "nothing"
    except RuntimeError as error:
        return f"{type(error).__name__} after {time.monotonic() - start:.0f} s"
    finally:
        ranks.barrier()


def test_a_rank_that_does_not_come_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    said, _ = on_ranks(2, tmp_path, "test_ranks", "wait_alone")
    assert "Error after" in said and int(said.split()[2]) < 40, said


def test_three_ranks_hear_the_same(tmp_path: Path) -> None:
    heard = on_ranks(3, tmp_path, "test_ranks", "say", 0.5)
    assert [h.pop("kept") for h in heard] == [[0.5, 1.0], [1.5, 1.0], [2.5, 1.0]]
    nan = heard[0]["max"][0]
    assert nan != nan
    for h in heard:
        assert h.pop("max")[1] == 2.0
        assert h == {
            "sum": [4.5, 3.0],
            "integer": [2, 0],
            "any": (True, False),
            "same": (True, False, True),
            "told": {"step": 7},
            "gathered": ["", "x", "xx"],
        }
