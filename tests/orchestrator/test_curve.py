"""The learning curve: what it draws, and that it never fails on odd rows."""

from __future__ import annotations

import pytest

from orchestrator.curve import learning_curve, moving_mean, points, verdict

ROWS = [{"step": i, "success_rate": min(1.0, i / 20)} for i in range(30)]


def test_moving_mean_by_hand() -> None:
    assert moving_mean([1.0, 2.0, 6.0], window=2) == [1.0, 1.5, 4.0]


def test_a_replayed_step_counts_once_and_nan_is_left_out() -> None:
    rows = [
        {"step": 0, "success_rate": 0.5},
        {"step": 1, "success_rate": float("nan")},
        {"step": 0, "success_rate": 0.75},
        {"step": 2},
    ]
    assert points(rows, "success_rate") == ([0], [0.75])


@pytest.mark.parametrize("width", [40, 80, 120])
def test_every_line_fits_the_width(width: int) -> None:
    lines = learning_curve(ROWS, width=width).split("\n")
    assert max(map(len, lines)) <= width
    assert "success rate by step" in lines[0]
    assert any("100 %" in line for line in lines)


def test_plain_text_has_no_escape_sequences_and_colour_has() -> None:
    assert "\x1b" not in learning_curve(ROWS)
    assert "\x1b" in learning_curve(ROWS, colour=True)


def test_too_few_rows_draw_nothing() -> None:
    assert learning_curve(ROWS[:1]) == ""
    assert verdict([]) == ""


def test_the_verdict_names_both_means() -> None:
    assert verdict(ROWS) == ("success rate 0.05 (mean of the first 3 steps) → 1.00 (mean of the last 10)")
