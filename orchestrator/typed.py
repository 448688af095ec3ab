"""Typed sections of a configuration: declared as classes, strict, and quick to import.

What it is
    A `Section` is a class with annotated fields and defaults. Values are checked when it is made, when a
    mapping is read into it and when a field is set; an unknown name is an error. Its methods have the
    names that pydantic gave them. Why not pydantic or msgspec: docs/design.md, "Dependencies".

How to use it
    class Job(Section):
        nodes: Annotated[int, Limits(ge=1)] = 1
    Job.model_validate({"nodes": "2"}).nodes   # 2; Invalid names every value that is wrong

What it does not do
    Only the types below: text, whole numbers, numbers, true or false, one of several words, lists of
    text, mappings of text to text, other sections, and `| None`. A module that declares a section must
    not postpone its annotations. It knows no files and no layers (`orchestrator.config` does).
"""

import copy
import math
import re
import types
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, Union, dataclass_transform, get_args, get_origin

_NUMBER = re.compile(r"\s*([+-]?\d+)(?:\.0*)?\s*")


class Limits:
    """Bounds of a number, or the pattern of a text; for `Annotated`."""

    def __init__(
        self,
        ge: float | None = None,
        gt: float | None = None,
        le: float | None = None,
        lt: float | None = None,
        pattern: str = "",
    ) -> None:
        self.ge, self.gt, self.le, self.lt, self.pattern = ge, gt, le, lt, pattern

    def admit(self, value: Any) -> bool:
        """Not a number (NaN) is within no bounds."""
        if self.pattern:
            return re.fullmatch(self.pattern, value) is not None
        return (
            (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )


class Read:
    """How a value is read before anything else looks at it; for `Annotated`. `function` may raise
    ValueError, with a whole sentence."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function


class Made:
    """A default that each section gets its own of; see `made`."""

    def __init__(self, factory: Callable[[], Any]) -> None:
        self.factory = factory


def made(*, factory: Callable[[], Any]) -> Any:
    """A default that is made anew each time: an empty list, a section."""
    return Made(factory)


class Problem:
    """One wrong value: its dotted name, what it was, and a sentence of ours where there is one."""

    def __init__(self, name: str, got: Any, sentence: str = "", unknown: bool = False) -> None:
        self.name, self.got, self.sentence, self.unknown = name, got, sentence, unknown

    def __str__(self) -> str:
        if self.unknown:
            return f"{self.name}: there is no such key"
        return f"{self.name}: {self.sentence or f'got `{self.got}`, which it does not take'}"


class Invalid(ValueError):
    """A mapping that is no such section; `problems` has every value that is wrong."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        super().__init__("\n".join(str(problem) for problem in problems))


class _Refused(Exception):
    """A value that a field does not take: no sentence of its own."""


class Field:
    """One field, taken apart once: `type` is without `| None` and without `Annotated`."""

    def __init__(self, name: str, annotation: Any, default: Any) -> None:
        self.name, self._default = name, default
        parts = get_args(annotation) if _is_union(annotation) else (annotation,)
        self.nullable = type(None) in parts
        (one,) = [part for part in parts if part is not type(None)]
        marks = [*getattr(annotation, "__metadata__", ()), *getattr(one, "__metadata__", ())]
        if get_origin(one) is Annotated:
            one = get_args(one)[0]
        self.limits = [mark for mark in dict.fromkeys(marks) if isinstance(mark, Limits)]
        self.read = next((mark.function for mark in marks if isinstance(mark, Read)), None)
        self.type: Any = get_origin(one) or one
        self.choices: tuple[Any, ...] = get_args(one) if self.type is Literal else ()
        self.section: type[Section] | None = (
            one if isinstance(one, type) and issubclass(one, Section) else None
        )

    @property
    def default(self) -> Any:
        return self._default.factory() if isinstance(self._default, Made) else self._default

    def take(self, given: Any, name: str) -> Any:
        """The value as this field keeps it. Raises Invalid."""
        if given is None and self.nullable:
            return None
        if self.section is not None:
            return self.section._read(given, f"{name}.")
        try:
            value = _TAKES[self.type](self.read(given) if self.read else given, self)
        except ValueError as error:
            raise Invalid([Problem(name, given, str(error))]) from error
        except _Refused as error:
            raise Invalid([Problem(name, given)]) from error
        if not all(limit.admit(value) for limit in self.limits):
            raise Invalid([Problem(name, given)])
        return value


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


# --- what each type takes ----------------------------------------------------------------------------


def _only(kind: type) -> Callable[[Any, Field], Any]:
    def take(value: Any, field: Field) -> Any:
        if not isinstance(value, kind):
            raise _Refused
        return value

    return take


def _whole(value: Any, field: Field) -> int:
    """Also what YAML leaves as text or makes a number with a point: "4", 4.0."""
    if isinstance(value, str) and (match := _NUMBER.fullmatch(value)):
        return int(match[1])
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        return int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise _Refused
    return value


def _number(value: Any, field: Field) -> float:
    """Also text: YAML takes 1e-6 for that."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise _Refused
    try:
        return float(value)
    except (ValueError, OverflowError) as error:
        raise _Refused from error


def _choice(value: Any, field: Field) -> Any:
    if not isinstance(value, str) or value not in field.choices:
        raise _Refused
    return value


def _texts(value: Any, field: Field) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise _Refused
    return list(value)


def _mapping(value: Any, field: Field) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(t, str) for pair in value.items() for t in pair):
        raise _Refused
    return dict(value)


_TAKES: dict[Any, Callable[[Any, Field], Any]] = {
    **{str: _only(str), bool: _only(bool), int: _whole, float: _number},
    **{Literal: _choice, list: _texts, dict: _mapping},
}


# --- sections ----------------------------------------------------------------------------------------


@dataclass_transform(kw_only_default=True, field_specifiers=(made,))
class Section:
    """Base of every section. Values are checked, also those that are set later."""

    model_fields: ClassVar[dict[str, Field]] = {}

    def __init_subclass__(cls) -> None:
        fields = {n: Field(n, annotation, cls.__dict__[n]) for n, annotation in cls.__annotations__.items()}
        cls.model_fields = {**cls.model_fields, **fields}

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(type(self)._checked(values, ""))

    @classmethod
    def model_validate(cls, values: Any) -> Self:
        """A section of a mapping (or the section that it is already). Raises Invalid."""
        return cls._read(values, "")

    @classmethod
    def _read(cls, values: Any, prefix: str) -> Self:
        if isinstance(values, cls):
            return values
        if not isinstance(values, Mapping):
            raise Invalid([Problem(prefix.rstrip("."), values, "expected names with values below it")])
        found = cls.__new__(cls)
        found.__dict__.update(cls._checked(values, prefix))
        return found

    @classmethod
    def _checked(cls, values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        """Every field with its value; a default is right as it stands. Raises Invalid, with all problems."""
        unknown = [name for name in values if name not in cls.model_fields]
        problems = [Problem(f"{prefix}{name}", values[name], unknown=True) for name in unknown]
        found: dict[str, Any] = {}
        for name, field in cls.model_fields.items():
            try:
                found[name] = field.take(values[name], f"{prefix}{name}") if name in values else field.default
            except Invalid as error:
                problems += error.problems
        if problems:
            raise Invalid(problems)
        return found

    def __setattr__(self, name: str, value: Any) -> None:
        field = type(self).model_fields.get(name)
        if field is None:
            raise Invalid([Problem(name, value, unknown=True)])
        self.__dict__[name] = field.take(value, name)

    def model_copy(self, *, deep: bool = False) -> Self:
        return copy.deepcopy(self) if deep else copy.copy(self)

    def model_dump(self, *, mode: str = "python") -> dict[str, Any]:
        """As mappings of plain values; every value is one that JSON and YAML know, whatever the mode."""
        return {
            name: value.model_dump() if isinstance(value, Section) else copy.copy(value)
            for name, value in self.__dict__.items()
        }

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.__dict__ == self.__dict__

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{n}={v!r}' for n, v in self.__dict__.items())})"
