"""Frozen dataclasses that are quick to declare: the standard ones write and compile their methods' source.

What it is
    `dataclass`, `field`, `asdict`, `fields` and `replace` under their usual names, for frozen classes. The
    methods are ordinary functions that look at the fields, so declaring a class costs a fiftieth, and
    `dataclasses` (with `inspect`, `ast` and `tokenize` behind it) is not imported. A type checker sees the
    standard ones. The standard functions take these classes too, and standard dataclasses may inherit them.
    Why: docs/design.md, "Dependencies".

How to use it
    from orchestrator.frozen import dataclass, field

    @dataclass(frozen=True)
    class Point:
        x: int
        names: list[str] = field(default_factory=list)

What it does not do
    Only `frozen` and `kw_only`, `default` and `default_factory`. Making an instance takes a few times as
    long as with a compiled `__init__`: for what a process makes by the dozen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dataclasses import asdict, dataclass, field, fields, replace

__all__ = ["asdict", "dataclass", "field", "fields", "replace"]

_MISSING: Any = object()
_OURS = "__frozen_fields__"


class _Field:
    """One field. `factory` makes the default where one value must not be shared."""

    def __init__(self, name: str, default: Any, kw_only: bool) -> None:
        made = isinstance(default, _Made)
        self.name, self.kw_only = name, kw_only
        self.default = _MISSING if made else default
        self.factory = default.factory if made else None


class _Made:
    def __init__(self, factory: Any) -> None:
        self.factory = factory


class _StandardFields:
    """What the functions of `dataclasses` ask a class for; made when one of them does."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: Any) -> Any:
        import dataclasses

        cls = next(c for c in owner.__mro__ if vars(c).get(self.name) is self)
        twin: Any = dataclasses.dataclass(init=False, repr=False, eq=False, frozen=True)(_namesake(cls))
        for name in ("__dataclass_fields__", "__dataclass_params__"):
            setattr(cls, name, getattr(twin, name))
        return getattr(twin, self.name)


def _namesake(cls: type) -> type:
    """A bare class that declares the same fields, inherited ones too, as the standard library says them."""
    import dataclasses

    space: dict[str, Any] = {"__annotations__": {}, "__module__": cls.__module__, "__doc__": cls.__doc__}
    for each in _of(cls).values():
        space["__annotations__"][each.name] = "Any"
        space[each.name] = dataclasses.field(
            default=dataclasses.MISSING if each.default is _MISSING else each.default,
            default_factory=each.factory or dataclasses.MISSING,
            kw_only=each.kw_only,
        )
    return type(cls.__name__, (), space)


def _of(thing: Any) -> dict[str, _Field]:
    found: dict[str, _Field] = getattr(thing, _OURS)
    return found


def _declare(cls: Any, frozen: bool = True, kw_only: bool = False) -> Any:
    assert frozen, f"{cls.__name__}: use the standard dataclass for what can change"
    found: dict[str, _Field] = {}
    for base in reversed(cls.__mro__[1:]):
        found |= vars(base).get(_OURS, {})
    for name, annotation in vars(cls).get("__annotations__", {}).items():
        if not str(annotation).startswith("ClassVar"):
            default = vars(cls).get(name, _MISSING)
            found[name] = _Field(name, default, kw_only)
            if isinstance(default, _Made):
                delattr(cls, name)
    setattr(cls, _OURS, found)
    positional = tuple(name for name, each in found.items() if not each.kw_only)
    setattr(cls, "__match_args__", positional)  # noqa: B010 - a type checker has its own idea of it
    for name in ("__dataclass_fields__", "__dataclass_params__"):
        setattr(cls, name, _StandardFields(name))
    for method in (__init__, __setattr__, __delattr__, __eq__, __hash__, __repr__):
        if method.__name__ not in vars(cls):
            setattr(cls, method.__name__, method)
    return cls


# --- the methods of every such class -----------------------------------------------------------------


def __init__(self: Any, *positional: Any, **named: Any) -> None:
    cls, state = type(self), self.__dict__
    if positional:
        names = cls.__match_args__
        if len(positional) > len(names):
            raise TypeError(
                f"{cls.__name__}() takes {len(names)} values without names, not {len(positional)}"
            )
        if twice := [name for name, _ in zip(names, positional, strict=False) if name in named]:
            raise TypeError(f"{cls.__name__}() got two values for {', '.join(twice)}")
        named.update(zip(names, positional, strict=False))
    for name, each in _of(cls).items():
        if name in named:
            state[name] = named.pop(name)
        elif each.factory is not None:
            state[name] = each.factory()
        elif each.default is not _MISSING:
            state[name] = each.default
        else:
            raise TypeError(f"{cls.__name__}() lacks a value for {name}")
    if named:
        raise TypeError(f"{cls.__name__}() has no field {', '.join(named)}")


def __setattr__(self: Any, name: str, value: Any) -> None:
    from dataclasses import FrozenInstanceError

    raise FrozenInstanceError(f"cannot assign to field {name!r}")


def __delattr__(self: Any, name: str) -> None:
    from dataclasses import FrozenInstanceError

    raise FrozenInstanceError(f"cannot delete field {name!r}")


def _values(self: Any) -> tuple[Any, ...]:
    return tuple(getattr(self, name) for name in _of(self))


def __eq__(self: Any, other: object) -> Any:
    return _values(self) == _values(other) if type(other) is type(self) else NotImplemented


def __hash__(self: Any) -> int:
    return hash(_values(self))


def __repr__(self: Any) -> str:
    shown = ", ".join(f"{name}={getattr(self, name)!r}" for name in _of(self))
    return f"{type(self).__qualname__}({shown})"


# --- what is asked of instances ----------------------------------------------------------------------


def _is_ours(cls: type) -> bool:
    """False for a standard dataclass, also for one that inherits ours: it has fields that we do not know."""
    spaces = (vars(each) for each in cls.__mro__)
    return _OURS in next((space for space in spaces if "__dataclass_fields__" in space), {})


def _plain(value: Any) -> Any:
    cls = type(value)
    if hasattr(cls, _OURS) and _is_ours(cls):
        return {name: _plain(getattr(value, name)) for name in _of(value)}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if cls in (list, tuple):
        return cls(map(_plain, value))
    if hasattr(cls, "__dataclass_fields__"):
        import dataclasses

        return dataclasses.asdict(value)
    return value


if not TYPE_CHECKING:

    def dataclass(cls=None, /, *, frozen=False, kw_only=False):
        """As the standard one; `frozen=True` has to be said."""
        if cls is not None:
            return _declare(cls, frozen, kw_only)
        return lambda cls: _declare(cls, frozen, kw_only)

    def field(*, default=_MISSING, default_factory=None):
        """As the standard one."""
        return default if default_factory is None else _Made(default_factory)

    def fields(thing):
        """The fields; `name` is all that both kinds of them have."""
        if _is_ours(thing if isinstance(thing, type) else type(thing)):
            return tuple(_of(thing).values())
        import dataclasses

        return dataclasses.fields(thing)

    def asdict(thing):
        """As the standard one; values that are no container are not copied."""
        return _plain(thing)

    def replace(thing, /, **changes):
        """As the standard one."""
        return type(thing)(**{each.name: getattr(thing, each.name) for each in fields(thing)} | changes)
