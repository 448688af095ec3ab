"""The tools that a policy may be given: their names, what they take, and how they are told to a model.

What it is
    Data: `TOOLS` by name, in the order in which they are told. `schema` is a tool in the form that chat
    templates take; `instructions` tells tools to a model whose template cannot.

What it does not do
    It runs nothing (`trainer.tools`) and reads no samples (`trainer.formats.calls`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainer.errors import TaskError


@dataclass(frozen=True)
class Parameter:
    """One argument of a tool. `kind` is a JSON type."""

    kind: str
    about: str
    required: bool = True


@dataclass(frozen=True)
class Tool:
    """A tool: what it does, in words for the policy, and its arguments by name."""

    name: str
    about: str
    parameters: dict[str, Parameter]


_PATH = Parameter("string", "The file; a relative path starts at the task's directory.")
TOOLS: dict[str, Tool] = {
    "bash": Tool(
        "bash",
        "Run a command in a shell and see its output.",
        {"command": Parameter("string", "What to run, one line or several.")},
    ),
    "read": Tool(
        "read",
        "Show a text file with line numbers.",
        {
            "path": _PATH,
            "start": Parameter("integer", "First line to show, counted from 1.", required=False),
            "lines": Parameter("integer", "How many lines to show.", required=False),
        },
    ),
    "edit": Tool(
        "edit",
        "Replace a piece of text in a file. It must be there exactly once, to the last space. "
        "With an empty `old`, a new file is made of `new`.",
        {
            "path": _PATH,
            "old": Parameter("string", "The text to replace; empty to make a new file."),
            "new": Parameter("string", "The text that takes its place."),
        },
    ),
    "submit": Tool("submit", "Say that the task is done. Nothing can be done after it.", {}),
}


def chosen(names: Sequence[str]) -> list[Tool]:
    """These tools, in the order of `TOOLS`. Raises TaskError on a name that there is not."""
    if unknown := sorted(set(names) - set(TOOLS)):
        raise TaskError(f"no tool is called {', '.join(unknown)}; there are {', '.join(TOOLS)}")
    return [tool for name, tool in TOOLS.items() if name in names]


def schema(tool: Tool) -> dict[str, Any]:
    """As chat templates take it: a function with a JSON schema."""
    properties = {name: {"type": p.kind, "description": p.about} for name, p in tool.parameters.items()}
    required = [name for name, parameter in tool.parameters.items() if parameter.required]
    parameters = {"type": "object", "properties": properties, "required": required}
    return {
        "type": "function",
        "function": {"name": tool.name, "description": tool.about, "parameters": parameters},
    }


def instructions(tools: Sequence[Tool], style: str) -> str:
    """How to use the tools, for a system message."""
    if style == "fenced":
        return _FENCED
    told = "\n".join(json.dumps(schema(tool)["function"]) for tool in tools)
    return _JSON.format(told=told)


_FENCED = """\
You work in a shell. Answer with exactly one fenced block, and it is run:
```bash
ls
```
Its output comes back to you. When the task is done, answer with a block that holds nothing but `submit`."""

_JSON = """\
You have these tools, one JSON object a line:
{told}
To use one, answer with a JSON object between tags:
<tool_call>
{{"name": "NAME", "arguments": {{"ARGUMENT": "VALUE"}}}}
</tool_call>
What it gave comes back to you. Several calls in one answer run in their order."""
