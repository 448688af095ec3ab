"""Sections: what each type takes, which values are named as wrong, copies and equality."""

# no postponed annotations: sections read theirs when they are declared
from typing import Annotated, Any, Literal

import pytest

from orchestrator.typed import Invalid, Limits, Read, Section, made


def _doubled(value: Any) -> int:
    if value == "odd":
        raise ValueError("odd is not even")
    return 2 * int(value)


class Inner(Section):
    size: Annotated[int, Limits(gt=0)] = 1


class Outer(Section):
    text: Annotated[str, Limits(pattern="[a-z]+$")] = "a"
    rate: Annotated[float, Limits(gt=0, le=1)] | None = None
    word: Literal["one", "two"] = "one"
    flag: bool = False
    even: Annotated[int, Read(_doubled)] = 2
    items: list[str] = made(factory=list)
    names: dict[str, str] = made(factory=dict)
    inner: Inner = made(factory=Inner)


class Further(Outer):
    more: int = 0


@pytest.mark.parametrize(
    ("name", "given", "kept"),
    [
        ("rate", "1e-3", 0.001),
        ("rate", 1, 1.0),
        ("rate", None, None),
        ("even", "4", 8),
        ("more", "07", 7),
        ("more", 3.0, 3),
        ("inner", {"size": 3}, Inner(size=3)),
    ],
)
def test_a_value_is_kept_as_its_type(name: str, given: object, kept: object) -> None:
    found = getattr(Further.model_validate({name: given}), name)
    assert found == kept and type(found) is type(kept)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        *[("text", bad) for bad in (1, None, "A", "a\n", "")],
        *[("rate", bad) for bad in (0, 1.5, float("nan"), True, "x", "1" * 5000 + "x", [])],
        *[("word", bad) for bad in ("three", 1, None)],
        *[("flag", bad) for bad in (1, "yes", None)],
        *[("more", bad) for bad in (True, 1.5, "1.5", float("inf"), None, "x")],
        *[("items", bad) for bad in ("a", [1], None)],
        *[("names", bad) for bad in ({"a": 1}, {1: "a"}, [])],
    ],
)
def test_what_a_type_does_not_take_is_named(name: str, given: object) -> None:
    with pytest.raises(Invalid) as caught:
        Further.model_validate({name: given})
    (problem,) = caught.value.problems
    assert problem.name == name and problem.got is given


def test_every_problem_is_told_with_its_place() -> None:
    with pytest.raises(Invalid) as caught:
        Outer.model_validate({"inner": {"size": 0, "depth": 1}, "even": "odd", "nothing": 1})
    assert str(caught.value).splitlines() == [
        "nothing: there is no such key",
        "even: odd is not even",
        "inner.depth: there is no such key",
        "inner.size: got `0`, which it does not take",
    ]


def test_what_is_no_mapping_is_no_section() -> None:
    for wrong in ([], "text", None):
        with pytest.raises(Invalid, match="inner: expected names"):
            Outer.model_validate({"inner": wrong})


def test_a_value_that_is_set_is_checked_too() -> None:
    outer = Outer()
    outer.rate = 0.5
    with pytest.raises(Invalid):
        outer.rate = 2.0
    with pytest.raises(Invalid):
        outer.ratee = 0.5
    assert outer.rate == 0.5


def test_sections_share_nothing() -> None:
    first, second = Outer(), Outer()
    first.items.append("x")
    first.inner.size = 7
    copied = first.model_copy(deep=True)
    assert copied == first and copied != second
    copied.inner.size = 8
    dumped = first.model_dump()
    dumped["items"].append("y")
    assert (second.items, second.inner.size, first.inner.size, first.items) == ([], 1, 7, ["x"])
    assert Inner.model_validate(first.inner.model_dump()) == first.inner
