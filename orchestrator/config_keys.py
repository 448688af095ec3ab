"""Every key of the configuration as data: name, type, default, what it allows, what it means.

What it is
    The schema (`orchestrator.schema`) walked once. `orchestrator.config` asks it which keys exist and how
    to read their values, `orchestrate config keys` and docs/reference/config.md are printed from it.

How to use it
    keys()["training.nodes"].allowed   # "a whole number, at least 1"

What it does not do
    No files of configuration and no values; the texts come from the docstrings beside the fields.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import itertools
import types
import typing
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

from orchestrator.quantities import clock, parse_mebibytes, parse_seconds
from orchestrator.schema import Config

_BOUNDS = (("ge", "at least"), ("gt", "more than"), ("le", "at most"), ("lt", "less than"))
_PATTERNS = {
    r"^[A-Za-z0-9._-]{1,40}$": "1 to 40 letters, digits, dots, dashes or underscores",
    r"^[A-Z0-9]+@\d+$": "SIGNAL@SECONDS, like USR1@90",
}


@dataclass(frozen=True)
class Key:
    """One key. `name` is dotted; `section` is the part before the last dot."""

    name: str
    annotation: Any
    field: FieldInfo
    doc: str

    @property
    def section(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def default(self) -> Any:
        return self.field.get_default(call_default_factory=True)

    @property
    def options(self) -> list[Any]:
        """The types this key takes: more than one when null is allowed."""
        is_union = typing.get_origin(self.annotation) in (types.UnionType, typing.Union)
        return [_bare(a) for a in typing.get_args(self.annotation)] if is_union else [_bare(self.annotation)]

    @property
    def nullable(self) -> bool:
        return type(None) in self.options

    @property
    def is_text(self) -> bool:
        """True when a scalar is taken as it is written, not as what YAML makes of it (no, 1e3, 12:30)."""
        return any(_is_text(option) for option in self.options) or self.converter is not None

    @property
    def is_mapping(self) -> bool:
        """True for an open mapping: names below this key are the user's own."""
        return any(typing.get_origin(option) is dict for option in self.options)

    @property
    def is_list(self) -> bool:
        return any(typing.get_origin(option) is list for option in self.options)

    @property
    def converter(self) -> Any:
        """`parse_mebibytes` or `parse_seconds` for a size or a duration, else None."""
        return next((m.func for m in self.field.metadata if isinstance(m, BeforeValidator)), None)

    @property
    def allowed(self) -> str:
        """What the key takes, for people."""
        return _kind(self) + _bounds(self) + (", or null" if self.nullable else "")

    @property
    def shown_default(self) -> str:
        """The default as one would write it."""
        return shown(self, self.default)


def shown(key: Key, value: Any) -> str:
    """A value as one would write it: sizes and durations with their units."""
    if key.converter is parse_mebibytes:
        return f"{value // 1024}G" if value % 1024 == 0 else f"{value}M"
    if key.converter is parse_seconds:
        return clock(value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value) if value != "" else '""'


def _bare(annotation: Any) -> Any:
    return typing.get_args(annotation)[0] if typing.get_origin(annotation) is typing.Annotated else annotation


def _is_text(option: Any) -> bool:
    if typing.get_origin(option) is Literal:
        return all(isinstance(choice, str) for choice in typing.get_args(option))
    return option is str


def _kind(key: Key) -> str:
    if key.converter is not None:
        return (
            "MiB, or a size like 4G"
            if key.converter is parse_mebibytes
            else "seconds, or like 45m, 2h, 1-12:00:00"
        )
    option = next(o for o in key.options if o is not type(None))
    if typing.get_origin(option) is Literal:
        return "one of " + ", ".join(str(choice) for choice in typing.get_args(option))
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    if key.is_list:
        return "a list, like [a, b]"
    return "names with values" if key.is_mapping else names[option]


def _bounds(key: Key) -> str:
    """Bounds live in the field, or in the annotation of one option of a union."""
    nested = [m for a in typing.get_args(key.annotation) for m in getattr(a, "__metadata__", ())]
    metadata = [m for found in [*key.field.metadata, *nested] for m in getattr(found, "metadata", [found])]
    words = [
        f", {word} {bound:g}"
        for attribute, word in _BOUNDS
        for found in metadata
        if (bound := getattr(found, attribute, None)) is not None and key.converter is None
    ]
    patterns = [p for found in metadata if (p := getattr(found, "pattern", None))]
    return "".join(words) + "".join(f": {_PATTERNS.get(p, p)}" for p in patterns)


# --- walking the schema ------------------------------------------------------------------------------


@cache
def keys() -> dict[str, Key]:
    """Every key by its dotted name, in the order of the schema."""
    return {key.name: key for key in _walk(Config, "")}


@cache
def sections() -> dict[str, str]:
    """Every section by its dotted name, with what it is about."""
    return dict(_sections(Config, ""))


def _walk(model: type[BaseModel], prefix: str) -> typing.Iterator[Key]:
    hints = typing.get_type_hints(model, include_extras=True)
    docs = _field_docs(model)
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _walk(field.annotation, f"{prefix}{name}.")
        else:
            yield Key(f"{prefix}{name}", _bare(hints[name]), field, docs.get(name, ""))


def _sections(model: type[BaseModel], prefix: str) -> typing.Iterator[tuple[str, str]]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            own = vars(field.annotation).get("__doc__")
            yield f"{prefix}{name}", inspect.cleandoc(own) if own else ""
            yield from _sections(field.annotation, f"{prefix}{name}.")


def _field_docs(model: type[BaseModel]) -> dict[str, str]:
    """The string below each field, of the class and its bases."""
    docs: dict[str, str] = {}
    for owner in reversed(model.__mro__):
        if issubclass(owner, BaseModel) and owner.__module__.startswith("orchestrator."):
            (tree,) = ast.parse(inspect.getsource(owner)).body
            assert isinstance(tree, ast.ClassDef)
            docs |= _docs_below(tree.body)
    return docs


def _docs_below(body: list[ast.stmt]) -> dict[str, str]:
    docs = {}
    for field, below in itertools.pairwise(body):
        is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and is_text:
            docs[field.target.id] = inspect.cleandoc(str(below.value.value))  # type: ignore[attr-defined]
    return docs


# --- finding what was meant --------------------------------------------------------------------------


def nearest(unknown: str) -> list[str]:
    """Up to three keys or sections that were probably meant, best first."""
    names = [*keys(), *sections()]
    last = unknown.rpartition(".")[2]
    same_end = [n for n in names if n.rpartition(".")[2] == last]
    close = difflib.get_close_matches(unknown, names, n=3, cutoff=0.75)
    ends = {n.rpartition(".")[2] for n in names}
    close_end = difflib.get_close_matches(last, ends, n=2, cutoff=0.75)
    by_end = [n for end in close_end for n in names if n.rpartition(".")[2] == end]
    return list(dict.fromkeys([*same_end, *close, *by_end]))[:3]


# --- the reference page ------------------------------------------------------------------------------


def markdown() -> str:
    """docs/reference/config.md, whole."""
    parts = [_PREAMBLE]
    for section, about in sections().items():
        rows = [k for k in keys().values() if k.section == section]
        parts.append(f"\n## {section}\n\n" + (f"{about}\n\n" if about else "") + _table(rows))
    return "".join(parts)


def _table(rows: list[Key]) -> str:
    lines = ["| key | default | takes | meaning |", "|---|---|---|---|"]
    lines += [f"| `{k.name}` | `{k.shown_default}` | {k.allowed} | {k.doc} |" for k in rows]
    return "\n".join(lines) + "\n"


_PREAMBLE = """\
# Configuration keys

Every key that `config.yaml` understands. This page is printed from the schema
(`orchestrate config keys --markdown > docs/reference/config.md`); a test holds it current.

Values come in layers; a later one wins, and `orchestrate config show` says where each came from:

1. the defaults below
2. `config/base.yaml`
3. the configuration named by `--config` (and what it `extends`)
4. `~/.config/orchestrate/config.yaml`
5. environment variables: `ORCHESTRATE__TRAINING__NODES=2`
6. `key=value` on the command line: `training.nodes=2`

An unknown key is an error. Values on the command line and in the environment are read as YAML: `true`,
`3e-4`, `[a, b]`, `null`. Names under `environment.variables` are added up over the layers. Relative
paths are taken from where `orchestrate` is called.
"""
