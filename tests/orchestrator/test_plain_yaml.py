"""The plain part of YAML: what is read is what the library reads, what is written is read back."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator import plain_yaml
from orchestrator.plain_yaml import Node, NotPlain, Scalar, Section

ROOT = Path(__file__).resolve().parents[2]


def ours(node: Node | None) -> Any:
    """What a node says: kinds, texts, tags, lines and values."""
    if isinstance(node, Section):
        return [(name.value, name.line, ours(value)) for name, value in node.value]
    if isinstance(node, Scalar):
        return (node.value, node.tag, node.read())
    return None if node is None else ("list", [ours(item) for item in node.value])


def theirs(node: Any) -> Any:
    if isinstance(node, yaml.MappingNode):
        return [(name.value, name.start_mark.line, theirs(value)) for name, value in node.value]
    if isinstance(node, yaml.ScalarNode):
        return (node.value, node.tag, yaml.SafeLoader("").construct_object(node))  # type: ignore[no-untyped-call]
    return None if node is None else ("list", [theirs(item) for item in node.value])


def same(text: str) -> bool:
    """Whether it is plain; fails where the library understands it in another way."""
    try:
        read = plain_yaml.read(text)
    except NotPlain:
        return False
    assert ours(read) == theirs(yaml.compose(text, Loader=yaml.SafeLoader)), repr(text)
    return True


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.yaml")), ids=lambda path: path.stem)
def test_our_own_configurations_are_plain(path: Path) -> None:
    assert same(path.read_text())


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "\n# only a comment\n",
            "a: 1\n\n  # more\nb:  yes # what\n",
            "a:\nb:\n  c:\n",
            "a: ''\nb: \"\"\n",
        ),
        *(
            "4",
            " 4 ",
            "[]",
            "[ ]",
            "[a, 'b c', \"d, #e\", 1, null, f g]",
            "a: [x]  # y",
            "a: b c/d:e",
            "true",
        ),
        *("a: 1.5e-06\nb: 3.0\nc: -7\nd: 0", "t: 12h\nm: 32G", "u: http://x:80/y", "x: 'a#b'\ny: \"c: d\""),
        *(
            "a: 1\na: 2",
            "off: 1\nnull: 2",
            "a:   \n    b: ~\n    c: NO",
            "name: y",
            '["a:$B \\u0020"]'[:6] + '"]',
        ),
    ],
)
def test_what_is_plain(text: str) -> None:
    assert same(text)


@pytest.mark.parametrize(
    "text",
    [
        *("- a", "a: {b: 1}", "a: |\n  b", "a: &x 1", "a: *x", "a: !!str 1", "---\na: 1", "a: 012"),
        *("a: 0x1f", "a: 1_000", "a: 12:30", "a: 2020-01-01", "a: .5", "a: 'it''s'", 'a: "\\n"', "a: b\n  c"),
        *(
            "a: b: c",
            "\ta: 1",
            "a:\t1",
            "a: [b",
            "a: [b,]",
            "a: [[b]]",
            "a: [b: c]",
            "? a",
            "<<: b",
            "a: b#c",
        ),
        *(
            "a: @b",
            "a: %b",
            "  a: 1",
            "a:\n    b: 1\n  c: 2",
            "a: x\n  b: 1",
            "'a': 1",
            "a: =",
            "a: \u0085",
            "a\r\n",
        ),
        *("a: 1\nb", "a: \ufeffb", "a: '", "a: b:", "a: -", "a: b :c", "%YAML 1.1", "a: [b c: d]", "1: 2"),
    ],
)
def test_what_is_left_to_the_library(text: str) -> None:
    with pytest.raises(NotPlain):
        plain_yaml.read(text)


PIECES = (
    *(
        "a",
        "b1",
        "yes",
        "No",
        "null",
        "~",
        "1",
        "-5",
        "0",
        "07",
        "1.5",
        "2.5e-3",
        "1e3",
        "4G",
        "12h",
        ".x",
        "/p/q",
    ),
    *(
        ":",
        ": ",
        ":  ",
        " ",
        "  ",
        "\n",
        "\n",
        "\n  ",
        "\n    ",
        "\n  ",
        " #",
        "# c",
        "'",
        '"',
        "'q r'",
        '"s: t"',
    ),
    *(
        "[",
        "]",
        ", ",
        ",",
        "[a, b]",
        "['x', 1]",
        "-",
        "- ",
        "=",
        "%",
        "@",
        "+",
        "\\",
        "{",
        "é",
        "on: ",
        "k:\n  ",
    ),
)


def test_no_text_is_read_in_another_way() -> None:
    """Random texts, mostly of lines like those that people write."""
    dice, plain = random.Random(11), 0
    for _ in range(30_000):
        lines = []
        for _ in range(dice.randint(1, 4)):
            start = dice.choice(("", "", "  ", "    ")) + dice.choice(("a: ", "b:", "c_d: ", "e:  ", ""))
            lines.append(start + "".join(dice.choices(PIECES, k=dice.randint(0, 3))))
        try:
            plain += same("\n".join(lines))
        except yaml.YAMLError as error:
            pytest.fail(f"the library refuses what we read: {lines!r}: {error}")
    assert plain > 3000


def test_what_is_written_is_read_back() -> None:
    dice = random.Random(12)
    letters = "ab /:#-'\"\\\n\t[]{},&*!|>%@`?=~0123.é\u0085\ufeff\u2028\U0001f600\x00\x7f y"
    texts = ["".join(dice.choices(letters, k=dice.randint(0, 6))) for _ in range(4000)]
    words = [
        "yes",
        "NO",
        "null",
        "~",
        "1",
        "1e5",
        "1.0",
        ".inf",
        "<<",
        "=",
        "012",
        "12:30",
        "2020-01-01",
        "y",
        "4G",
    ]
    numbers: list[Any] = [0, -7, 10**20, 0.1, 1e-06, 1e16, -2.5e-300, math.inf, -math.inf, True, False, None]
    data = {
        "texts": {f"k{i}": text for i, text in enumerate(texts)},
        "list": texts[:500] + words,
        "empty": {},
    }
    data |= {"words": {word: word for word in words}, "none": [], "numbers": dict(enumerate_names(numbers))}
    assert yaml.safe_load(plain_yaml.write(data)) == data


def enumerate_names(values: list[Any]) -> list[tuple[str, Any]]:
    return [(f"n{i}", value) for i, value in enumerate(values)]


def test_a_usual_launch_reads_and_writes_without_the_library() -> None:
    code = (
        "import sys\nfrom orchestrator.config import dump, load\n"
        "dump(load('dev', ['training.nodes=2', 'runtime.setup_commands=[\"module load x\"]']).config)\n"
        "print('yaml' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "False"
