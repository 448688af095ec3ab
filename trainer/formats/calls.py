"""Tool calls out of what a policy said: Qwen's and Hermes' JSON in tags, or one fenced block of bash.

What it is
    `read_calls` is a pure function of text. Whatever was said, it answers with at least one `Call`; what is
    wrong with a call is said in the call, in words for the policy, and is no error of ours.

How to use it
    calls = read_calls("json", text, ["bash", "submit"])

What it does not do
    It runs nothing. Reasoning (up to `</think>`) is skipped: what is only thought of is not asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from trainer.formats import Call
from trainer.formats.toolset import TOOLS

MOST_CALLS = 8
"""In one answer; what is more is not run, and the policy is told."""
STYLES = ("json", "fenced")

_CALL = re.compile(r"<tool_call>(.*?)(</tool_call>|(?=<tool_call>)|\Z)", re.DOTALL)
_BLOCK = re.compile(r"^```[ \t]*(\w*)[ \t]*\n(.*?)(?:^```[ \t]*$|\Z)", re.DOTALL | re.MULTILINE)
_EXAMPLE = '<tool_call>\n{"name": "bash", "arguments": {"command": "ls"}}\n</tool_call>'
_KINDS: dict[str, tuple[type, ...]] = {"string": (str,), "integer": (int,)}


def read_calls(style: str, text: str, tools: Sequence[str]) -> tuple[Call, ...]:
    """The calls in an answer, in order, at least one.

    A `submit` beside a malformed call submits nothing: the policy has not seen yet what went wrong.
    """
    said = text.rpartition("</think>")[2]
    found = _fenced(said, tools) if style == "fenced" else _tagged(said, tools)
    calls = [*found[:MOST_CALLS], *_too_many(len(found))]
    if any(call.problem for call in calls):
        return tuple(_held(call) for call in calls)
    return tuple(calls)


def _too_many(count: int) -> list[Call]:
    if count <= MOST_CALLS:
        return []
    return [Call(problem=f"{count} calls in one answer; only the first {MOST_CALLS} were run")]


def _held(call: Call) -> Call:
    if call.tool != "submit" or call.problem:
        return call
    return Call("submit", problem="not submitted, because another call of this answer was malformed")


# --- JSON in tags ------------------------------------------------------------------------------------


def _tagged(text: str, tools: Sequence[str]) -> list[Call]:
    found = [_one(match[1], bool(match[2]), tools) for match in _CALL.finditer(text)]
    if found:
        return found
    return [Call(problem=f"no tool call found. Call a tool like this:\n{_EXAMPLE}{_ending(tools)}")]


def _one(body: str, closed: bool, tools: Sequence[str]) -> Call:
    try:
        said = json.loads(body)
    except ValueError as error:
        end = "" if closed else " The closing </tool_call> is missing, too."
        return Call(problem=f"the call is not valid JSON: {error}.{end} Write it like this:\n{_EXAMPLE}")
    except RecursionError:
        return Call(problem="the call is nested too deeply to be read")
    if not isinstance(said, dict) or not isinstance(said.get("name"), str):
        return Call(problem=f'a call is a JSON object with "name" and "arguments", like this:\n{_EXAMPLE}')
    arguments = said.get("arguments", {})
    if isinstance(arguments, str):  # some models write the arguments as a string of JSON
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return Call(said["name"], problem='"arguments" is a string that is not valid JSON')
    return _checked(said["name"], arguments, tools)


def _checked(name: str, arguments: Any, tools: Sequence[str]) -> Call:
    if name not in tools:
        return Call(name[:40], problem=f"no tool is called {name[:40]!r}; there are {', '.join(tools)}")
    if not isinstance(arguments, dict):
        return Call(name, problem=f'"arguments" must be a JSON object, here it is {_short(arguments)}')
    wanted = TOOLS[name].parameters
    for key, parameter in wanted.items():
        if key not in arguments and not parameter.required:
            continue
        value = arguments.get(key)
        if not isinstance(value, _KINDS[parameter.kind]) or isinstance(value, bool):
            given = f"it is {_short(value)}" if key in arguments else "it is missing"
            return Call(name, problem=f"{name} needs {key!r} as {parameter.kind}, and {given}")
    if unknown := sorted(set(arguments) - set(wanted)):
        takes = ", ".join(wanted) or "nothing"
        return Call(name, problem=f"{name} takes {takes}, not {', '.join(unknown)[:80]}")
    return Call(name, arguments)


# --- fenced blocks -----------------------------------------------------------------------------------


def _fenced(text: str, tools: Sequence[str]) -> list[Call]:
    blocks = [match[2] for match in _BLOCK.finditer(text) if match[1] in ("bash", "sh", "shell")]
    if len(blocks) != 1:
        found = f"{len(blocks)} such blocks" if blocks else "none"
        example = "```bash\nls\n```"
        return [
            Call(
                problem=f"exactly one fenced block of bash is expected, here is {found}; nothing was run. "
                f"Answer like this:\n{example}{_ending(tools)}"
            )
        ]
    command = blocks[0].strip()
    if command == "submit" and "submit" in tools:
        return [Call("submit")]
    return [Call("bash", {"command": blocks[0]}) if command else Call("bash", problem="the block is empty")]


def _ending(tools: Sequence[str]) -> str:
    return "\nWhen the task is done, use submit." if "submit" in tools else ""


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
