"""Frozen dataclasses without compiled methods: the same as the standard ones wherever it can be seen."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import subprocess
import sys
from typing import Any, ClassVar

import pytest

from orchestrator import frozen


@frozen.dataclass(frozen=True, kw_only=True)
class Base:
    schema: int = 1


@frozen.dataclass(frozen=True, kw_only=True)
class Ours(Base):
    """As it is declared everywhere."""

    kinds: ClassVar[int] = 7
    name: str
    names: list[str] = frozen.field(default_factory=list)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StandardBase:
    schema: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Standard(StandardBase):
    kinds: ClassVar[int] = 7
    name: str
    names: list[str] = dataclasses.field(default_factory=list)


@frozen.dataclass(frozen=True)
class Point:
    x: int
    y: int = 2
    of: Any = None


@dataclasses.dataclass(frozen=True)
class Child(Point):
    """A standard one that inherits ours."""

    z: int = 3


def test_the_standard_functions_take_it() -> None:
    made = Ours(name="a")
    assert dataclasses.asdict(made) == {"schema": 1, "name": "a", "names": []} == frozen.asdict(made)
    assert dataclasses.replace(made, name="b") == Ours(name="b") == frozen.replace(made, name="b")
    assert [f.name for f in dataclasses.fields(Ours)] == [f.name for f in dataclasses.fields(Standard)]
    assert [f.name for f in frozen.fields(Ours)] == [f.name for f in dataclasses.fields(Ours)]
    assert dataclasses.is_dataclass(Ours)
    assert dataclasses.fields(Ours)[2].default_factory is list


@pytest.mark.parametrize(
    "values", [{}, {"name": "a", "other": 1}, {"name": "a", "schema": 2}, {"name": "a", "names": ["b"]}]
)
def test_it_takes_and_refuses_what_the_standard_one_does(values: dict[str, Any]) -> None:
    def said(cls: Any) -> Any:
        try:
            return repr(cls(**values)).partition("(")[2], hash(str(cls(**values)).partition("(")[2])
        except TypeError:
            return "refused"

    assert said(Ours) == said(Standard)


def test_positions_and_names() -> None:
    assert Point(1, y=5) == Point(x=1, y=5) != Point(1)
    assert {Point(1), Point(1, 2)} == {Point(1)}
    assert repr(Point(1)) == "Point(x=1, y=2, of=None)"
    for wrong in (lambda: Point(), lambda: Point(1, x=1), lambda: Point(1, 2, 3, 4), lambda: Ours("a")):  # type: ignore[call-arg,misc]
        with pytest.raises(TypeError):
            wrong()
    match Point(1, 2):
        case Point(x, y):
            assert (x, y) == (1, 2)


def test_nothing_is_shared_and_nothing_changes() -> None:
    assert Ours(name="a").names is not Ours(name="a").names
    for act in (lambda: setattr(Point(1), "x", 2), lambda: delattr(Point(1), "x")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            act()


def test_copies_and_pickles_are_equal() -> None:
    made = Point(1, of=[Point(2)])
    assert copy.deepcopy(made) == made == pickle.loads(pickle.dumps(made))  # noqa: S301


def test_a_standard_one_may_inherit_it() -> None:
    made = Child(1, z=9)
    assert frozen.asdict(made) == {"x": 1, "y": 2, "of": None, "z": 9} == dataclasses.asdict(made)
    assert frozen.replace(made, x=4) == Child(4, z=9)
    assert [f.name for f in frozen.fields(Child)] == ["x", "y", "of", "z"]
    assert frozen.asdict(Point(1, of=[{"a": made}]))["of"][0]["a"]["z"] == 9


def test_declaring_imports_no_dataclasses() -> None:
    code = (
        "import sys\nfrom orchestrator.frozen import dataclass\n"
        "@dataclass(frozen=True)\nclass A:\n  x: int = 1\nA(x=2)\nprint('dataclasses' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "False"
