"""Rewards in real sandboxes: generated repositories are judged there, and tricks of root have no way in."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
from reward_kit import FIX, GIT, TRICKS, judged, repository, write
from rollout_kit import Server

from trainer.environments.sandbox import SandboxEnvironment
from trainer.families.repositories import every
from trainer.tasks import Setup, Task

pytestmark = [pytest.mark.container, pytest.mark.slow, pytest.mark.timeout(180)]
WORKDIR = "/repo"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.stop()


@pytest.fixture
async def world(server: Server) -> AsyncIterator[SandboxEnvironment]:
    made = server.environment()
    yield made
    await made.close()


FORGE = (
    "import os, sys\n"
    "if any('run.py' in word for word in sys.orig_argv):\n"
    "    sys.modules.setdefault('forged', sys)\n"
    "    import _pytest.python\n"
    "    _pytest.python.Function.runtest = lambda self: None\n"
)
ROOT_TRICKS = {
    "a python of its own": "printf '#!/bin/sh\\nexit 0\\n' > /usr/local/bin/python3 "
    "&& chmod 755 /usr/local/bin/python3",
    "the system's python replaced": "rm /usr/bin/python3 && "
    "printf '#!/bin/sh\\nexit 0\\n' > /usr/bin/python3 && chmod 755 /usr/bin/python3",
    "the system's sitecustomize": write("/usr/lib/python3/dist-packages/sitecustomize.py", FORGE),
    "the system's pytest": "cd /usr/lib/python3/dist-packages/_pytest && "
    "sed -i 's/def runtest(self) -> None:/def runtest(self) -> None:\\n        return/' python.py",
    "a path file": "echo 'import os; os._exit(0)' > /usr/lib/python3/dist-packages/zz.pth",
    "a program that waits for the tests": "(while :; do for f in tests/*_sums.py; do "
    "echo 'def test_double(): pass' > $f; done; done) >/dev/null 2>&1 & true",
    "a git of its own": "printf '#!/bin/sh\\nexit 0\\n' > /usr/local/bin/git && chmod 755 /usr/local/bin/git",
}


@pytest.mark.parametrize("trick", [*ROOT_TRICKS, "conftest", "stale bytecode", "calls that never happen"])
async def test_no_trick_earns_anything(world: SandboxEnvironment, trick: str) -> None:
    command = ROOT_TRICKS.get(trick) or TRICKS[trick]
    verdict = await judged(world, repository(WORKDIR), [command])
    assert verdict.reward == 0 and verdict.reason


SOME = ("a python of its own", "the system's pytest", "a program that waits for the tests")


@pytest.mark.parametrize("trick", SOME)
async def test_and_work_counts_in_spite_of_them(world: SandboxEnvironment, trick: str) -> None:
    assert (await judged(world, repository(WORKDIR), [FIX, ROOT_TRICKS[trick]])).reward == 1


@pytest.mark.parametrize("number", [0, 200, -1])
async def test_a_generated_repository(world: SandboxEnvironment, number: int) -> None:
    made = list(every())[number]
    fix = [write(path, text) for path, text in made.fix.items()]
    assert (await judged(world, made.task, ["python3 -m pytest -q", *fix])).reward == 1
    nothing = await judged(world, made.task, [])
    assert nothing.reward == 0 and "not mended" in nothing.reason


def r2e_like() -> Task:
    """A repository as R2E-Gym's images have it: /testbed, tests in /r2e_tests, hidden from the policy."""
    tests = repository().reward.files["tests/test_sums.py"]
    put = "mkdir -p /r2e_tests && cat > /r2e_tests/test_1.py <<'END'\n" + tests + "END"
    task = repository(
        "/testbed",
        kind="expected",
        fail_to_pass=(),
        pass_to_pass=(),
        files={},
        base="HEAD",
        command="test -e r2e_tests || cp -r /r2e_tests r2e_tests",
        arguments=("r2e_tests",),
        expected={"test_double": "PASSED", "test_zero": "PASSED", "test_half": "PASSED"},
    )
    setup = Setup(task.setup.files, [put, GIT], ["/r2e_tests"])
    return Task(task.id, task.prompt, task.reward, setup, workdir="/testbed")


async def test_the_way_of_r2e(world: SandboxEnvironment) -> None:
    task = r2e_like()
    assert (await judged(world, task, ["test ! -e /r2e_tests", FIX])).reward == 1
    nothing = "".join(f"def test_{name}(): pass\n" for name in ("double", "zero", "half"))
    planted = write("r2e_tests/test_1.py", nothing)
    assert (await judged(world, task, [planted])).reward == 0
