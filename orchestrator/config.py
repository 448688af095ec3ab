"""Layers of configuration, resolved: base → named → user file → environment → key=value.

What it is
    `resolve` is pure: named layers of text in, a checked `Config` and the origin of every value out.
    `load` is the edge: it finds and reads the files and the environment, then calls `resolve`.

How to use it
    found = load("local", ["training.cpus=2"])
    found.config.training.cpus, found.origin("training.cpus")   # 2, "command line"

What it does not do
    It compares no values with each other (`orchestrator.plan` does) and knows no key by name: which keys
    there are and what they take is the schema's business (`orchestrator.config_keys`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator import plain_yaml, resources
from orchestrator.config_keys import Key, keys, nearest, sections
from orchestrator.errors import ConfigError
from orchestrator.frozen import dataclass
from orchestrator.plain_yaml import NULL, Node, NotPlain, Scalar, Section
from orchestrator.plain_yaml import Sequence as Items
from orchestrator.schema import Config
from orchestrator.typed import Invalid, Problem

PREFIX = "ORCHESTRATE__"
DEFAULT = "default"


@dataclass(frozen=True)
class Entry:
    """One value as some layer gave it. `where` is file:line, a variable's name, or "command line"."""

    name: str
    value: Any
    layer: str
    where: str


@dataclass(frozen=True)
class Resolved:
    """A checked configuration, and where each value that is not a default came from."""

    config: Config
    entries: dict[str, Entry]
    name: str = ""

    def origin(self, key: str) -> str:
        """Where a key's value came from: "config/dev.yaml:12", a variable, "command line", "default"."""
        return self.entries[key].where if key in self.entries else DEFAULT

    def provenance(self) -> dict[str, dict[str, str]]:
        """{key: {"layer", "where"}} for every key, for `config.provenance.json`."""
        usual = {"layer": DEFAULT, "where": DEFAULT}
        given = {n: {"layer": e.layer, "where": e.where} for n, e in self.entries.items()}
        return dict(sorted((dict.fromkeys(keys(), usual) | given).items()))


# --- the edge: files and environment -----------------------------------------------------------------


def load(
    name: str | None, assignments: Sequence[str] = (), environ: Mapping[str, str] | None = None
) -> Resolved:
    """Read every layer and resolve it. `name` is a configuration's name or path; None means base only.

    Raises ConfigError with everything that is wrong, one line each.
    """
    environ = os.environ if environ is None else environ
    entries: list[Entry] = []
    problems: list[str] = []
    files = [("base", resources.find_config("base")), *_named(name), *_user_file(environ)]
    for layer, path in files:
        _collect(from_yaml(_read(path), layer, _short(path)), entries, problems)
    _collect(from_environment(environ), entries, problems)
    _collect(from_assignments(assignments), entries, problems)
    return resolve(entries, problems, name or "base")


def _named(name: str | None) -> list[tuple[str, Path]]:
    """The named configuration and what it extends, the most general first."""
    chain: list[Path] = []
    while name is not None:
        path = resources.find_config(name, chain[-1].parent if chain else None)
        if path.resolve() in [p.resolve() for p in chain]:
            names = " → ".join(p.stem for p in [*chain, path])
            raise ConfigError([f"{_short(path)}: `extends` goes round in a circle: {names}; remove one"])
        chain.append(path)
        name = _extends(path)
    base = resources.find_config("base").resolve()
    return [("config", path) for path in reversed(chain) if path.resolve() != base]


def _extends(path: Path) -> str | None:
    root = _compose(_read(path), _short(path))
    if isinstance(root, Section):
        for key, value in root.value:
            if key.value == "extends" and isinstance(value, Scalar):
                return str(value.value)
    return None


def user_file(environ: Mapping[str, str]) -> Path:
    """Where a user's own settings are: `$XDG_CONFIG_HOME/orchestrate/config.yaml`, or below ~/.config."""
    home = Path(environ.get("HOME") or Path.home())
    folder = environ.get("XDG_CONFIG_HOME") or str(home / ".config")
    return Path(folder) / "orchestrate" / "config.yaml"


def _user_file(environ: Mapping[str, str]) -> list[tuple[str, Path]]:
    path = user_file(environ)
    return [("user", path)] if path.is_file() else []


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path} cannot be read as text: {error}"]) from error


def _short(path: Path) -> str:
    """The path as people know it: relative to here where it is below."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


# --- text → entries ----------------------------------------------------------------------------------


def _collect(found: Iterable[Entry | str], entries: list[Entry], problems: list[str]) -> None:
    for item in found:
        if isinstance(item, Entry):
            entries.append(item)
        else:
            problems.append(item)


def from_yaml(text: str, layer: str, source: str) -> Iterator[Entry | str]:
    """Every value of one file, or a line saying what is wrong with it."""
    root = _compose(text, source)
    if root is None:
        return
    if not isinstance(root, Section):
        yield f"{source}: expected sections with keys below them, like `training:`"
        return
    yield from _walk(root, "", layer, source)


def _compose(text: str, source: str) -> Node | None:
    """What most files are, quickly; the library reads the rest, and has the better errors."""
    with contextlib.suppress(NotPlain):
        return plain_yaml.read(text)
    import yaml

    with contextlib.suppress(yaml.YAMLError):  # libyaml is ten times as fast
        quick: Node | None = _ours(yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))
        return quick
    try:
        node: Node | None = _ours(yaml.compose(text, Loader=yaml.SafeLoader))
        return node
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark else source
        raise ConfigError([f"{where}: not YAML: {getattr(error, 'problem', error)}"]) from error


_DEEP = 9
"""No key is below so many others; what refers to itself has no bottom."""


def _ours(node: Any, depth: int = 0) -> Any:
    """A node of the library as one of ours."""
    import yaml

    if isinstance(node, yaml.MappingNode) and depth < _DEEP:
        return Section([(_ours_scalar(key), _ours(value, depth + 1)) for key, value in node.value])
    if isinstance(node, yaml.SequenceNode) and depth < _DEEP:
        return Items([_ours(item, depth + 1) for item in node.value])
    return None if node is None else _ours_scalar(node)


def _ours_scalar(node: Any) -> Scalar:
    def read() -> Any:
        import yaml

        try:
            return yaml.SafeLoader("").construct_object(node, deep=True)
        except yaml.YAMLError as error:  # a tag that is unknown
            raise ValueError(str(error)) from error

    return Scalar(node.value, node.tag, read, node.start_mark.line)


def _walk(node: Section, prefix: str, layer: str, source: str) -> Iterator[Entry | str]:
    seen: set[str] = set()
    for key_node, value in node.value:
        where = f"{source}:{key_node.line + 1}"
        name = f"{prefix}{key_node.value}"
        if name in seen:
            yield f"{where}: {name} is given twice in this file; keep one"
        elif not (name == "extends" and layer == "config"):
            yield from _entry(name, value, layer, where, source)
        seen.add(name)


def _entry(name: str, node: Node, layer: str, where: str, source: str) -> Iterator[Entry | str]:
    key = find_key(name)
    if name in sections() or (key is not None and key.is_mapping and name == key.name):
        if isinstance(node, Section):
            yield from _walk(node, f"{name}.", layer, source)
        elif not _is_null(node):
            yield f"{where}: {name} is a section; set {_example(name)}"
    elif key is None:
        yield f"{where}: unknown key {name}{_suggest(name)}"
    else:
        try:
            yield Entry(name, _value(key, node), layer, where)
        except ValueError as error:
            yield f"{where}: {name} takes {key.allowed}; got {error}"


def find_key(name: str) -> Key | None:
    """The key of this name, or the open mapping that the name lies in."""
    parent = keys().get(name.rpartition(".")[0])
    return keys().get(name) or (parent if parent is not None and parent.is_mapping else None)


def _example(section: str) -> str:
    first = next((n for n in keys() if n.startswith(f"{section}.")), f"{section}.NAME")
    return f"a key below it, like {first}"


def _suggest(name: str) -> str:
    found = nearest(name)
    return f"; did you mean {' or '.join(found)}?" if found else "; `orchestrate config keys` lists every key"


def _is_null(node: Node) -> bool:
    return isinstance(node, Scalar) and node.tag == NULL


def _value(key: Key, node: Node) -> Any:
    """What a node says for this key. Text stays as it was written. Raises ValueError with what it got."""
    if isinstance(node, Section):
        raise ValueError("a mapping")
    if isinstance(node, Items):
        if not key.is_list or not all(isinstance(item, Scalar) for item in node.value):
            raise ValueError("a list" if not key.is_list else "a list of lists or mappings")
        return [item.value for item in node.value]
    if key.is_list or (_is_null(node) and not key.nullable and not key.is_text):
        raise ValueError(f"`{node.value}`")
    if key.is_text or key.is_mapping:
        return None if _is_null(node) and key.nullable else "" if _is_bare_null(node) else node.value
    return _scalar(key, node)


def _is_bare_null(node: Node) -> bool:
    return _is_null(node) and node.value in ("", "~", "null")


def _scalar(key: Key, node: Scalar) -> Any:
    try:
        value = node.read()
    except ValueError as error:  # a tag that is unknown, or a date that is none
        raise ValueError(f"`{node.value}`") from error
    if isinstance(value, bool) and not key.is_flag:
        raise ValueError(f"`{node.value}`")
    if key.is_flag and not isinstance(value, bool) and not (value is None and key.nullable):
        raise ValueError(f"`{node.value}`")
    return value


def from_environment(environ: Mapping[str, str]) -> Iterator[Entry | str]:
    """`ORCHESTRATE__SECTION__KEY=value`. Names below an open mapping keep their case."""
    for variable in sorted(environ):
        if variable.startswith(PREFIX):
            name = _variable_key(variable)
            yield from _assigned(name, environ[variable], "environment", f"environment {variable}")


def _variable_key(variable: str) -> str:
    parts = variable.removeprefix(PREFIX).split("__")
    for cut in range(1, len(parts)):
        key = keys().get(".".join(parts[:cut]).lower())
        if key is not None and key.is_mapping:
            return f"{key.name}.{'__'.join(parts[cut:])}"
    return ".".join(parts).lower()


def from_assignments(assignments: Sequence[str]) -> Iterator[Entry | str]:
    """`key=value` as on the command line."""
    for text in assignments:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            yield f"command line: {text!r} is no assignment; write key=value, like training.nodes=2"
        else:
            yield from _assigned(name.strip(), value, "command line", "command line")


def _assigned(name: str, text: str, layer: str, where: str) -> Iterator[Entry | str]:
    key = find_key(name)
    if (key is not None and key.name != name) or (key is not None and key.is_text and not key.nullable):
        yield Entry(name, text, layer, where)  # text needs no YAML: what was typed is what is meant
        return
    try:
        node = _compose(text, where)
    except ConfigError as error:
        yield f"{where}: {name}={text} is not YAML: {getattr(error.__cause__, 'problem', error)}"
        return
    empty = Scalar("", NULL, lambda: None)
    for found in _entry(name, node or empty, layer, where, where):
        yield found if isinstance(found, str) else Entry(found.name, found.value, layer, where)


# --- entries → configuration -------------------------------------------------------------------------


def resolve(entries: Iterable[Entry], problems: Iterable[str] = (), name: str = "") -> Resolved:
    """Put the layers over each other (a later entry wins) and check every value against the schema.

    Raises ConfigError with the given problems and its own.
    """
    winners = {entry.name: entry for entry in entries}
    tree: dict[str, Any] = {}
    for entry in winners.values():
        _put(tree, entry)
    try:
        config = Config.model_validate(tree)
    except Invalid as error:
        wrong = [_explain(problem, winners) for problem in error.problems]
        raise ConfigError(dict.fromkeys([*problems, *wrong])) from error
    if found := list(problems):
        raise ConfigError(found)
    return Resolved(config, winners, name)


def _put(tree: dict[str, Any], entry: Entry) -> None:
    key = find_key(entry.name)
    assert key is not None  # entries are only made for keys that exist
    *path, last = [*key.name.split("."), *([entry.name[len(key.name) + 1 :]] if key.is_mapping else [])]
    for part in path:
        tree = tree.setdefault(part, {})
    tree[last] = entry.value


def _explain(problem: Problem, entries: Mapping[str, Entry]) -> str:
    """One line for one wrong value."""
    key, entry = find_key(problem.name), entries.get(problem.name)
    where = f"{entry.where}: " if entry else ""
    if problem.sentence or key is None:
        return f"{where}{problem}"
    return f"{where}{problem.name} takes {key.allowed}; got `{problem.got}`"


def dump(config: Config) -> str:
    """The configuration as YAML, complete; `load` of that file gives the same configuration."""
    return plain_yaml.write(config.model_dump(mode="json"))
