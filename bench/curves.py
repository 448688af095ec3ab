"""Learning curves of several runs in one picture, and their raw numbers in small files.

How to run it
    python -m bench.curves RUN_DIR|FILE.csv… [--out docs/demo.svg] [--keep docs/curves/demo]

What it does
    Each run's success rate by step, faint, and its mean over ten steps, strong; dots are its validations, on
    tasks that training never shows. `--keep` writes each run's rows, the columns that matter, to
    `PREFIX-seed-N.csv`, which is read here like a run. The JSON line last holds the mean of the first three
    and of the last ten steps of each, and its first and last validation.

What it does not do
    It trains nothing: `orchestrate launch --config local run.seed=1` does.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from orchestrator.contract import RunDirectory, read_json_lines

WINDOW = 10
COLOURS = ("#2f6db3", "#c8553d", "#5a8f4e", "#8a5fa8", "#b8892b")
SUCCESS, VALIDATION = "success_rate", "validation/success_rate"
KEPT = (
    *(
        "step",
        SUCCESS,
        VALIDATION,
        "reward_mean",
        "status/infra",
        "loss_policy",
        "loss_value",
        "kl",
        "step_kl",
    ),
    *("clipped", "entropy", "mismatch", "explained_variance", "grad_norm_policy", "length/response"),
    *("time/total", "time/rollout", "time/update", "tokens_per_s"),
)
"""Columns of a kept file; a run has those of them that it measured."""

Row = Mapping[str, Any]


def rows_of(source: Path) -> list[Row]:
    """A run's rows, or a kept file's; of a step that was done again the last one counts."""
    if source.is_file():
        with source.open(newline="") as file:
            return [{name: float(cell) for name, cell in row.items() if cell} for row in csv.DictReader(file)]
    return list({row["step"]: row for row in read_json_lines(RunDirectory(source).metrics)}.values())


def name_of(source: Path) -> str:
    """`seed-N`: a run's seed, or the end of a kept file's name."""
    if source.is_file():
        return "-".join(source.stem.split("-")[-2:])
    return f"seed-{yaml.safe_load(RunDirectory(source).config.read_text())['run']['seed']}"


def keep(rows: Sequence[Row], out: Path) -> None:
    """Write what matters of each row, to five digits."""
    names = [name for name in KEPT if any(name in row for row in rows)]
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        writer.writerows([_short(row.get(name)) for name in names] for row in rows)


def _short(value: object) -> object:
    return "" if value is None else f"{value:.5g}" if isinstance(value, float) else value


def trailing_means(values: Sequence[float]) -> list[float]:
    return [statistics.mean(values[max(0, i + 1 - WINDOW) : i + 1]) for i in range(len(values))]


def draw(
    curves: Mapping[str, Sequence[float]],
    out: Path,
    dots: Mapping[str, Sequence[tuple[float, float]]] | None = None,
) -> None:
    """`curves`: values from step 1 on, by name; `dots`: (step, value), under the same names."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "curves"  # the same picture gives the same file
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 3.4), layout="constrained")
    for colour, (name, values) in zip(COLOURS, curves.items(), strict=False):
        steps = range(1, len(values) + 1)
        axes.plot(steps, values, color=colour, alpha=0.22, linewidth=1)
        axes.plot(steps, trailing_means(values), color=colour, linewidth=2, label=name.replace("-", " "))
        seen = (dots or {}).get(name, ())
        if seen:
            axes.plot(*zip(*seen, strict=True), "o:", color=colour, markersize=5, linewidth=1)
    axes.set(xlabel="step", ylabel="success rate", ylim=(0, 1), xlim=(1, max(map(len, curves.values()))))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(out, metadata={"Date": None})


def ends(rows: Sequence[Row]) -> dict[str, float]:
    """Where a run began and where it ended."""
    rates = [row[SUCCESS] for row in rows]
    found = {"first_3": statistics.mean(rates[:3]), "last_10": statistics.mean(rates[-10:])}
    if seen := [row[VALIDATION] for row in rows if VALIDATION in row]:
        found |= {"first_validation": seen[0], "last_validation": seen[-1]}
    return {name: round(value, 3) for name, value in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.curves", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run directories, or files of --keep")
    parser.add_argument("--out", type=Path, help="an SVG file")
    parser.add_argument("--keep", help="where raw numbers go: PREFIX-seed-N.csv")
    options = parser.parse_args()
    runs = {name_of(source): rows_of(source) for source in options.runs}
    for name, rows in runs.items() if options.keep else ():
        keep(rows, Path(f"{options.keep}-{name}.csv"))
    if options.out:
        curves = {name: [row[SUCCESS] for row in rows] for name, rows in runs.items()}
        dots = {
            name: [(row["step"] + 1, row[VALIDATION]) for row in rows if VALIDATION in row]
            for name, rows in runs.items()
        }
        draw(curves, options.out, dots)
    print(json.dumps({name: ends(rows) for name, rows in runs.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
