"""One task out of one row, in whichever of five column styles the row is written.

What it is
    `read` tells the style by the columns and makes a `Task`:
        own         instance {instance_id, reward {kind, …} or verify {command, …}, setup, image, …}
        R2E-Gym     instance, or the row itself: docker_image, repo_name, commit_hash, expected_output_json …
        SWE-bench   instance, or the row itself: instance_id, repo, base_commit, test_patch, FAIL_TO_PASS …
        verl        reward_model {style, ground_truth}, extra_info
        SkyRL       env_class, and either instance as above, or reward_spec {method, ground_truth}

How to use it
    task = read(row, "train.parquet, row 3", functions=["rewards.math:score"])

What it does not do
    It pulls no image and loads no function. A row cannot name a Python function of its own choice: what runs
    beside the trainer is named by the configuration (`data.reward_functions`), never by data alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from trainer.errors import TaskError
from trainer.tasks import Budget, Reward, Setup, Task, checked, messages_of, reward_of, task_of, text_of

Row = Mapping[str, Any]
OWN = (
    "a row needs `prompt` and `instance` {instance_id, verify {command}}, or instance.reward {kind, …}; "
    "it may have image, workdir, setup {files, commands}, tools, budget {turns, tokens, seconds}"
)
R2E_TIMEOUT_S = 300.0
TESTBED = "/testbed"


class Column(ValueError):
    """One column of a row does not fit: its name, what is wrong, and what to do."""

    def __init__(self, name: str, wrong: str, fix: str) -> None:
        super().__init__(f"column `{name}`: {wrong}; {fix}")
        self.name = name


def read(row: Row, where: str, functions: Sequence[str] = ()) -> Task:
    """The task of a row. Raises TaskError, which begins with `where` and names the column."""
    try:
        task = READERS[style(row)](row, functions)
    except Column as error:
        raise TaskError(f"{where}, {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise TaskError(f"{where}, column `instance`: {type(error).__name__} {error}; {OWN}") from error
    if task.messages and task.messages[-1]["role"] == "assistant":
        raise TaskError(
            f"{where}, column `prompt`: its last message is the assistant's; end it with the user's, "
            "for the policy speaks next"
        )
    return task


def style(row: Row) -> str:
    """Which of `READERS` a row belongs to. Raises Column."""
    instance = row.get("instance")
    if instance is not None and not isinstance(instance, Mapping):
        raise TypeError(f"`instance` is {type(instance).__name__}, and must be a struct")
    inner: Row = instance if isinstance(instance, Mapping) else row
    if "reward" in inner or "verify" in inner:
        return "own"
    if "FAIL_TO_PASS" in inner:
        return "swe-bench"
    if "docker_image" in inner or "expected_output_json" in inner:
        return "r2e"
    if "reward_model" in row:
        return "verl"
    if "reward_spec" in row or "env_class" in row:
        return "skyrl"
    return "own"


# --- our own -----------------------------------------------------------------------------------------


def _own(row: Row, functions: Sequence[str]) -> Task:
    instance = row["instance"]
    given = instance.get("reward") or {"kind": "command"} | instance["verify"]
    reward = reward_of(given)
    if reward.kind == "python":
        reward = replace(reward, function=_function(reward.function, functions, "instance.reward.function"))
    return task_of(row, reward)


def _function(name: str, functions: Sequence[str], column: str) -> str:
    """A function that the configuration knows; the first of them, if the row names none. Raises Column."""
    if not functions:
        raise Column(
            column,
            "a Python function is to judge this row",
            "name it in data.reward_functions=[module:function]",
        )
    if name and name not in functions:
        raise Column(
            column,
            f"{name!r} is not in data.reward_functions",
            f"there are {', '.join(functions)}; add it there",
        )
    return name or functions[0]


# --- R2E-Gym -----------------------------------------------------------------------------------------


def _r2e(row: Row, functions: Sequence[str]) -> Task:
    instance, at = _instance(row)
    image = _text(instance, "docker_image", at)
    expected = _json(instance, "expected_output_json", at)
    if not (isinstance(expected, dict) and expected):
        raise Column(
            f"{at}expected_output_json", "holds no tests", "it maps names of tests to statuses, as JSON"
        )
    files = _r2e_tests(instance, at)
    reward = Reward(
        kind="expected",
        command="test -e r2e_tests || cp -r /r2e_tests r2e_tests",
        files=files,
        timeout_s=R2E_TIMEOUT_S,
        expected={str(name): str(status) for name, status in expected.items()},
        interpreter=".venv/bin/python",
        arguments=("r2e_tests",),
        base="HEAD",
    )
    hidden = ["/r2e_tests", f"{TESTBED}/r2e_tests", f"{TESTBED}/run_tests.sh"]
    # The image is one per commit, so SkyRL-Agent uses its name as the id.
    return _task(row, str(instance.get("instance_id", image)), checked(reward), image, hidden, instance, at)


def _r2e_tests(instance: Row, at: str) -> dict[str, str]:
    """The hidden tests, which a row brings along with how they went before and after the commit."""
    if not instance.get("execution_result_content"):
        return {}
    ran = _json(instance, "execution_result_content", at)
    names, codes = ran.get("test_file_names", []), ran.get("test_file_codes", [])
    if len(names) != len(codes):
        raise Column(
            f"{at}execution_result_content",
            f"has {len(names)} names of test files and {len(codes)} contents",
            "each file needs both",
        )
    return {f"r2e_tests/{name}": code for name, code in zip(names, codes, strict=True)}


# --- SWE-bench, SWE-Gym ------------------------------------------------------------------------------


def _swe_bench(row: Row, functions: Sequence[str]) -> Task:
    instance, at = _instance(row)
    name = _text(instance, "instance_id", at)
    if instance.get("repo") == "django/django":
        raise Column(
            f"{at}repo",
            "django's tests are no pytest tests",
            "give such rows instance.verify.command, or drop them",
        )
    reward = Reward(
        kind="tests",
        timeout_s=1800.0,
        fail_to_pass=_names(instance, "FAIL_TO_PASS", at),
        pass_to_pass=_names(instance, "PASS_TO_PASS", at),
        patch=_text(instance, "test_patch", at),
        base="HEAD",
        interpreter="/opt/miniconda3/envs/testbed/bin/python",
    )
    if not reward.fail_to_pass:
        raise Column(f"{at}FAIL_TO_PASS", "is empty", "drop the row: doing nothing would earn 1")
    image = str(instance.get("docker_image") or instance.get("image_name") or swe_bench_image(name))
    return _task(row, name, checked(reward), image, [], instance, at)


def swe_bench_image(name: str) -> str:
    """Where SWE-bench publishes the image of an instance: no two underscores in a row in its name."""
    return f"docker.io/swebench/sweb.eval.x86_64.{name.lower().replace('__', '_1776_')}:latest"


# --- verl, SkyRL -------------------------------------------------------------------------------------


def _verl(row: Row, functions: Sequence[str]) -> Task:
    given = row["reward_model"]
    if not isinstance(given, Mapping) or "ground_truth" not in given:
        raise Column("reward_model", "has no ground_truth", "it is a struct {style, ground_truth}")
    if given.get("style", "rule") != "rule":
        raise Column(
            "reward_model.style", f"is {given['style']!r}", "only `rule` is judged here: no reward model"
        )
    extra = row.get("extra_info") or {}
    name = f"{row.get('data_source', 'verl')}-{extra.get('split', 'train')}-{extra.get('index', '')}"
    return _ruled(row, name.rstrip("-"), given["ground_truth"], dict(extra), "reward_model", functions)


def _skyrl(row: Row, functions: Sequence[str]) -> Task:
    given = row.get("reward_spec") or row.get("reward_model")
    if not isinstance(given, Mapping) or "ground_truth" not in given:
        raise Column(
            "reward_spec",
            f"is missing, and `env_class` {row.get('env_class')!r} alone says nothing of the reward",
            "add reward_spec {method, ground_truth}, or an `instance` struct",
        )
    known = {"prompt", "reward_spec", "instance"}
    extra = {key: value for key, value in row.items() if key not in known}
    index = (row.get("extra_info") or {}).get("index", "")
    name = f"{row.get('data_source', row.get('env_class'))}-{index}".rstrip("-")
    return _ruled(row, name, given["ground_truth"], extra, "reward_spec", functions)


def _ruled(
    row: Row, name: str, truth: Any, extra: dict[str, Any], column: str, functions: Sequence[str]
) -> Task:
    """A row whose answer a function compares with a ground truth."""
    reward = Reward(
        kind="python",
        function=_function("", functions, column),
        ground_truth=truth if isinstance(truth, str) else json.dumps(truth),
        extra=json.loads(json.dumps(extra, default=str)),
    )
    prompt = row["prompt"]
    return Task(
        name, text_of(prompt), reward, messages=messages_of(prompt), source=str(row.get("data_source", ""))
    )


# --- shared ------------------------------------------------------------------------------------------

READERS = {"own": _own, "r2e": _r2e, "swe-bench": _swe_bench, "verl": _verl, "skyrl": _skyrl}


def _instance(row: Row) -> tuple[Row, str]:
    """Where the fields of a repository's task are, and how their columns begin."""
    instance = row.get("instance")
    return (instance, "instance.") if isinstance(instance, Mapping) else (row, "")


def _task(row: Row, name: str, reward: Reward, image: str, hidden: list[str], instance: Row, at: str) -> Task:
    prompt = row.get("prompt") or _text(instance, "problem_statement", at)
    source = row.get("data_source") or instance.get("repo_name") or instance.get("repo") or ""
    return Task(
        id=name,
        prompt=text_of(prompt),
        reward=reward,
        setup=Setup(hidden=hidden),
        image=image,
        workdir=TESTBED,
        messages=messages_of(prompt),
        budget=Budget(),
        source=str(source),
    )


def _text(instance: Row, name: str, at: str) -> str:
    value = instance.get(name)
    if not (isinstance(value, str) and value):
        raise Column(
            f"{at}{name}", "is missing" if value is None else f"holds {value!r:.40}", "it must be text"
        )
    return value


def _json(instance: Row, name: str, at: str) -> Any:
    value = instance.get(name)
    if not isinstance(value, str):
        if value is None:
            raise Column(
                f"{at}{name}", "is missing", "R2E-Gym rows have it; keep every field of the data set"
            )
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise Column(f"{at}{name}", f"is no JSON ({error})", "keep it as the data set has it") from error


def _names(instance: Row, name: str, at: str) -> tuple[str, ...]:
    """Names of tests: a list, or, as SWE-bench has it, a list as JSON."""
    value = _json(instance, name, at) if instance.get(name) else []
    if not isinstance(value, list):
        raise Column(
            f"{at}{name}", f"holds {value!r:.40}", "it must be a list of test ids, or that list as JSON"
        )
    return tuple(map(str, value))
