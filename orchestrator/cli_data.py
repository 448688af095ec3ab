"""`orchestrate data check`: the trainer's own look at a task file.

What it is
    Starts `python -m trainer.check` with this interpreter, and hands its output and exit code on:
    what reads parquet is the trainer's, and is not installed on every login node.

What it does not do
    It reads no task file itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from orchestrator import cli_trainer
from orchestrator.errors import LaunchError


def check(file: str, tokenizer: str | None, functions: Sequence[str], as_json: bool) -> int:
    """The exit code of the check. Raises LaunchError where the trainer's packages are missing."""
    if find_spec("pyarrow") is None:
        raise LaunchError(
            "reading task files needs pyarrow: install orchestrate-rl[trainer], or [trainer-cpu]"
        )
    named = ["--tokenizer", tokenizer] if tokenizer else []
    for function in functions:
        named += ["--function", function]
    return cli_trainer.run("check", file, *named, *(["--json"] if as_json else []))
