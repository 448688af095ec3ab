"""What the tests of the chat format share: a byte-level tokenizer with chat templates, for the tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rollout_kit import tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

END, PAD, START = 256, 257, 258
"""Ids of <|im_end|>, <|endoftext|> and <|im_start|>; those below are bytes."""

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORGETS = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
"""Drops what was thought in earlier turns, as several reasoning models' templates do."""
TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}"
    "Answer with <tool_call>.<|im_end|>\n{% endif %}" + CHATML
)


def bytes_tokenizer(template: str = CHATML, merges: list[tuple[str, str]] | None = None) -> Any:
    """A Hugging Face tokenizer whose ids below 256 are bytes, as the built-in model's are."""
    alphabet = _printable()
    vocabulary = {alphabet[byte]: byte for byte in range(256)}
    for number, (first, second) in enumerate(merges or []):
        vocabulary[first + second] = 300 + number
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=merges or []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    made.chat_template = template
    return made


def _printable() -> dict[int, str]:
    """The character that byte-level BPE writes for each byte (GPT-2)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + n) for n, byte in enumerate(rest)}


def chat_model(folder: Path, template: str = CHATML) -> Path:
    """The built-in model, untrained, with such a tokenizer beside it: a Hugging Face directory."""
    tiny().save_pretrained(folder)
    bytes_tokenizer(template).save_pretrained(folder)
    return folder
