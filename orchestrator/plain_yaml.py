"""The plain part of YAML, read and written without the library, which takes longer to import than to use.

What it is
    `read` understands what configurations are written in: nested sections, one value a line, lists in
    brackets, quotes without escapes, comments. Anything else is NotPlain, and read by the library into the
    same nodes (`orchestrator.config`). `write` gives YAML that both read. A test compares them.
    Why: docs/design.md, "Dependencies".

How to use it
    root = read(text)            # a Node, None for an empty text; raises NotPlain
    write({"run": {"name": "dev", "seed": 1}})

What it does not do
    It guesses nothing: a value that it would have to know more rules for is NotPlain. No errors with places:
    the library's are better. Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

NULL = "tag:yaml.org,2002:null"
_BOOL, _INT, _FLOAT, _STR = (f"tag:yaml.org,2002:{name}" for name in ("bool", "int", "float", "str"))


class NotPlain(Exception):
    """This text needs the whole of YAML."""


class Scalar:
    """`value` is the text; `read` makes what YAML takes it for, and may raise what the library raises."""

    def __init__(self, value: Any, tag: str, read: Callable[[], Any], line: int = 0) -> None:
        self.value, self.tag, self.read, self.line = value, tag, read, line


class Sequence:
    def __init__(self, value: list[Node]) -> None:
        self.value = value


class Section:
    """`value` are names with nodes, in the order of the text, doubles included."""

    def __init__(self, value: list[tuple[Scalar, Node]]) -> None:
        self.value = value


Node = Scalar | Sequence | Section

# --- values ------------------------------------------------------------------------------------------

_IN_WORD = r"[A-Za-z0-9_./@%+~=-]"
_WORD = rf"{_IN_WORD}+(?::{_IN_WORD}+)*"
_PLAIN = re.compile(
    r"(?P<null>null|Null|NULL|~)"
    r"|(?P<true>yes|Yes|YES|true|True|TRUE|on|On|ON)|(?P<false>no|No|NO|false|False|FALSE|off|Off|OFF)"
    r"|(?P<int>-?(?:0|[1-9][0-9]*))"
    r"|(?P<float>-?[0-9]+\.[0-9]+(?:e[-+][0-9]+)?)"
    rf"|(?P<str>(?:[A-Za-z_/]|\.(?!inf|nan)[a-z_]){_IN_WORD}*(?::{_IN_WORD}+)*(?: {_WORD})*"
    r"|[1-9][0-9]*[A-Za-z]+|[1-9][0-9]*e[-+]?[0-9]+|[0-9]+(?:\.[0-9]+){2,})"
)
_QUOTES = r"""(?:"[^"\\]*"|'[^']*')"""
_ITEM = re.compile(rf" *({_QUOTES}|{_IN_WORD}+(?: {_IN_WORD}+)*) *(,|\Z)")


def _scalar(text: str) -> Scalar:
    """Of what stands there, without spaces around it and without a comment."""
    if text[:1] in ('"', "'"):
        return Scalar(text[1:-1], _STR, lambda: text[1:-1])
    match = _PLAIN.fullmatch(text)
    kind = match.lastgroup if match else None
    if kind == "str":
        return Scalar(text, _STR, lambda: text)
    if kind == "int":
        return Scalar(text, _INT, lambda: int(text))
    if kind == "float":
        return Scalar(text, _FLOAT, lambda: float(text))
    if kind in ("true", "false"):
        return Scalar(text, _BOOL, lambda: kind == "true")
    if kind == "null":
        return _null(text)
    raise NotPlain


def _null(text: str = "") -> Scalar:
    return Scalar(text, NULL, lambda: None)


def _value(text: str) -> Scalar | Sequence:
    if not text.startswith("["):
        return _scalar(text)
    inner, items = text[1:-1], list[Node]()
    at, more = 0, bool(inner.strip())
    while more:
        match = _ITEM.match(inner, at)
        if match is None:
            raise NotPlain
        items.append(_scalar(match[1]))
        at, more = match.end(), match[2] == ","
    return Sequence(items)


# --- lines -------------------------------------------------------------------------------------------

_VALUE = rf"""{_QUOTES}|\[(?:[^\[\]"'#]|{_QUOTES})*\]|[^\s"'\[#][^#]*?"""
_LINE = re.compile(rf"(?P<indent> *)(?P<name>[A-Za-z_][A-Za-z0-9_-]*):(?: +(?P<value>{_VALUE}))?(?: +#.*)? *")
_ALONE = re.compile(rf" *(?P<value>{_VALUE}) *")
_EMPTY = re.compile(r" *(?:#.*)?")


def read(text: str) -> Node | None:
    """The whole text as a node; None when there is nothing in it. Raises NotPlain."""
    lines = [(n, line) for n, line in enumerate(text.split("\n")) if not _EMPTY.fullmatch(line)]
    if not text.replace("\n", "").isprintable():
        raise NotPlain
    if not lines:
        return None
    if len(lines) == 1 and _LINE.fullmatch(lines[0][1]) is None and (alone := _ALONE.fullmatch(lines[0][1])):
        return _value(alone["value"])
    return _sections(lines)


def _sections(lines: list[tuple[int, str]]) -> Section:
    root = Section([])
    open_: list[tuple[int, Section]] = [(0, root)]
    for number, line in lines:
        match = _LINE.fullmatch(line)
        if match is None:
            raise NotPlain
        indent = len(match["indent"])
        while open_[-1][0] > indent:
            open_.pop()
        if open_[-1][0] < indent:
            open_.append((indent, _below(open_[-1][1])))
        found = match["value"]
        name = Scalar(match["name"], _STR, lambda: None, number)
        open_[-1][1].value.append((name, _value(found) if found is not None else _null()))
    return root


def _below(section: Section) -> Section:
    """A section in the place of the value that the last name has not got."""
    if not section.value:
        raise NotPlain
    name, value = section.value[-1]
    if not (isinstance(value, Scalar) and value.tag == NULL and value.value == ""):
        raise NotPlain
    below = Section([])
    section.value[-1] = (name, below)
    return below


# --- writing -----------------------------------------------------------------------------------------


def write(data: Mapping[str, Any]) -> str:
    """Sections, lists and values as YAML, a value a line."""
    return "".join(f"{line}\n" for line in _lines(data, ""))


def _lines(data: Mapping[str, Any], indent: str) -> list[str]:
    lines: list[str] = []
    for name, value in data.items():
        if isinstance(value, Mapping) and value:
            lines += [f"{indent}{_shown(name)}:", *_lines(value, f"{indent}  ")]
        elif isinstance(value, list) and value:
            lines += [f"{indent}{_shown(name)}:", *(f"{indent}- {_shown(item)}" for item in value)]
        else:
            lines.append(f"{indent}{_shown(name)}: {_shown(value)}")
    return lines


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return _text(value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return _number(value)
    return "{}" if isinstance(value, Mapping) else "[]" if isinstance(value, list) else str(value)


def _text(value: str) -> str:
    """As it is where that is read back as the same text, else in quotes."""
    match = _PLAIN.fullmatch(value)
    if match and match.lastgroup == "str":
        return value
    return '"' + "".join(c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in value) + '"'


def _number(value: float) -> str:
    """YAML takes 1e-06 for a text, and 1.0e-06 for a number."""
    text = repr(value)
    if text.lstrip("-") in ("inf", "nan"):
        return text.replace("inf", ".inf").replace("nan", ".nan")
    return text if "." in text else text.replace("e", ".0e")
