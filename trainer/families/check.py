"""Whether generated repositories are what they say: tests fail before the reference fix and pass after it.

What it is
    `checked` writes a task's files into a directory, runs its hidden suite with pytest, puts the
    reference fix in, runs it again: every FAIL_TO_PASS must fail and then pass, every PASS_TO_PASS and
    the visible tests pass both times.

How to use it
    python -m trainer.families check [--every N] [--jobs N]

What it does not do
    It needs no sandbox: what it runs is our own, and it runs as you, in temporary directories.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from trainer.families.repositories import Mended

_RESULT = re.compile(r"^(PASSED|FAILED|ERROR) (\S+)", re.MULTILINE)
RUN_S = 60.0


def checked(made: Mended) -> list[str]:
    """What is wrong with a task; nothing, if all is well."""
    task, reward = made.task, made.task.reward
    with tempfile.TemporaryDirectory(prefix="repository-") as folder:
        root = Path(folder)
        _write(root, {**task.setup.files, **reward.files})
        before = run(root)
        _write(root, made.fix)
        after = run(root)
    visible = {name for name in after if name.split("::")[0] not in reward.files}
    wrong = [f"{name} passes before the fix" for name in reward.fail_to_pass if before.get(name) == "PASSED"]
    wrong += [f"{name} fails before the fix" for name in (*reward.pass_to_pass, *visible)
              if before.get(name) != "PASSED"]  # fmt: skip
    named = {*reward.fail_to_pass, *reward.pass_to_pass, *visible}
    wrong += [f"{name} does not pass after the fix" for name in sorted(named) if after.get(name) != "PASSED"]
    wrong += [f"{name} is not in the task" for name in sorted(set(after) - named)]
    return [f"{task.id}: {text}" for text in wrong]


def run(root: Path) -> dict[str, str]:
    """Status by test id of all tests in a directory."""
    command = [sys.executable, "-B", "-m", "pytest", "-rA", "-q", "-p", "no:cacheprovider", "tests"]
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, timeout=RUN_S, check=False
    )
    return {name: status for status, name in _RESULT.findall(done.stdout)}


def _write(root: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
