"""A model's own chat template: messages to ids, and the proof that it can be used append-only.

What it is
    `Template` renders messages with the template that comes with the model's tokenizer. A dialogue is never
    rendered again: `opening` gives the ids of its start, `between` those that stand between an answer's last
    token and the place of the next answer. On making, it is proven on a sample dialogue that ids put together
    so are what the template would write of the whole; a template that rewrites what was said before (drops
    old reasoning, say) is refused with the place.

How to use it
    template = Template.load(directory)
    ids = template.opening(messages, tools); text, more = template.between(["output"], role="tool")

What it does not do
    It does not parse answers (`trainer.formats.calls`). Text of a task or of an observation never becomes a
    special token, whatever it holds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from trainer.errors import TaskError

Message = Mapping[str, Any]

_GUARD = 0xF0000
"""From here on, private characters stand for the text of special tokens while a template is rendered."""
_GUARDS = re.compile(r"([\U000F0000-\U000FFFFD])")
_QUESTION, _ANSWER, _SEEN = "one question", "one sampled answer", "one observation"
_THOUGHT = "<think>\na thought\n</think>\n\n"


class Template:
    """A Hugging Face tokenizer with a chat template; a `trainer.formats.Tokenizer`, too."""

    def __init__(self, inner: Any, stops: Sequence[int] = ()) -> None:
        """`inner` is the tokenizer, `stops` the ids that end a text besides its own. Raises TaskError."""
        self._inner = inner
        if not getattr(inner, "chat_template", None):
            raise TaskError(
                "the model's tokenizer has no chat template: take an instruction-tuned model, name a file "
                "in rollout.dialogue_template, or set rollout.format=shell"
            )
        special = [
            *inner.all_special_tokens,
            *(str(t) for t in inner.added_tokens_decoder.values() if t.special),
        ]
        self._special: list[str] = sorted(set(special), key=len, reverse=True)
        self.end = self._find_end()
        own = [inner.eos_token_id] if inner.eos_token_id is not None else []
        self.stop_token_ids = tuple(dict.fromkeys([self.end_id, *own, *stops]))

    @classmethod
    def load(cls, directory: Path, template: str = "") -> Self:
        """The tokenizer beside a model. `template`: a file that takes the place of its own template."""
        from transformers import AutoTokenizer

        try:
            inner = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
            if template:
                inner.chat_template = Path(template).read_text()
        except (OSError, ValueError, KeyError) as error:
            raise TaskError(f"{directory} holds no tokenizer that can be loaded: {error}") from error
        return cls(inner, _eos_ids(directory))

    def encode(self, text: str) -> list[int]:
        return list(self._inner.encode(text, add_special_tokens=False, split_special_tokens=True))

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._inner.decode(list(ids), clean_up_tokenization_spaces=False))

    @property
    def end_id(self) -> int:
        """The id of the token that ends an answer."""
        return int(self._inner.convert_tokens_to_ids(self.end))

    # --- a dialogue, piece by piece ---

    def opening(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """The ids of a dialogue's start, up to where the first answer begins. Raises TaskError."""
        return self._ids(self.text(messages, tools))

    def between(self, observations: Sequence[str], role: str) -> tuple[str, list[int]]:
        """What follows an answer's last token, up to where the next answer begins: text, and its ids."""
        text = self._between([{"role": role, "content": seen} for seen in observations])
        return self._plain(text), self._ids(text)

    def text(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), generate: bool = True
    ) -> str:
        """The template's words, with guards in place of special tokens that the messages hold."""
        guarded = [{**said, "content": self._guarded(said.get("content"))} for said in messages]
        try:
            rendered = self._inner.apply_chat_template(
                guarded, tools=list(tools) or None, tokenize=False, add_generation_prompt=generate
            )
        except Exception as error:  # a template is a program of its own and raises what it likes
            raise TaskError(f"the chat template refuses these messages: {error}") from error
        return str(rendered)

    def _between(self, observations: Sequence[Message]) -> str:
        said = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
        after = self.text([*said, *observations]).partition(_ANSWER)[2]
        if not after.startswith(self.end):
            raise TaskError(
                f"the chat template ends an answer with {after[:20]!r}, and before with {self.end!r}"
            )
        return after[len(self.end) :]

    def _find_end(self) -> str:
        """The special token that the template writes right after an answer."""
        said = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
        more = {"role": "user", "content": _QUESTION}
        after = self.text([*said, more]).partition(_ANSWER)[2]
        found = next((token for token in self._special if token and after.startswith(token)), None)
        if found is None:
            raise TaskError(
                f"the chat template writes {after[:20]!r} after an answer; a special token must stand there, "
                "for the policy ends its turn with it. Name another one in rollout.dialogue_template"
            )
        return found

    # --- what the template can do ---

    def observation_role(self, wanted: Sequence[str] = ("tool", "user")) -> str:
        """The first of these roles in which observations can be given append-only. Raises TaskError."""
        reasons = []
        for role in wanted:
            try:
                self._prove(role)
                return role
            except TaskError as error:
                reasons.append(f"as {role!r}: {error}")
        raise TaskError(
            "this model's chat template cannot be used for several turns. " + "; ".join(reasons) + ". "
            "Rollouts only append, so the policy would learn from a text that the template never writes: "
            "name a template that leaves alone what was said in rollout.dialogue_template, or set "
            "rollout.format=shell"
        )

    def takes(self, role: str) -> bool:
        """Whether a first message of this role is written at all."""
        messages = [{"role": role, "content": _SEEN}, {"role": "user", "content": _QUESTION}]
        try:
            return _SEEN in self.text(messages)
        except TaskError:
            return False

    def tells(self, tools: Sequence[Mapping[str, Any]]) -> bool:
        """Whether it tells these tools to the model, in the form of `<tool_call>` tags."""
        try:
            text = self.text([{"role": "user", "content": _QUESTION}], tools)
        except TaskError:
            return False
        return "<tool_call>" in text and all(tool["function"]["name"] in text for tool in tools)

    def _prove(self, role: str) -> None:
        """Two answers, the first with a thought, put together piece by piece, against the whole."""
        messages: list[Message] = [{"role": "user", "content": _QUESTION}]
        built = self.text(messages)
        opened = built.rstrip().endswith("<think>")
        thought = _THOUGHT.removeprefix("<think>\n") if opened else _THOUGHT
        for answer in (thought + _ANSWER, (thought if opened else "") + _ANSWER):
            seen = {"role": role, "content": _SEEN}
            built += answer + self.end + self._between([seen])
            messages += [{"role": "assistant", "content": answer}, seen]
        whole = self.text(messages)
        if whole != built:
            raise TaskError(_difference(built, whole))
        if built.count(_SEEN) != 2:
            raise TaskError("it does not write such messages")

    # --- text and ids ---

    def _guarded(self, content: Any) -> str:
        text = "" if content is None else str(content)
        for number, token in enumerate(self._special):
            text = text.replace(token, chr(_GUARD + number))
        return text

    def _plain(self, text: str) -> str:
        return _GUARDS.sub(lambda match: self._held(match[1]), text)

    def _held(self, guard: str) -> str:
        number = ord(guard) - _GUARD
        return self._special[number] if number < len(self._special) else guard

    def _ids(self, text: str) -> list[int]:
        """Special tokens of the template's own become ids, those that a guard stands for stay text."""
        ids: list[int] = []
        for number, part in enumerate(_GUARDS.split(text)):
            if number % 2:
                ids += self.encode(self._held(part))
            elif part:
                ids += self._inner.encode(part, add_special_tokens=False)
        return ids


def _difference(built: str, whole: str) -> str:
    """Where the whole leaves what was built, with a little of both."""
    at = next((n for n, (a, b) in enumerate(zip(built, whole, strict=False)) if a != b), None)
    at = min(len(built), len(whole)) if at is None else at
    start = max(0, at - 12)
    return (
        f"it rewrites history: the dialogue has {built[start : at + 24]!r} where the template, given the "
        f"whole, writes {whole[start : at + 24]!r}"
    )


def _eos_ids(directory: Path) -> list[int]:
    """Every end-of-sequence id that the model's files name; one, a list, or none."""
    ids: list[int] = []
    for name in ("generation_config.json", "config.json"):
        try:
            found = json.loads((directory / name).read_text()).get("eos_token_id")
        except (OSError, ValueError):
            continue
        ids += [found] if isinstance(found, int) else found or []
    return list(dict.fromkeys(ids))
