"""The chat format: the model's own chat template, with tools.

What it is
    A task is a user's message (or the messages that it brings), an answer of the policy is one turn, and
    what its tool calls gave comes back as the next message. Calls are Qwen's and Hermes' JSON in
    `<tool_call>` tags, or one fenced block of bash. Ids are only appended: what was sampled stays as it was.

How to use it
    form = Chat(Template.load(directory), ["bash", "read", "edit", "submit"], "json")

What it does not do
    It runs no tool (`trainer.tools`). Without tools, the first answer is the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trainer.errors import TaskError
from trainer.formats import Action, Prompt, bounded
from trainer.formats.calls import STYLES, read_calls
from trainer.formats.template import Template
from trainer.formats.toolset import chosen, instructions, schema

if TYPE_CHECKING:
    from trainer.engines import Sample


class Chat:
    """See the module's docstring; implements `trainer.formats.Format`."""

    def __init__(
        self, template: Template, tools: Sequence[str] = (), style: str = "json", system: str = ""
    ) -> None:
        """Raises TaskError when the template cannot be used for several turns, append-only."""
        if style not in STYLES:
            raise TaskError(f"no style of tool calls is called {style!r}; choose one of {', '.join(STYLES)}")
        self._template, self._style, self._system = template, style, system
        self._tools = [tool.name for tool in chosen(tools)]
        self._role, self._has_system = "", template.takes("system")
        if self._tools:
            # Fenced blocks are a talk with the user; tool calls are answered by tools, where they can be.
            roles = ("tool", "user") if style == "json" else ("user", "tool")
            self._role = template.observation_role(roles)
        self.has_closing_action = "submit" in self._tools
        self.stop_token_ids = template.stop_token_ids

    def prompt(self, prompt: Prompt, tools: Sequence[str] | None = None) -> list[int]:
        """See `Format`. Raises TaskError when the template refuses the messages."""
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(map(dict, prompt))
        mine = chosen(self._tools if tools is None else [name for name in self._tools if name in tools])
        schemas = [schema(tool) for tool in mine]
        native = bool(mine) and self._style == "json" and self._template.tells(schemas)
        told = instructions(mine, self._style) if mine and not native else ""
        messages = self._introduced(asked, [self._system, told])
        return self._template.opening(messages, schemas if native else ())

    def _introduced(self, messages: list[dict[str, Any]], parts: Sequence[str]) -> list[dict[str, Any]]:
        """With these words first: in the system message, or, where there cannot be one, in the user's."""
        system = [str(messages.pop(0)["content"])] if messages and messages[0]["role"] == "system" else []
        words = "\n\n".join(part for part in (*parts[:1], *system, *parts[1:]) if part)
        if not words:
            return messages
        if self._has_system:
            return [{"role": "system", "content": words}, *messages]
        first, *rest = messages
        return [{**first, "content": f"{words}\n\n{first['content']}"}, *rest]

    def action(self, sample: Sample) -> Action:
        text = self._template.decode(sample.ids)
        if sample.finish_reason != "stop":
            return Action(text, complete=False)
        answer = self._template.decode(sample.ids[:-1])
        if not self._tools:
            return Action(text, last=True, answer=answer)
        calls = read_calls(self._style, answer, self._tools)
        names = [call.tool for call in calls if not call.problem]
        last = "submit" in names
        calls = calls[: names.index("submit")] if last else calls
        unclosed = () if sample.ids[-1] == self._template.end_id else (self._template.end_id,)
        return Action(text, calls=calls, last=last, unclosed=unclosed, answer=answer)

    def reply(self, action: Action, outputs: Sequence[bytes], limit: int) -> tuple[str, list[int]]:
        texts = [bounded(output, limit).decode(errors="replace") for output in outputs]
        if self._role == "user":
            texts = ["\n".join(map(self._framed, texts))]
        _, ids = self._template.between(texts, self._role)
        return "\n".join(texts), [*action.unclosed, *ids]

    def _framed(self, text: str) -> str:
        return text if self._style == "fenced" else f"<tool_response>\n{text}\n</tool_response>"
