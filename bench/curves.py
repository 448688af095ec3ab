"""Learning curves of several runs in one picture.

How to run it
    python -m bench.curves RUN_DIR… [--out docs/demo.svg]        # labels are the runs' seeds

What it does
    Each run's success rate by step, faint, and its mean over ten steps, strong; the JSON line last holds
    the mean of the first three and of the last ten steps of each.

What it does not do
    It trains nothing: `orchestrate launch --config local run.seed=1` does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

import yaml

from orchestrator.contract import RunDirectory, read_json_lines

WINDOW = 10
COLOURS = ("#2f6db3", "#c8553d", "#5a8f4e", "#8a5fa8", "#b8892b")


def rates(run: RunDirectory) -> list[float]:
    """Success rate by step; a step that was done again counts the last time."""
    return list({row["step"]: float(row["success_rate"]) for row in read_json_lines(run.metrics)}.values())


def trailing_means(values: list[float]) -> list[float]:
    return [statistics.mean(values[max(0, i + 1 - WINDOW) : i + 1]) for i in range(len(values))]


def seed_of(run: RunDirectory) -> str:
    return str(yaml.safe_load(run.config.read_text())["run"]["seed"])


def draw(curves: dict[str, list[float]], out: Path) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "curves"  # the same picture gives the same file
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 3.4), layout="constrained")
    for colour, (name, values) in zip(COLOURS, curves.items(), strict=False):
        steps = range(1, len(values) + 1)
        axes.plot(steps, values, color=colour, alpha=0.22, linewidth=1)
        axes.plot(steps, trailing_means(values), color=colour, linewidth=2, label=name)
    axes.set(xlabel="step", ylabel="success rate", ylim=(0, 1), xlim=(1, max(map(len, curves.values()))))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(out, metadata={"Date": None})


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.curves", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("runs", nargs="+", type=RunDirectory)
    parser.add_argument("--out", type=Path, help="an SVG file")
    options = parser.parse_args()
    curves = {f"seed {seed_of(run)}": rates(run) for run in options.runs}
    if options.out:
        draw(curves, options.out)
    ends = {
        name: {"first_3": round(statistics.mean(v[:3]), 2), "last_10": round(statistics.mean(v[-10:]), 2)}
        for name, v in curves.items()
    }
    print(json.dumps(ends))
    return 0


if __name__ == "__main__":
    sys.exit(main())
