"""`--only`, as benchmarks of several parts have it."""

from __future__ import annotations

import argparse
from collections.abc import Iterable


def add_only(parser: argparse.ArgumentParser, parts: Iterable[str]) -> None:
    parser.add_argument("--only", default=",".join(parts), help=f"some of: {', '.join(parts)}")


def only(parser: argparse.ArgumentParser, given: str, parts: Iterable[str]) -> list[str]:
    """The parts that were asked for. Ends the program where one is not known."""
    wanted = given.split(",")
    if wrong := set(wanted) - set(parts):
        parser.error(f"--only takes {', '.join(parts)}, not {', '.join(sorted(wrong))}")
    return wanted
