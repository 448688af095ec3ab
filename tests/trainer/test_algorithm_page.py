"""docs/reference/algorithm.md names every key of the section, and only tests and keys that exist."""

from __future__ import annotations

import re
from pathlib import Path

from orchestrator.schema import Config
from orchestrator.schema_algorithm import Algorithm
from trainer import ppo

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reference" / "algorithm.md").read_text()


def test_every_key_and_every_choice_is_on_the_page() -> None:
    assert [name for name in Algorithm.model_fields if f"`{name}" not in PAGE] == []
    assert [name for name in [*ppo.ESTIMATORS, *ppo.AGGREGATIONS] if f"| `{name}` |" not in PAGE] == []


def test_every_test_that_the_page_names_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    written = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(named) > 40 and [name for name in named if f"def {name}(" not in written] == []


def test_every_key_that_the_page_names_exists() -> None:
    dumped = Config().model_dump()
    named = re.findall(r"`(algorithm|rollout|trainer)\.(\w+)(?:: [^`]*)?`", PAGE)
    assert named
    modules = {"ppo"}
    assert [key for key in named if key[1] not in dumped[key[0]] and key[1] not in modules] == []
