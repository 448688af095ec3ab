"""`orchestrate data check`: all that is wrong at once, and the first task as it will be seen."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_columns import MESSAGES, R2E

from trainer.check import examine, main, spread
from trainer.data import write_rows
from trainer.tasks import lucky_seven, write_tasks


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Two good rows, three that are not, each wrong in its own way."""
    path = tmp_path / "mixed.parquet"
    good = {"prompt": MESSAGES, "instance": R2E | {"instance_id": "one"}}
    no_image = {"prompt": MESSAGES, "instance": R2E | {"instance_id": "two", "docker_image": None}}
    no_prompt = {"prompt": [], "instance": R2E | {"instance_id": "three"}}
    no_json = {"prompt": MESSAGES, "instance": R2E | {"instance_id": "four", "expected_output_json": "{"}}
    write_rows(path, [good, no_image, no_prompt, no_json, good | {"instance": R2E | {"instance_id": "five"}}])
    return path


def test_every_wrong_row_is_named_with_column_and_remedy(mixed: Path) -> None:
    report = examine(str(mixed))
    assert [task.id for task in report.tasks] == ["one", "five"]
    said = dict(error.split(", ", 1) for error in report.errors)
    assert set(said) == {"row 1", "row 2", "row 3"}
    assert said["row 1"] == "column `instance.docker_image`: is missing; it must be text"
    assert said["row 2"].startswith("column `prompt`: it holds []; it must be")
    assert said["row 3"].startswith("column `instance.expected_output_json`: is no JSON")
    assert report.images == {R2E["docker_image"]: 2} and report.styles == {"r2e": 2}


def test_ids_must_be_unique(tmp_path: Path) -> None:
    write_tasks(tmp_path / "t.parquet", [lucky_seven()[0]] * 2)
    assert "is the id of 2 rows" in examine(str(tmp_path / "t.parquet")).errors[0]


def test_lengths() -> None:
    assert spread(list(range(1, 101))) == {"min": 1, "median": 50.5, "p95": 96, "max": 100}
    assert spread([]) == {}


def test_for_people(mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(mixed)]) == 2
    said = capsys.readouterr().out
    for part in ("first task: one", "[system]", "2+2?", "hidden   /r2e_tests", "3 thing(s) to mend", "row 3"):
        assert part in said
    assert main(["builtin:lucky-seven"]) == 0
    assert "nothing is wrong" in capsys.readouterr().out


def test_for_programs(mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(mixed), "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["tasks"], len(found["errors"])) == (5, 2, 3)
    assert found["first"]["reward"]["kind"] == "expected"
    assert found["prompt_lengths"]["unit"] == "characters"


def test_a_file_that_is_no_parquet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x").write_text("no")
    assert main([str(tmp_path / "x")]) == 2
    assert "cannot be read as parquet" in capsys.readouterr().err


@pytest.mark.slow
def test_orchestrate_hands_it_on(mixed: Path) -> None:
    command = [sys.executable, "-m", "orchestrator", "data", "check", str(mixed), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and json.loads(done.stdout)["rows"] == 5, done.stderr
