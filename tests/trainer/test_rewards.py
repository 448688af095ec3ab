"""Rewards: right work earns 1, wrong work 0, and no trick earns what work does."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from reward_kit import (
    BROKEN,
    FILES,
    FIX,
    GIT,
    PATCHED_RUN,
    REWARD,
    RIGHT,
    TRICKS,
    Folders,
    judged,
    repository,
    write,
)

from trainer.rewards.functions import Attempt
from trainer.tasks import Reward, Setup, Task

pytestmark = pytest.mark.slow
WORLD = Folders()


async def test_a_mended_bug_earns_one() -> None:
    verdict = await judged(WORLD, repository(), [FIX])
    assert (verdict.reward, verdict.reason) == (1.0, ""), verdict.reason


async def test_doing_nothing_earns_nothing_and_says_why() -> None:
    verdict = await judged(WORLD, repository(), [])
    assert verdict.reward == 0
    assert verdict.reason == "2 of 2 test(s) not mended: tests/test_sums.py::test_double FAILED"


async def test_a_broken_test_costs_everything_also_with_partial_credit() -> None:
    both = RIGHT.replace("x // 2", "x")
    verdict = await judged(WORLD, repository(partial=True), [write("sums.py", both)])
    assert verdict.reward == 0 and "broken: tests/test_sums.py::test_half FAILED" in verdict.reason


@pytest.mark.parametrize(("partial", "reward"), [(False, 0.0), (True, 0.5)])
async def test_partial_credit_is_off_unless_asked_for(partial: bool, reward: float) -> None:
    some = BROKEN.replace("x + x + 1", "x + x if x else 1")
    verdict = await judged(WORLD, repository(partial=partial), [write("sums.py", some)])
    assert verdict.reward == reward and "1 of 2" in verdict.reason


@pytest.mark.parametrize("trick", TRICKS)
async def test_no_trick_earns_anything(trick: str) -> None:
    verdict = await judged(WORLD, repository(), [TRICKS[trick]])
    assert verdict.reward == 0 and verdict.reason


IN_THE_WAY = [name for name in TRICKS if name.endswith("must go") or "of its own" in name]


@pytest.mark.parametrize("trick", [*IN_THE_WAY, "conftest", "stale bytecode", "tests that never run"])
async def test_nor_does_it_in_the_same_sandbox(trick: str) -> None:
    verdict = await judged(WORLD, repository(fresh=False), [TRICKS[trick]])
    assert verdict.reward == 0 and verdict.reason


@pytest.mark.parametrize("trick", ["conftest", "sitecustomize", "pytest.ini that collects only"])
async def test_what_configures_pytest_stays_behind_and_the_work_counts(trick: str) -> None:
    verdict = await judged(WORLD, repository(), [FIX, TRICKS[trick]])
    assert verdict.reward == 1


async def test_tampering_is_told_from_failing() -> None:
    verdict = await judged(WORLD, repository(), [write("sums.py", BROKEN + PATCHED_RUN)])
    assert "interferes with its tests" in verdict.reason


async def test_a_module_that_was_moved_and_one_that_was_removed() -> None:
    moved = ["mkdir lib && mv sums.py lib/sums.py && echo 'from lib.sums import *' > sums.py", FIX]
    assert (await judged(WORLD, repository(), moved)).reward == 1
    needed = dict(FILES) | {"tests/test_sums.py": "import pathlib\n"}
    gone = repository(
        seen=needed,
        fail_to_pass=("tests/test_sums.py::test_gone",),
        pass_to_pass=(),
        interpreter=REWARD.interpreter,
    )
    tests = {
        "tests/test_sums.py": (
            "import pathlib\n\n\ndef test_gone():\n    assert not pathlib.Path('notes/old.txt').exists()\n"
        )
    }
    gone = replace(gone, reward=replace(gone.reward, files=tests))
    assert (await judged(WORLD, gone, ["rm notes/old.txt"])).reward == 1
    assert (await judged(WORLD, gone, [])).reward == 0


async def test_tests_that_hang_run_out_of_time() -> None:
    verdict = await judged(
        WORLD, repository(timeout_s=2.0), [write("sums.py", "import time\ntime.sleep(60)")]
    )
    assert (verdict.reward, verdict.reason) == (0, "the hidden tests ran out of time")


EXPECTED = {"test_double": "PASSED", "test_zero": "PASSED", "test_half": "PASSED"}


@pytest.mark.parametrize(
    ("expected", "commands", "reward"),
    [
        (EXPECTED, [FIX], 1),
        (EXPECTED, [], 0),
        ({**EXPECTED, "test_double": "FAILED", "test_zero": "FAILED"}, [], 1),
        ({"test_double": "PASSED"}, [FIX], 0),
    ],
)
async def test_r2e_wants_exactly_the_expected_statuses(
    expected: dict[str, str], commands: list[str], reward: float
) -> None:
    wanted = {f"{name}": status for name, status in expected.items()}
    task = repository(
        kind="expected",
        expected=wanted,
        fail_to_pass=(),
        pass_to_pass=(),
        files={"r2e_tests/test_1.py": REWARD.files["tests/test_sums.py"]},
        arguments=("r2e_tests",),
    )
    assert (await judged(WORLD, task, commands)).reward == reward


@pytest.mark.parametrize(
    ("commands", "reward"),
    [
        ([FIX], 1),
        ([FIX, "git add -A && git -c user.email=a@b -c user.name=n commit -q -m mine"], 0),
        (["mkdir lib && mv sums.py lib/ && echo 'from lib.sums import *' > sums.py", FIX], 1),
        ([FIX, TRICKS["conftest"], "echo '*.py -diff' > .gitattributes"], 1),
        ([FIX, "rm -rf .git"], 0),
        ([FIX, "git config diff.external /bin/true; git config core.quotepath true"], 1),
        ([], 0),
    ],
)
async def test_a_repository_of_git_moves_as_a_patch(commands: list[str], reward: float) -> None:
    task = repository(base="HEAD")
    task = replace(task, setup=replace(task.setup, commands=[GIT]))
    assert (await judged(WORLD, task, commands)).reward == reward


async def test_hidden_tests_may_come_as_a_patch() -> None:
    patch = (
        "diff --git a/tests/test_sums.py b/tests/test_sums.py\n--- a/tests/test_sums.py\n"
        "+++ b/tests/test_sums.py\n@@ -1,5 +1,9 @@\n-from sums import half\n+from sums import double, half\n"
        " \n \n def test_half():\n     assert half(9) == 4\n"
        "+\n+\n+def test_double():\n+    assert double(4) == 8\n"
    )
    task = repository(base="HEAD", files={}, patch=patch, fail_to_pass=("tests/test_sums.py::test_double",))
    task = replace(task, setup=Setup(dict(FILES), [GIT]))
    assert (await judged(WORLD, task, [FIX, "rm -r tests"])).reward == 1
    assert (await judged(WORLD, task, [])).reward == 0


# --- commands and functions --------------------------------------------------------------------------


async def test_a_command() -> None:
    task = Task("a", "p", Reward("sh ./check.sh", {"check.sh": 'test "$(cat out)" = 7'}))
    assert (await judged(WORLD, task, ["echo 7 > out"])).reward == 1
    assert (await judged(WORLD, task, ["echo 7 > out; echo 'exit 1' > check.sh"])).reward == 1
    assert (await judged(WORLD, task, ["echo 7 > out; mkdir check.sh"])).reward == 0


def by_file(attempt: Attempt) -> tuple[float, str]:
    return (0.25, "a quarter") if attempt.files == {"out": "7\n", "none": None} else (0.0, repr(attempt))


def in_verls_way(data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, int]) -> float:
    return float(solution_str == ground_truth and extra_info == {"index": 3} and data_source == "s")


def hangs(attempt: Attempt) -> float:
    while True:
        pass


def crashes(attempt: Attempt) -> float:
    os.abort()


def lies(attempt: Attempt) -> float:
    print('verdict [1.0, ""]')
    return float("nan")


def function(name: str, **given: object) -> Task:
    reward = Reward(kind="python", function=f"test_rewards:{name}", **given)  # type: ignore[arg-type]
    return Task("a", "p", reward, source="s")


async def test_a_function_gets_what_the_sandbox_gave() -> None:
    task = function("by_file", read=("out", "none"))
    verdict = await judged(WORLD, task, ["echo 7 > out"])
    assert (verdict.reward, verdict.reason) == (0.25, "a quarter")


async def test_a_function_of_verl() -> None:
    task = function("in_verls_way", ground_truth="4", extra={"index": 3})
    assert (await judged(WORLD, task, [], answer="4")).reward == 1
    assert (await judged(WORLD, task, [], answer="5")).reward == 0


@pytest.mark.parametrize(
    ("name", "said"),
    [("hangs", "took longer than 5 s"), ("crashes", "failed"), ("lies", "no reward"), ("none", "failed")],
)
async def test_a_function_that_fails_costs_one_verdict(name: str, said: str) -> None:
    verdict = await judged(WORLD, function(name, timeout_s=5.0), [])
    assert verdict.reward == 0 and said in verdict.reason


async def test_nothing_is_left_behind(tmp_path: Path) -> None:
    before = set(Path("/tmp").glob("rewards-*"))
    await judged(WORLD, repository(), [FIX])
    assert set(Path("/tmp").glob("rewards-*")) <= before
