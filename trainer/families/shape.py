"""What a program with bugs is made of: plain data, which `trainer.families.repositories` makes tasks of.

What it does not do
    It holds no program; each is a module of `trainer.families.programs`.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Bug:
    """One place of a program, right and wrong, and the hidden tests that tell the difference."""

    name: str
    kind: str
    right: str
    """Whole lines of the source, without their indentation."""
    wrong: str
    report: str
    """What a user would say: what happens, never where."""
    fails: tuple[str, ...]
    above: str = ""
    """What the wrong lines need before the first definition of the module."""


@dataclass(frozen=True)
class Program:
    """A module that is right, its tests, and the ways to break it. @name@ stands for a drawn name."""

    name: str
    title: str
    about: str
    source: str
    visible: str
    hidden: str
    bugs: tuple[Bug, ...]
    choices: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """What each name may be; each variant draws one of each."""

    def names(self, draw: random.Random) -> dict[str, str]:
        """The names of one variant."""
        return {name: draw.choice(list(words)) for name, words in self.choices.items()}
