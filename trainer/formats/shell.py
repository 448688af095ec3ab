"""The shell format: a bare shell session, for small models that know no chat template.

What it is
    "$ " asks, one line answers, the output follows, "$ " asks again. The newline ends the action and
    belongs to the policy; the output and the next "$ " are observed.

What it does not do
    No tools: what is typed is a command line. Messages of a task are joined to one text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from trainer.errors import TaskError
from trainer.formats import Action, Prompt, Tokenizer, bounded

if TYPE_CHECKING:
    from trainer.engines import Sample


class Shell:
    """See the module's docstring; implements `trainer.formats.Format`."""

    PROMPT = "$ "
    has_closing_action = False

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises TaskError when a newline is not one token: an action could not end there."""
        self._tokenizer = tokenizer
        newline = tokenizer.encode("\n")
        if len(newline) != 1:
            raise TaskError(f"the shell format needs a newline to be one token, here it is {newline}")
        self.stop_token_ids: tuple[int, ...] = (newline[0],)

    def prompt(self, prompt: Prompt, tools: Sequence[str] | None = None) -> list[int]:
        text = prompt if isinstance(prompt, str) else "\n".join(str(said["content"]) for said in prompt)
        return self._tokenizer.encode(text if text.endswith(self.PROMPT) else f"{text}\n{self.PROMPT}")

    def action(self, sample: Sample) -> Action:
        text = self._tokenizer.decode(sample.ids)
        if sample.finish_reason != "stop":
            return Action(text, complete=False)
        # A shell drops NUL bytes from what is typed; no command line can carry them.
        line = self._tokenizer.decode(sample.ids[:-1]).replace("\0", "").strip()
        if line in ("exit", "logout"):
            return Action(text, last=True, answer=line)
        return Action(text, line or None, last=sample.ids[-1] not in self.stop_token_ids, answer=line)

    def line(self, command: str) -> list[int]:
        """The ids of a whole action, as a policy would sample it."""
        return [*self._tokenizer.encode(command), *self.stop_token_ids]

    def reply(self, action: Action, outputs: Sequence[bytes], limit: int) -> tuple[str, list[int]]:
        return self.observation(b"".join(outputs), limit)

    def observation(self, output: bytes, limit: int) -> tuple[str, list[int]]:
        """A command's output and the next "$ ": text, and its ids."""
        text = bounded(output, limit).decode(errors="replace")
        text += "\n" if text and not text.endswith("\n") else ""
        return text + self.PROMPT, self._tokenizer.encode(text + self.PROMPT)
