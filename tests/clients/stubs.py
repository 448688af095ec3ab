"""OpenHands' client modules without the gigabytes of packages that they import and never use for this.

What it is
    `install` makes every third-party module that is missing an empty one, whose attributes are classes that
    do nothing. What is installed stays real, and what libraries look for to choose a way of their own
    (tornado, brotli, trio …) stays missing.

What it does not do
    It touches nothing of OpenHands: the code under test is the package's own, byte for byte.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

_PROBED = frozenset(
    [
        "tornado",
        "brotli",
        "brotlicffi",
        "zstandard",
        "h2",
        "chardet",
        "cchardet",
        "orjson",
        "ujson",
        "sniffio",
        "socksio",
        "trio",
        "rich",
        "curio",
        "anyio",
        "rtoml",
        "simplejson",
        "email_validator",
        "dotenv",
        "colorama",
        "uvloop",
        "gi",
        "IPython",
        "black",
        "yapf",
        "isort",
        "_typeshed",
        "sphinx",
        "pydantic_settings",
        "annotationlib",
        "mypy",
    ]
)


class _Meta(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _class(name)

    def __iter__(cls) -> Iterator[Any]:
        return iter(())

    def __or__(cls, other: Any) -> Any:
        return cls

    __ror__ = __or__


class Stub(metaclass=_Meta):
    """Stands for whatever is missing: class, decorator, constant."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __call__(self, *args: Any, **_: Any) -> Any:
        return args[0] if args and callable(args[0]) else self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Stub()

    @classmethod
    def __class_getitem__(cls, _: Any) -> Any:
        return cls

    @classmethod
    def __get_pydantic_core_schema__(cls, *_: Any) -> Any:
        return {"type": "any"}


def _class(name: str) -> type[Stub]:
    bases = (Stub, Exception) if name.endswith(("Error", "Exception", "Warning")) else (Stub,)
    return _Meta(name, bases, {"__doc__": "A stub."})


class _Module(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _class(name)
        setattr(self, name, made)
        return made


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        top = name.partition(".")[0]
        if top == "openhands" or top in _PROBED or top.startswith("_") or top in sys.stdlib_module_names:
            return None
        if top in sys.modules and not isinstance(sys.modules[top], _Module):
            return None  # an installed package looks for an optional part of its own
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        made = _Module(spec.name)
        made.__path__ = []
        return made

    def exec_module(self, module: ModuleType) -> None: ...


def install() -> None:
    """After every real finder."""
    sys.meta_path.append(_Finder())
