"""Rows as other projects write them become our tasks; what does not fit is named with its column."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.columns import read, style
from trainer.data import write_rows
from trainer.errors import TaskError
from trainer.tasks import Budget, Reward, Setup, Task, read_tasks, write_tasks

MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "2+2?"}]
R2E = {
    "docker_image": "namanjain12/pillow_final:abc",
    "repo_name": "pillow",
    "commit_hash": "abc",
    "problem_statement": "It is broken.",
    "expected_output_json": json.dumps({"TestA.test_b": "PASSED", "test_c": "FAILED"}),
    "execution_result_content": json.dumps(
        {"test_file_names": ["test_1.py"], "test_file_codes": ["def test_c(): ...\n"]}
    ),
}
SWE = {
    "instance_id": "astropy__astropy-12907",
    "repo": "astropy/astropy",
    "base_commit": "d16bfe0",
    "problem_statement": "Nested models.",
    "test_patch": "diff --git a/t.py b/t.py\n",
    "FAIL_TO_PASS": json.dumps(["t.py::a"]),
    "PASS_TO_PASS": ["t.py::b"],
}


def through_a_file(folder: Path, row: dict[str, Any], functions: tuple[str, ...] = ()) -> Task:
    write_rows(folder / "t.parquet", [row])
    return read_tasks(folder / "t.parquet", functions)[0]


@pytest.mark.parametrize("prompt", ["It is broken.", MESSAGES])
def test_r2e_as_skyrl_agent_writes_it(tmp_path: Path, prompt: object) -> None:
    instance = R2E | {"instance_id": R2E["docker_image"], "repo": "pillow", "base_commit": "abc"}
    row = {"prompt": prompt, "data_source": "r2e-gym", "ability": "coding", "instance": instance}
    task = through_a_file(tmp_path, row)
    assert (task.id, task.image, task.workdir) == (R2E["docker_image"], R2E["docker_image"], "/testbed")
    assert task.reward.kind == "expected"
    assert task.reward.expected == {"TestA.test_b": "PASSED", "test_c": "FAILED"}
    assert task.reward.files == {"r2e_tests/test_1.py": "def test_c(): ...\n"}
    assert "/r2e_tests" in task.setup.hidden and task.source == "r2e-gym"
    assert len(task.messages) == (0 if isinstance(prompt, str) else 2)


def test_r2e_rows_as_they_were_published(tmp_path: Path) -> None:
    task = through_a_file(tmp_path, R2E)
    assert task.prompt == "It is broken." and task.source == "pillow"


@pytest.mark.parametrize("wrapped", [True, False])
def test_swe_bench(tmp_path: Path, wrapped: bool) -> None:
    row = {"prompt": "Nested models.", "instance": SWE} if wrapped else SWE
    task = through_a_file(tmp_path, row)
    assert task.image == "docker.io/swebench/sweb.eval.x86_64.astropy_1776_astropy-12907:latest"
    assert task.reward.fail_to_pass == ("t.py::a",) and task.reward.pass_to_pass == ("t.py::b",)
    assert task.reward.patch.startswith("diff") and task.reward.fresh


def test_verl(tmp_path: Path) -> None:
    row = {
        "prompt": MESSAGES,
        "data_source": "gsm8k",
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "4"},
        "extra_info": {"split": "train", "index": 7},
    }
    task = through_a_file(tmp_path, row, ("mine:score",))
    assert task.id == "gsm8k-train-7" and task.prompt == "be brief\n2+2?"
    assert task.messages == tuple(MESSAGES)
    reward = Reward(
        kind="python", function="mine:score", ground_truth="4", extra={"split": "train", "index": 7}
    )
    assert task.reward == reward


def test_skyrl(tmp_path: Path) -> None:
    row = {
        "prompt": MESSAGES,
        "env_class": "gsm8k",
        "reward_spec": {"method": "rule", "ground_truth": "4"},
        "hint": "add",
    }
    task = through_a_file(tmp_path, row, ("mine:score",))
    assert task.reward.ground_truth == "4"
    assert task.reward.extra == {"env_class": "gsm8k", "hint": "add"}
    assert style(row | {"instance": R2E}) == "r2e"


def test_all_of_our_own_fields_survive_a_file(tmp_path: Path) -> None:
    tests = Reward(
        kind="tests",
        files={"t/x.py": "1"},
        timeout_s=9.5,
        fail_to_pass=("t/x.py::a",),
        pass_to_pass=("t/x.py::b",),
        interpreter=".venv/bin/python",
        fresh=False,
        partial=True,
    )
    expected = Reward(kind="expected", expected={"a": "PASSED"}, arguments=("t",), base="HEAD")
    python = Reward(kind="python", function="a:b", read=("out",), ground_truth="1", extra={"k": [1, None]})
    one = Task("a", "p", tests, Setup({"a": "b"}, ["true"], ["/r"]), "img", "/w", tools=("bash",))
    two = Task("b", "p", expected, budget=Budget(turns=3, seconds=4.5), source="here")
    three = Task("c", "p", python)
    write_tasks(tmp_path / "t.parquet", [one, two, three])
    assert read_tasks(tmp_path / "t.parquet", ("a:b",)) == [one, two, three]
    asked = Task("d", "be brief\n2+2?", tests, messages=tuple(MESSAGES))
    write_tasks(tmp_path / "m.parquet", [asked])
    assert read_tasks(tmp_path / "m.parquet") == [asked]


INSTANCE = {"instance_id": "a", "reward": {"kind": "python", "function": "os:system"}}


@pytest.mark.parametrize(
    ("row", "functions", "column", "said"),
    [
        ({"instance": R2E | {"docker_image": ""}}, (), "instance.docker_image", "it must be text"),
        ({"instance": R2E | {"expected_output_json": "{"}}, (), "instance.expected_output_json", "no JSON"),
        ({"instance": R2E | {"expected_output_json": "{}"}}, (), "instance.expected_output_json", "no tests"),
        ({"instance": SWE | {"FAIL_TO_PASS": "[]"}}, (), "instance.FAIL_TO_PASS", "drop the row"),
        ({"instance": SWE | {"repo": "django/django"}}, (), "instance.repo", "verify.command"),
        (SWE | {"test_patch": None}, (), "test_patch", "is missing"),
        (
            {"reward_model": {"style": "rule", "ground_truth": "4"}},
            (),
            "reward_model",
            "data.reward_functions",
        ),
        ({"reward_model": {"style": "model", "ground_truth": "4"}}, ("a:b",), "reward_model.style", "rule"),
        ({"reward_model": {"style": "rule"}}, ("a:b",), "reward_model", "ground_truth"),
        ({"env_class": "text2sql"}, ("a:b",), "reward_spec", "text2sql"),
        ({"instance": INSTANCE}, (), "instance.reward.function", "data.reward_functions"),
        ({"instance": INSTANCE}, ("a:b",), "instance.reward.function", "os:system"),
        ({"instance": {"instance_id": "a", "reward": {"kind": "tests"}}}, (), "instance", "doing nothing"),
        ({"instance": {"instance_id": "a", "reward": {"kind": "luck"}}}, (), "instance", "tests, expected"),
        (
            {"instance": {"instance_id": "a", "reward": {"colour": 1}}},
            (),
            "instance",
            "colour: no such field",
        ),
        ({"instance": {"instance_id": "a"}}, (), "instance", "instance_id, verify"),
        ({"colour": "red"}, (), "instance", "a row needs"),
    ],
)
def test_what_does_not_fit_names_row_and_column(
    row: dict[str, Any], functions: tuple[str, ...], column: str, said: str
) -> None:
    with pytest.raises(TaskError, match=said) as caught:
        read({"prompt": "p"} | row, "f.parquet, row 3", functions)
    assert str(caught.value).startswith(f"f.parquet, row 3, column `{column}`: ")


def test_a_prompt_that_ends_with_the_assistant_is_refused() -> None:
    prompt = [*MESSAGES, {"role": "assistant", "content": "4"}]
    with pytest.raises(TaskError, match="column `prompt`: its last message is the assistant's"):
        read({"prompt": prompt, "instance": R2E}, "f, row 0")
