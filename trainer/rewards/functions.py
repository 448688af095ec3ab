"""Rewards from a Python function of ours, outside of every sandbox, on what the sandbox gave.

What it is
    The judge of the kind `python`. The function runs in a process of its own: one that hangs is killed, one
    that crashes costs one verdict. It gets an `Attempt` and returns a number, true or false, or a pair of
    number and reason. A function with verl's four parameters (data_source, solution_str, ground_truth,
    extra_info) is called as verl calls it.

How to use it
    def score(attempt: Attempt) -> float: return float(attempt.answer.strip() == attempt.ground_truth)
    data.reward_functions=[rewards:score]

What it does not do
    It takes no name of a function from a task file alone: the configuration must list it.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import inspect
import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from trainer.environments import Verdict
from trainer.rewards import Place
from trainer.tasks import Task

READ_MAX = 1 << 20
VERL = ["data_source", "solution_str", "ground_truth", "extra_info"]
MARK = "verdict "


@dataclass(frozen=True)
class Attempt:
    """What a function judges. Everything but the truth is the policy's: do not trust it."""

    task_id: str
    prompt: str
    answer: str = ""
    """What the policy said in its last turn, or submitted."""
    ground_truth: str = ""
    source: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str | None] = field(default_factory=dict)
    """The files that the task asks for, by path; None where there is none."""
    output: str = ""
    exit_code: int | None = None
    """Of the task's command, if it has one."""


async def judged(task: Task, place: Place, answer: str) -> Verdict:
    """Asks the sandbox, then the function. Raises what the calls of `place` raise."""
    return await call(task.reward.function, await attempt(task, place, answer), task.reward.timeout_s)


async def attempt(task: Task, place: Place, answer: str) -> Attempt:
    """What the sandbox gives: output of the command, and files."""
    reward, output, code = task.reward, "", None
    await place.write(reward.files)
    if reward.command:
        result = await place.run(reward.command, reward.timeout_s, READ_MAX)
        output, code = result.output.decode(errors="replace"), result.exit_code
    files: dict[str, str | None] = {}
    for path in reward.read:
        content = await place.read(path, READ_MAX)
        files[path] = None if content is None else content.decode(errors="replace")
    return Attempt(
        task.id, task.prompt, answer, reward.ground_truth, task.source, reward.extra, files, output, code
    )


async def call(function: str, attempt: Attempt, timeout_s: float) -> Verdict:
    """The function's verdict; 0 with a reason when it takes too long, fails, or returns no number."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "trainer.rewards.functions",
        function,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    try:
        async with asyncio.timeout(timeout_s):
            said, errors = await process.communicate(json.dumps(asdict(attempt)).encode())
    except TimeoutError:
        return Verdict(0.0, f"{function} took longer than {timeout_s:g} s")
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
    last = said.decode(errors="replace").rstrip().rpartition("\n")[2]
    if process.returncode or not last.startswith(MARK):
        return Verdict(0.0, f"{function} failed: {errors.decode(errors='replace').strip()[-300:]}")
    reward, reason = json.loads(last.removeprefix(MARK))
    return Verdict(reward, reason)


def load(name: str) -> Callable[..., Any]:
    """`module:function`. Raises ValueError, ImportError or AttributeError, each with a sentence."""
    module, _, function = name.partition(":")
    if not (module and function):
        raise ValueError(f"{name!r} names no function: write module:function, as in rewards.math:score")
    found = getattr(importlib.import_module(module), function)
    if not callable(found):
        raise ValueError(f"{name} is {type(found).__name__}, and no function")
    loaded: Callable[..., Any] = found
    return loaded


def asked(function: Callable[..., Any], attempt: Attempt) -> tuple[float, str]:
    """Calls it, our way or verl's; returns a finite number and a reason. Raises ValueError on others."""
    if list(inspect.signature(function).parameters)[:4] == VERL:
        returned = function(attempt.source, attempt.answer, attempt.ground_truth, dict(attempt.extra))
    else:
        returned = function(attempt)
    if isinstance(returned, Mapping):  # verl's functions may return {score, …}
        returned = returned["score"], str(returned.get("reason", ""))
    reward, reason = returned if isinstance(returned, tuple) else (returned, "")
    if not math.isfinite(reward := float(reward)):
        raise ValueError(f"it returned {reward}, which is no reward")
    return reward, str(reason)


def main() -> int:
    """In the process of its own: an attempt on stdin, a verdict as the last line of stdout."""
    function = load(sys.argv[1])
    reward, reason = asked(function, Attempt(**json.load(sys.stdin)))
    print(f"\n{MARK}{json.dumps([reward, reason])}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
