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

from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from orchestrator.frozen import dataclass
from orchestrator.quantities import clock, parse_mebibytes, parse_seconds
from orchestrator.schema import Config
from orchestrator.typed import Field, Section

if TYPE_CHECKING:
    import ast

_BOUNDS = (("ge", "at least"), ("gt", "more than"), ("le", "at most"), ("lt", "less than"))
_PATTERNS = {
    r"^[A-Za-z0-9._-]{1,40}$": "1 to 40 letters, digits, dots, dashes or underscores",
    r"^([1-9]\d*(,[1-9]\d*)*)?$": "whole numbers from 1 on, with commas between",
}


@dataclass(frozen=True)
class Key:
    """One key. `name` is dotted; `section` is the part before the last dot."""

    name: str
    field: Field
    owner: type[Section]

    @property
    def doc(self) -> str:
        """The text below the field, read from the source: only where somebody wants to see it."""
        return _field_docs(self.owner).get(self.field.name, "")  # type: ignore[arg-type]  # a class has a hash

    @property
    def section(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def default(self) -> Any:
        return self.field.default

    @property
    def nullable(self) -> bool:
        return self.field.nullable

    @property
    def is_flag(self) -> bool:
        return self.field.type is bool

    @property
    def is_text(self) -> bool:
        """True when a scalar is taken as it is written, not as what YAML makes of it (no, 1e3, 12:30)."""
        return self.field.type in (str, Literal) or self.converter is not None

    @property
    def is_mapping(self) -> bool:
        """True for an open mapping: names below this key are the user's own."""
        return self.field.type is dict

    @property
    def is_list(self) -> bool:
        return self.field.type is list

    @property
    def converter(self) -> Any:
        """`parse_mebibytes` or `parse_seconds` for a size or a duration, else None."""
        return self.field.read

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
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if key.converter is parse_mebibytes:
        return f"{value // 1024}G" if value % 1024 == 0 else f"{value}M"
    if key.converter is parse_seconds:
        return clock(value)
    return str(value) if value != "" else '""'


def _kind(key: Key) -> str:
    if key.converter is not None:
        return (
            "MiB, or a size like 4G"
            if key.converter is parse_mebibytes
            else "seconds, or like 45m, 2h, 1-12:00:00"
        )
    if key.field.choices:
        return "one of " + ", ".join(key.field.choices)
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    if key.is_list:
        return "a list, like [a, b]"
    return "names with values" if key.is_mapping else names[key.field.type]


def _bounds(key: Key) -> str:
    words = [
        f", {word} {bound:g}"
        for attribute, word in _BOUNDS
        for limits in key.field.limits
        if (bound := getattr(limits, attribute)) is not None and key.converter is None
    ]
    patterns = [limits.pattern for limits in key.field.limits if limits.pattern]
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


def _walk(model: type[Section], prefix: str) -> Iterator[Key]:
    for name, field in model.model_fields.items():
        if field.section is not None:
            yield from _walk(field.section, f"{prefix}{name}.")
        else:
            yield Key(f"{prefix}{name}", field, model)


def _sections(model: type[Section], prefix: str) -> Iterator[tuple[str, str]]:
    for name, field in model.model_fields.items():
        if field.section is not None:
            own = vars(field.section).get("__doc__")
            yield f"{prefix}{name}", " ".join(own.split()) if own else ""
            yield from _sections(field.section, f"{prefix}{name}.")


@cache
def _field_docs(model: type[Section]) -> dict[str, str]:
    """The string below each field, of the class and its bases."""
    import ast  # these two only read docstrings, which a launch does not need
    import inspect

    docs: dict[str, str] = {}
    for owner in reversed(model.__mro__):
        if issubclass(owner, Section) and owner is not Section:
            (tree,) = ast.parse(inspect.getsource(owner)).body
            assert isinstance(tree, ast.ClassDef)
            docs |= _docs_below(tree.body)
    return docs


def _docs_below(body: list[ast.stmt]) -> dict[str, str]:
    import ast
    import itertools

    docs = {}
    for field, below in itertools.pairwise(body):
        is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and is_text:
            docs[field.target.id] = " ".join(str(below.value.value).split())  # type: ignore[attr-defined]
    return docs


# --- finding what was meant --------------------------------------------------------------------------


def nearest(unknown: str) -> list[str]:
    """Up to three keys or sections that were probably meant, best first."""
    import difflib

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
