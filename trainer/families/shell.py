"""Templated shell tasks: one command does each, and a small pretrained model finds it now and then.

What it is
    A task is a short dialogue (wishes, each answered by one fenced block) that ends with a wish of its own.
    Wishes are made from templates: count lines, take a field, rename, sum a column …, with files, words and
    numbers drawn from a seed. `training` and `validation` share no template: what is measured on the latter
    was not practised.

How to use it
    data.train=builtin:shell data.validation=builtin:shell-validation      (config/smollm2.yaml)

What it does not do
    It brings no system message: how commands are written is the format's business (`tool_calls: fenced`).
"""

from __future__ import annotations

import random
import shlex
from collections.abc import Callable
from dataclasses import dataclass

from trainer.tasks import Message, Reward, Setup, Task, text_of

WORKDIR = "/tmp/task"  # noqa: S108 - in the sandbox, which is the task's own
PER_TEMPLATE = 24
VALIDATION_PER_TEMPLATE = 8
EXAMPLES = (
    ("Write the name of this directory into here.txt", "pwd > here.txt"),
    ("Count the files here and write the number into count.txt", "ls | wc -l > count.txt"),
    ("Run cat -n on readme.txt and write its output into numbered.txt", "cat -n readme.txt > numbered.txt"),
)  # fmt: skip
"""What the dialogue shows before it asks. Plain text with "$ " at its end would be worse: the space before a
command belongs to its first token, and a policy that is made to begin after one answers with rubbish."""
FILES = ("notes", "fruits", "log", "names", "data", "report", "items", "todo")
WORDS = ("apple", "pear", "plum", "fig", "melon", "grape", "lemon", "olive", "peach", "berry")
TIMEOUT_S = 20.0


@dataclass(frozen=True)
class Drawn:
    """What one task is made of: a file, its lines, words and a number."""

    file: str
    other: str
    lines: tuple[str, ...]
    word: str
    number: int

    @property
    def text(self) -> str:
        return "".join(f"{line}\n" for line in self.lines)


Made = tuple[str, dict[str, str], str]
"""A wish, the files that are there, and a command whose exit code 0 says that it was granted."""
Template = Callable[[Drawn], Made]


def _says(path: str, wanted: str) -> str:
    """A file holds this, spaces and empty lines aside: `wc` of some systems puts spaces in front."""
    return f'test "$(tr -d " \\n" < {shlex.quote(path)})" = {shlex.quote("".join(wanted.split()))}'


def _answer(command: str, drawn: Drawn, wanted: str) -> Made:
    """The command is named in the wish: a model of this size knows few by itself."""
    text = f"Run {command} on {drawn.file} and write its output into answer.txt"
    return text, {drawn.file: drawn.text}, _says("answer.txt", wanted)


def _counted(command: str, drawn: Drawn, wanted: int) -> Made:
    """A number, which some ways to ask for it follow by the name of the file."""
    text, files, _ = _answer(command, drawn, "")
    return text, files, f"test \"$(awk '{{print $1; exit}}' answer.txt)\" = {wanted}"


def count_lines(d: Drawn) -> Made:
    return _counted("wc -l", d, len(d.lines))


def count_words(d: Drawn) -> Made:
    return _counted("wc -w", d, len(d.text.split()))


def sort_lines(d: Drawn) -> Made:
    return _answer("sort", d, "\n".join(sorted(d.lines)))


def reverse_sort(d: Drawn) -> Made:
    return _answer("sort -r", d, "\n".join(sorted(d.lines, reverse=True)))


def first_lines(d: Drawn) -> Made:
    return _answer(f"head -n {d.number}", d, "\n".join(d.lines[: d.number]))


def last_lines(d: Drawn) -> Made:
    return _answer(f"tail -n {d.number}", d, "\n".join(d.lines[-d.number :]))


def matching(d: Drawn) -> Made:
    return _answer(f"grep {d.word}", d, "\n".join(line for line in d.lines if d.word in line))


def count_matching(d: Drawn) -> Made:
    return _counted(f"grep -c {d.word}", d, sum(d.word in line for line in d.lines))


def without(d: Drawn) -> Made:
    return _answer(f"grep -v {d.word}", d, "\n".join(line for line in d.lines if d.word not in line))


def field(d: Drawn) -> Made:
    return _answer("cut -d' ' -f1", d, "\n".join(line.split()[0] for line in d.lines))


def unique(d: Drawn) -> Made:
    names = sorted({line.split()[0] for line in d.lines})
    twice = tuple(line.split()[0] for line in d.lines + d.lines)
    return _answer("sort -u", Drawn(d.file, d.other, twice, d.word, d.number), "\n".join(names))


def sum_column(d: Drawn) -> Made:
    total = sum(int(line.split()[1]) for line in d.lines)
    return _counted("awk '{s += $2} END {print s}'", d, total)


def backwards(d: Drawn) -> Made:
    return _answer("tac", d, "\n".join(reversed(d.lines)))


def rename(d: Drawn) -> Made:
    done = f"test ! -e {d.file} && {_says(d.other, d.text)}"
    return f"Rename {d.file} to {d.other} with mv", {d.file: d.text}, done


def copy(d: Drawn) -> Made:
    done = f"{_says(d.file, d.text)} && {_says(d.other, d.text)}"
    return f"Copy {d.file} to {d.other} with cp", {d.file: d.text}, done


def remove(d: Drawn) -> Made:
    done = f"test ! -e {d.file} && test -f {d.other}"
    return f"Remove the file {d.file}", {d.file: d.text, d.other: d.text}, done


def folder(d: Drawn) -> Made:
    return f"Make a directory called {d.word}", {d.file: d.text}, f"test -d {d.word} && test -f {d.file}"


def empty_file(d: Drawn) -> Made:
    return (
        f"Make an empty file called {d.other} with touch",
        {d.file: d.text},
        f"test -f {d.other} && test ! -s {d.other}",
    )


def append(d: Drawn) -> Made:
    return f"Append the word {d.word} to {d.file} with echo", {d.file: d.text}, _says(d.file, d.text + d.word)


def into(d: Drawn) -> Made:
    done = f"test -d {d.word} && test ! -e {d.file} && {_says(f'{d.word}/{d.file}', d.text)}"
    files = {d.file: d.text, f"{d.word}/keep": ""}
    return f"Move {d.file} into the directory {d.word} with mv", files, done


def replace(d: Drawn) -> Made:
    done = _says(d.file, d.text.replace(d.word, "cherry"))
    return f"Replace {d.word} by cherry in {d.file} with sed -i", {d.file: d.text}, done


def join(d: Drawn) -> Made:
    done = _says("both.txt", d.text + "end\n")
    files = {d.file: d.text, d.other: "end\n"}
    return f"Run cat on {d.file} and {d.other} and write its output into both.txt", files, done


TRAINING: tuple[Template, ...] = (
    count_lines, sort_lines, first_lines, matching, count_matching, field, sum_column, backwards, rename,
    remove, folder, append, into, replace,
)  # fmt: skip
VALIDATION: tuple[Template, ...] = (
    count_words, reverse_sort, last_lines, without, unique, copy, empty_file, join,
)  # fmt: skip


def training() -> list[Task]:
    """`builtin:shell`."""
    return _tasks(TRAINING, PER_TEMPLATE)


def validation() -> list[Task]:
    """`builtin:shell-validation`: templates that training never shows."""
    return _tasks(VALIDATION, VALIDATION_PER_TEMPLATE)


def _tasks(templates: tuple[Template, ...], each: int) -> list[Task]:
    return [make(template, number) for template in templates for number in range(each)]


def make(template: Template, number: int, seed: int = 0) -> Task:
    """The task of a template with that number; the same on every machine."""
    wish, files, done = template(drawn(template, number, seed))
    name, messages = template.__name__.replace("_", "-"), dialogue(wish)
    return Task(
        id=f"shell-{name}-{number:02d}",
        prompt=text_of(messages),
        reward=Reward(done, timeout_s=TIMEOUT_S),
        setup=Setup(files),
        workdir=WORKDIR,
        messages=tuple(messages),
        source=f"shell/{name}",
    )


def dialogue(wish: str) -> list[Message]:
    """Three examples, each a wish and a fenced block, then the wish."""
    said: list[Message] = []
    for asked, command in EXAMPLES:
        said += [{"role": "user", "content": asked}]
        said += [{"role": "assistant", "content": f"```bash\n{command}\n```"}]
    return [*said, {"role": "user", "content": wish}]


def drawn(template: Template, number: int, seed: int = 0) -> Drawn:
    """What a task is made of."""
    draw = random.Random(f"{seed}/{template.__name__}/{number}")  # noqa: S311 - words, no secret
    file, other = (f"{name}.txt" for name in draw.sample(FILES, 2))
    words = draw.sample(WORDS, 5)
    chosen = [*words, words[0], words[1]][: draw.randint(5, 7)]
    draw.shuffle(chosen)
    lines = tuple(f"{word} {draw.randint(1, 99)}" for word in chosen)
    return Drawn(file, other, lines, words[0], draw.randint(2, 4))
