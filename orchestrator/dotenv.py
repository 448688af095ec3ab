"""Reads a `.env` file: NAME=value lines, `export` allowed, quotes and comments as in a shell.

What it does not do
    It runs nothing, expands nothing and never puts a value into an error. Standard library only.
"""

from __future__ import annotations

import re
import shlex

from orchestrator.errors import ConfigError

_LINE = re.compile(r"^(?:export\s+)?(?P<name>[A-Za-z_][A-Za-z0-9_]*)\s*=\s*(?P<value>.*)$")


def parse_dotenv(text: str, source: str, reserved: str = "ORCHESTRATE_") -> dict[str, str]:
    """{name: value}. Raises ConfigError with file and line; names that start with `reserved` are refused."""
    found: dict[str, str] = {}
    problems = []
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        match = _LINE.match(line)
        if match is None:
            problems.append(f"{source}:{number}: expected NAME=value")
        elif match["name"].startswith(reserved):
            problems.append(f"{source}:{number}: {match['name']} is set by the launcher; remove the line")
        else:
            value = _unquote(match["value"])
            if value is None:
                problems.append(f"{source}:{number}: the quotes of {match['name']} do not match")
            else:
                found[match["name"]] = value
    if problems:
        raise ConfigError(problems)
    return found


def _unquote(text: str) -> str | None:
    """Double quotes take backslashes, single quotes take nothing, bare text ends at ` #`."""
    if text[:1] in ("'", '"'):
        lexer = shlex.shlex(text, posix=True, punctuation_chars="")
        lexer.whitespace_split, lexer.commenters = True, "#"
        try:
            words = list(lexer)
        except ValueError:
            return None
        return words[0] if len(words) == 1 else None
    return re.split(r"\s#", text, maxsplit=1)[0].strip()
