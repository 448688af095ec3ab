"""Formats: how an agent's dialogue is written in tokens, and what its samples mean.

What it is
    A `Format` lies between token ids (the engine's side) and text (the workspace's side): how a task
    becomes the first ids, where an action ends, what it asks for, and how an observation becomes ids.
    `shell` is a bare shell session for small models that know no chat template; `chat` is the model's
    own chat template, with tools.

How to use it
    form = open_format(config, tokenizer, model_directory)
    ids = form.prompt(task.prompt); action = form.action(sample)
    text, more = form.reply(action, [output], 8192)

What it does not do
    No sampling (`trainer.engines`), no running of tools (`trainer.tools`). No format ever encodes what was
    decoded: a dialogue's ids are only appended to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from orchestrator.schema import Config
    from trainer.engines import Sample

KINDS = ("shell", "chat")
Prompt = str | Sequence[Mapping[str, Any]]
"""What a task asks: text, or messages {role, content}."""


class Tokenizer(Protocol):
    """Text to ids and back. `encode` must not turn text into special tokens."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True)
class Call:
    """One use of a tool that a sample asks for. With a `problem` it is malformed: nothing is run, and the
    policy is told the problem."""

    tool: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""


@dataclass(frozen=True)
class Action:
    """What a sample means, and how it reads.

    `command` (a line for a shell) or `calls` (of tools) say what to run; neither: nothing. `last`: the
    policy ends the episode here. `unclosed`: ids with which the sample should have ended and did not; they
    are put before the observation, and are not the policy's.
    """

    text: str
    command: str | None = None
    last: bool = False
    complete: bool = True  # False: the tokens ran out before the action ended
    calls: tuple[Call, ...] = ()
    unclosed: tuple[int, ...] = ()
    answer: str = ""
    """The text without the token that ends it, for a judge of answers."""


class Format(Protocol):
    """How an agent's dialogue is written in tokens."""

    stop_token_ids: tuple[int, ...]
    has_closing_action: bool
    """True when a policy is expected to end its episode itself; running out of turns is then a truncation."""

    def prompt(self, prompt: Prompt, tools: Sequence[str] | None = None) -> list[int]:
        """The ids that an episode starts with. `tools`: those of the task; None: those of the run."""

    def action(self, sample: Sample) -> Action:
        """What the policy wants."""

    def reply(self, action: Action, outputs: Sequence[bytes], limit: int) -> tuple[str, list[int]]:
        """What the policy sees next, up to where it acts again: text, and its ids.

        One output for the action's command or for each of its calls, each at most `limit` bytes here.
        """


def open_format(config: Config, tokenizer: Tokenizer, directory: Path) -> Format:
    """The format that a run's configuration asks for. Raises TaskError when the model cannot have it.

    `directory` holds the model, with its tokenizer and chat template.
    """
    if config.rollout.format == "shell":
        from trainer.formats.shell import Shell

        return Shell(tokenizer)
    from trainer.formats.chat import Chat
    from trainer.formats.template import Template

    rollout = config.rollout
    template = Template.load(directory, rollout.dialogue_template)
    return Chat(template, rollout.tools, rollout.tool_calls, rollout.system_prompt)


def bounded(output: bytes, limit: int, missing: int = 0) -> bytes:
    """At most `limit` bytes: the head when the limit is small, else head and tail with a mark between.

    `missing` bytes have been left out already, in the middle; the mark counts them too.
    """
    if len(output) + missing <= limit:
        return output
    mark = b"\n[... %d bytes left out ...]\n" % (len(output) + missing - limit)
    if limit < 4 * len(mark):
        return output[:limit]
    half = (min(limit, len(output)) - len(mark)) // 2
    return output[:half] + mark + output[-half:]
