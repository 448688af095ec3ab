"""Rewards from test suites: pytest over hidden tests, in a sandbox that the policy never touched.

What it is
    The judge of the kinds `tests` (FAIL_TO_PASS and PASS_TO_PASS) and `expected` (R2E-Gym): moves the work
    into a fresh sandbox (`carry`), brings the hidden tests in, runs them under `inside.py`, and compares
    what was written down (`reports`).

How to use it
    verdict = await judged(task, place)              (trainer.rewards.judge does)

What it does not do
    It runs no suite that is not pytest: such a task has a `command`.
"""

from __future__ import annotations

import json
import re
import secrets
import shlex
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from importlib.resources import files

from trainer.environments import Verdict
from trainer.rewards import KEPT_FOR_LOG, Place, Spoilt, carry, reports
from trainer.rewards.reports import Canaries, Tampered
from trainer.tasks import Reward, Task

RESULTS_MAX = 16 << 20
PREPARE_S = 120.0
CANARIES = 3
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_PATCHED = re.compile(r"^(?:---|\+\+\+) [ab]/(.+?)\s*$", re.MULTILINE)


async def judged(task: Task, place: Place) -> Verdict:
    """Moves, runs and compares. Raises Spoilt, and what the calls of `place` raise."""
    reward = task.reward
    async with _where(task, place) as there:
        await _bring(reward, there)
        word, canaries = secrets.token_hex(16), _canaries()
        text = await _run(reward, there, word, canaries)
    try:
        found = reports.statuses(text, word, canaries)
    except Tampered as tampered:
        return Verdict(0.0, str(tampered))
    if reward.kind == "expected":
        return reports.expected_verdict(found, reward.expected)
    return reports.tests_verdict(found, reward)


@asynccontextmanager
async def _where(task: Task, place: Place) -> AsyncIterator[Place]:
    """A fresh sandbox with the policy's work in it; the policy's own, where the task trusts that."""
    reward = task.reward
    if not reward.fresh:
        yield place
        return
    async with place.fresh() as fresh:
        hidden = spared(reward)
        if reward.base:
            await carry.as_patch(place, fresh, reward.base, hidden)
        else:
            await carry.as_files(place, fresh, hidden)
        yield fresh


def spared(reward: Reward) -> tuple[str, ...]:
    """Paths where hidden tests go: whatever the policy put there is not moved."""
    tests = {name.split("::")[0] for name in (*reward.fail_to_pass, *reward.pass_to_pass)}
    arguments = {name.split("::")[0] for name in reward.arguments}
    return tuple(sorted(tests | arguments | set(reward.files) | patched(reward.patch)))


def patched(patch: str) -> set[str]:
    """The files that a diff touches."""
    return set(_PATCHED.findall(patch))


async def _bring(reward: Reward, there: Place) -> None:
    """The hidden tests, and whatever else must be done before they run."""
    if not reward.fresh:  # something of the policy may be in the way
        taken = sorted(spared(reward))
        await there.run("rm -rf -- " + " ".join(map(shlex.quote, taken)), PREPARE_S, 1024)
    await there.write(reward.files)
    if reward.command:
        await _must(there, reward.command, "the tests cannot be prepared")
    if reward.patch:
        name = f".{secrets.token_hex(8)}.patch"
        await there.write({name: reward.patch})
        await _must(there, f"git apply --whitespace=nowarn {name} && rm -f {name}", "the tests do not fit")


async def _must(there: Place, command: str, otherwise: str) -> None:
    result = await there.run(command, PREPARE_S, KEPT_FOR_LOG)
    if result.exit_code:
        raise Spoilt(f"{otherwise}: {result.output[-200:].decode(errors='replace').strip()}")


async def _run(reward: Reward, there: Place, word: str, canaries: Canaries) -> str:
    """What the recorder wrote down. Raises Spoilt when the time is over or there is nothing."""
    folder = f".judge-{secrets.token_hex(8)}"
    plan = {"word": word, "canaries": canaries, "arguments": list(arguments(reward))}
    await there.write({f"{folder}/run.py": inside(), f"{folder}/plan.json": json.dumps(plan)})
    result = await there.run(command_line(reward, folder), reward.timeout_s, KEPT_FOR_LOG)
    if result.timed_out:
        raise Spoilt("the hidden tests ran out of time")
    written = await there.read(f"{folder}/results", RESULTS_MAX)
    if written is None:
        said = result.output[-200:].decode(errors="replace").strip()
        raise Spoilt(f"the hidden tests did not run (exit code {result.exit_code}): {said}")
    return written.decode(errors="replace")


def arguments(reward: Reward) -> tuple[str, ...]:
    """What pytest is told to run: what the task says, else the files of its tests."""
    tests = dict.fromkeys(name.split("::")[0] for name in (*reward.fail_to_pass, *reward.pass_to_pass))
    return reward.arguments or tuple(tests)


def command_line(reward: Reward, folder: str) -> str:
    """pytest with an environment of its own: isolated (-I), and blind to compiled code that lies around."""
    python = reward.interpreter if "/" in reward.interpreter else f"/usr/bin/{reward.interpreter}"
    options = f"-I -B -X pycache_prefix={folder}/cache"
    environment = f'env -i PATH={_PATH} HOME="$PWD/{folder}" LC_ALL=C.UTF-8 PYTHONHASHSEED=0'
    return f"{environment} {shlex.quote(python)} {options} {folder}/run.py"


def _canaries() -> list[tuple[str, str]]:
    """Names that look like any other test's, and what each must fail with."""
    return [(f"test_{secrets.token_hex(4)}", secrets.token_hex(12)) for _ in range(CANARIES)]


@cache
def inside() -> str:
    """The script that runs in the sandbox."""
    return files("trainer.rewards").joinpath("inside.py").read_text()
