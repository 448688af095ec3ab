"""Reading tool calls: what is malformed is told to the policy, and never raises."""

from __future__ import annotations

import random

import pytest

from trainer.formats import Call
from trainer.formats.calls import MOST_CALLS, read_calls

TOOLS = ["bash", "read", "edit", "submit"]


def tagged(body: str) -> str:
    return f"<tool_call>\n{body}\n</tool_call>"


def one(text: str, style: str = "json") -> Call:
    (call,) = read_calls(style, text, TOOLS)
    return call


def test_calls_in_their_order_with_text_around() -> None:
    text = (
        "Let me see."
        + tagged('{"name": "bash", "arguments": {"command": "ls\\n"}}')
        + "and"
        + tagged('{"name": "read", "arguments": "{\\"path\\": \\"a\\", \\"start\\": 2}"}')
    )
    assert read_calls("json", text, TOOLS) == (
        Call("bash", {"command": "ls\n"}),
        Call("read", {"path": "a", "start": 2}),
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("I am done.", "no tool call found"),
        (tagged("{'name': 'bash'}"), "not valid JSON"),
        ('<tool_call>{"name": "bash", "argu', "closing </tool_call> is missing, too"),
        (tagged('["bash"]'), '"name" and "arguments"'),
        (tagged('{"name": 3}'), '"name" and "arguments"'),
        (tagged('{"name": "browse", "arguments": {}}'), "no tool is called 'browse'; there are bash, read"),
        (tagged('{"name": "bash", "arguments": [1]}'), "must be a JSON object, here it is [1]"),
        (tagged('{"name": "bash", "arguments": "ls"}'), "a string that is not valid JSON"),
        (tagged('{"name": "bash", "arguments": {}}'), "bash needs 'command' as string, and it is missing"),
        (tagged('{"name": "bash", "arguments": {"command": 3}}'), "and it is 3"),
        (tagged('{"name": "read", "arguments": {"path": "a", "start": true}}'), "'start' as integer"),
        (tagged('{"name": "bash", "arguments": {"command": "a", "cwd": "b"}}'), "takes command, not cwd"),
        (tagged("[" * 100_000), "nested too deeply"),
        ("<think>" + tagged('{"name": "submit"}') + "</think>no", "no tool call found"),
    ],
)
def test_what_is_wrong_is_said(text: str, says: str) -> None:
    assert says in one(text).problem


def test_a_call_that_nothing_closes_but_is_whole_counts() -> None:
    assert one('<tool_call>{"name": "submit", "arguments": {}}') == Call("submit")
    two = '<tool_call>{"name": "submit"}<tool_call>{"name": "submit"}'
    assert len(read_calls("json", two, TOOLS)) == 2


def test_submit_beside_a_malformed_call_submits_nothing() -> None:
    calls = read_calls("json", tagged("{") + tagged('{"name": "submit"}'), TOOLS)
    assert all(call.problem for call in calls) and "not submitted" in calls[1].problem


def test_more_calls_than_one_answer_may_have() -> None:
    calls = read_calls("json", tagged('{"name": "bash", "arguments": {"command": "a"}}') * 50, TOOLS)
    assert len(calls) == MOST_CALLS + 1 and "only the first" in calls[-1].problem


def test_one_fenced_block() -> None:
    assert one("Look:\n```bash\nls\ncat a\n```\nok", "fenced") == Call("bash", {"command": "ls\ncat a\n"})
    assert one("```sh\n submit \n```", "fenced") == Call("submit")
    assert one("```bash\nls", "fenced") == Call("bash", {"command": "ls"})
    assert one("```python\nprint()\n```\n```bash\nls\n```", "fenced").tool == "bash"
    inside = one("```bash\ncat > a.md <<'X'\n text ``` here\nX\n```", "fenced")
    assert "``` here" in inside.arguments["command"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("ls", "here is none"),
        ("```bash\nls\n```\n```bash\npwd\n```", "here is 2 such blocks"),
        ("```bash\n\n```", "the block is empty"),
        ("```python\nprint()\n```", "here is none"),
    ],
)
def test_what_is_wrong_with_a_block_is_said(text: str, says: str) -> None:
    assert says in one(text, "fenced").problem


@pytest.mark.parametrize("style", ["json", "fenced"])
def test_whatever_is_said_there_is_an_answer(style: str) -> None:
    draw = random.Random(3)
    parts = ["<tool_call>", "</tool_call>", '{"name": "bash"', '"arguments": ', "{", "}", "```bash\n", "```"]
    parts += ["\n", "</think>", '"', "\\u0000", "NaN", "submit", "é", "\0"]
    for _ in range(3000):
        text = "".join(draw.choice(parts) for _ in range(draw.randrange(12)))
        calls = read_calls(style, text, TOOLS)
        assert calls and all(call.problem or call.tool in TOOLS for call in calls)
