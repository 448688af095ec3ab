"""Task files: one road for built-in and user's tasks, and clear errors on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.data import write_rows
from trainer.errors import TaskError
from trainer.tasks import Setup, Task, Verify, load_tasks, lucky_seven, main, read_tasks, write_tasks


def test_a_built_in_family_goes_through_a_file(tmp_path: Path) -> None:
    assert load_tasks("builtin:lucky-seven", tmp_path) == lucky_seven()
    assert (tmp_path / "lucky-seven.parquet").is_file()


def test_every_field_survives_the_file(tmp_path: Path) -> None:
    whole = Task(
        "a",
        "fix it",
        Verify("make test", {"t/x.py": "1"}, 9.5),
        Setup({"b": "ü\n"}, ["git init"]),
        "img",
        "/w",
    )
    bare = Task("b", "p", Verify("true"))
    write_tasks(tmp_path / "t.parquet", [whole, bare])
    assert read_tasks(tmp_path / "t.parquet") == [whole, bare]


def test_messages_and_further_columns(tmp_path: Path) -> None:
    prompt = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "go"}]
    instance = {"instance_id": "a", "verify": {"command": "true"}}
    write_rows(tmp_path / "t.parquet", [{"prompt": prompt, "instance": instance, "ability": "coding"}])
    assert read_tasks(tmp_path / "t.parquet")[0].prompt == "be brief\ngo"


@pytest.mark.parametrize(
    ("instance", "said"),
    [
        ({"verify": {"command": "true"}}, "instance_id"),
        ({"instance_id": "a"}, "verify"),
        ({"instance_id": "a", "verify": {"command": ""}}, "command is empty"),
        ("text", "TypeError|AttributeError"),
    ],
)
def test_a_bad_row_names_file_row_and_what_is_needed(tmp_path: Path, instance: object, said: str) -> None:
    write_rows(tmp_path / "t.parquet", [{"prompt": "p", "instance": instance}])
    with pytest.raises(TaskError, match=said) as caught:
        read_tasks(tmp_path / "t.parquet")
    assert "row 0" in str(caught.value) and "instance_id, verify {command}" in str(caught.value)


def test_unknown_family_and_missing_file(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="there is lucky-seven"):
        load_tasks("builtin:nothing", tmp_path)
    with pytest.raises(TaskError, match="is missing"):
        load_tasks(str(tmp_path / "no.parquet"), tmp_path)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "l.parquet")
    assert main(["write", "lucky-seven", path]) == 0
    assert main(["show", path]) == 0
    assert "cat answer.txt" in capsys.readouterr().out
    assert main(["show", path + "x"]) == 64
    assert "error:" in capsys.readouterr().err
