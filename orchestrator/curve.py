"""The learning curve of a run, drawn in the terminal.

How to use it
    print(learning_curve(rows, width=80, colour=True))     rows of training/metrics.jsonl

What it does not do
    It reads no file and prints nothing; plotext, which draws, is imported on the first call.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

WINDOW = 10


def moving_mean(values: Sequence[float], window: int = WINDOW) -> list[float]:
    """Mean of each value and up to `window - 1` before it."""
    return [
        sum(part) / len(part) for i in range(len(values)) if (part := values[max(0, i - window + 1) : i + 1])
    ]


def points(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and finite values of one metric; a step that was done twice counts once, the last time."""
    found = {
        int(row["step"]): float(row[key])
        for row in rows
        if "step" in row and isinstance(row.get(key), int | float) and math.isfinite(row[key])
    }
    return sorted(found), [found[step] for step in sorted(found)]


def learning_curve(
    rows: Sequence[Mapping[str, Any]], width: int = 80, height: int = 17, colour: bool = False
) -> str:
    """Success rate by step and its moving mean, as text of `width` columns. "" without two steps."""
    steps, values = points(rows, "success_rate")
    if len(steps) < 2:
        return ""
    import plotext as plot

    plot.clear_figure()
    plot.theme("clear")
    plot.plotsize(width, height)
    plot.plot(steps, values, marker="braille", color="gray")
    plot.plot(steps, moving_mean(values), marker="dot", color="green+", label=f"mean of {WINDOW} steps")
    plot.ylim(0, 1)
    plot.yticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    ticks = sorted({steps[round(i * (len(steps) - 1) / 6)] for i in range(7)})
    plot.xticks(ticks, [str(tick) for tick in ticks])
    plot.title("success rate by step")
    text: str = plot.build()
    return (text if colour else str(plot.uncolorize(text))).rstrip("\n")


def verdict(rows: Sequence[Mapping[str, Any]]) -> str:
    """First and last success rates in one sentence; "" without rows."""
    _, values = points(rows, "success_rate")
    if not values:
        return ""
    first, last = values[:3], values[-WINDOW:]
    return (
        f"success rate {sum(first) / len(first):.2f} (mean of the first {len(first)} steps) → "
        f"{sum(last) / len(last):.2f} (mean of the last {len(last)})"
    )
