"""Generated repositories are what they say; the same on every machine; split by kind of bug."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from trainer.families import FAMILIES, shell
from trainer.families.__main__ import main
from trainer.families.check import checked
from trainer.families.programs import PROGRAMS
from trainer.families.repositories import VALIDATION, every, make, training, validation
from trainer.families.shape import Bug
from trainer.tasks import load_tasks


def test_there_are_hundreds_of_at_least_eight_kinds() -> None:
    found = list(every())
    assert len({made.task.id for made in found}) == len(found) >= 400
    assert len({made.kind for made in found}) >= 8


def test_validation_shows_kinds_that_training_never_does() -> None:
    trained = {task.source.partition("/")[2] for task in training()}
    held_out = {task.source.partition("/")[2] for task in validation()}
    assert held_out == set(VALIDATION) and not trained & held_out
    assert len(validation()) >= 50


def test_the_same_seed_gives_the_same_tasks() -> None:
    assert list(every(3)) == list(every(3))
    assert {made.task.id for made in every(3)} == {made.task.id for made in every(4)}
    assert list(every(3)) != list(every(4))


def test_a_bug_changes_the_program_and_leaks_neither_fix_nor_hidden_tests() -> None:
    for made in every():
        ((path, right),) = made.fix.items()
        assert made.task.setup.files[path] != right
        assert not set(made.task.reward.files) & set(made.task.setup.files)
        assert "@" not in right.replace("user@", "") and "@" not in made.task.prompt
        compile(made.task.setup.files[path], path, "exec")
        compile(right, path, "exec")


def test_a_bug_that_is_nowhere_is_refused() -> None:
    bug = Bug("x", "y", "not there", "z", "r", ("test_a",))
    with pytest.raises(ValueError, match="nowhere"):
        make(PROGRAMS[0], bug, 0)


SAMPLE = [made for made in every() if made.task.id.endswith("-1")][::7]


@pytest.mark.slow
@pytest.mark.parametrize("made", SAMPLE, ids=lambda made: made.task.id)
def test_tests_fail_before_the_fix_and_pass_after_it(made: object) -> None:
    assert checked(made) == []  # type: ignore[arg-type]


def test_show_and_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "spans-touching-0"]) == 0
    shown = capsys.readouterr().out
    assert "-        if merged and start < merged[-1][1]:" in shown and "test_touching" in shown
    assert main(["list"]) == 0
    assert "(validation)" in capsys.readouterr().out
    assert main(["show", "nothing"]) == 64


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_goes_through_a_file(name: str, tmp_path: Path) -> None:
    assert load_tasks(f"builtin:{name}", tmp_path) == FAMILIES[name]()


# --- shell -------------------------------------------------------------------------------------------

RIGHT = {
    "count-lines": "wc -l < {file} > answer.txt",
    "count-words": "wc -w < {file} > answer.txt",
    "sort-lines": "sort {file} > answer.txt",
    "reverse-sort": "sort -r {file} > answer.txt",
    "first-lines": "head -n {number} {file} > answer.txt",
    "last-lines": "tail -n {number} {file} > answer.txt",
    "matching": "grep {word} {file} > answer.txt",
    "count-matching": "grep -c {word} {file} > answer.txt",
    "without": "grep -v {word} {file} > answer.txt",
    "field": "cut -d' ' -f1 {file} > answer.txt",
    "unique": "sort -u {file} > answer.txt",
    "sum-column": "awk '{{s += $2}} END {{print s}}' {file} > answer.txt",
    "backwards": "tac {file} > answer.txt",
    "rename": "mv {file} {other}",
    "copy": "cp {file} {other}",
    "remove": "rm {file}",
    "folder": "mkdir {word}",
    "empty-file": "touch {other}",
    "append": "echo {word} >> {file}",
    "into": "mv {file} {word}/",
    "replace": "sed -i s/{word}/cherry/ {file}",
    "join": "cat {file} {other} > both.txt",
}


def solved(folder: Path, template: shell.Template, number: int, act: bool) -> bool:
    """Whether the hidden command is satisfied, after the right command, or after none."""
    task = shell.make(template, number)
    draw = shell.drawn(template, number)
    for name, text in task.setup.files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    command = RIGHT[template.__name__.replace("_", "-")].format(**vars(draw)) if act else "true"
    for line in (command, task.reward.command):
        code = subprocess.run(["/bin/sh", "-c", line], cwd=folder, timeout=20, check=False).returncode
    return code == 0


@pytest.mark.parametrize("template", (*shell.TRAINING, *shell.VALIDATION), ids=lambda t: t.__name__)
def test_a_wish_can_be_granted_and_is_not_granted_yet(template: shell.Template, tmp_path: Path) -> None:
    for number in range(4):
        for act in (True, False):
            folder = tmp_path / f"{number}-{act}"
            folder.mkdir()
            assert solved(folder, template, number, act) is act, (template.__name__, number, act)


def test_training_and_validation_share_no_template() -> None:
    assert not set(shell.TRAINING) & set(shell.VALIDATION)
    assert len({task.id for task in (*shell.training(), *shell.validation())}) == len(shell.training()) + len(
        shell.validation()
    )
