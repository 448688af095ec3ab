"""Runs pytest inside of a sandbox and writes down how each test ended; sent there as text, never imported.

What it is
    A script for the Python of the sandbox, whatever its age (3.6 and later): it reads what to do from a file
    beside itself, removes that file before anything of the policy is imported, runs pytest, and appends one
    JSON line for each test to `results`, with a word that only the judge knows.

How to use it
    python3 -I -B -X pycache_prefix=DIR/cache DIR/run.py         (trainer.rewards.suites does)

What it does not do
    It trusts no exit code and no output. It gives no verdict: the judge, outside, compares.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple  # noqa: UP035 - the sandbox's Python may be an old one

import pytest  # before the policy's directory is on the path

FOLDER = Path(__file__).resolve().parent
# Nothing may stop early, run in another process, or keep what it learned for the next time.
OPTIONS = ["-q", "--maxfail=0", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:randomly"]


def main() -> None:
    plan = json.loads((FOLDER / "plan.json").read_text())
    (FOLDER / "plan.json").unlink()
    results = os.open(str(FOLDER / "results"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    recorder = Recorder(results, plan["word"], plan["canaries"])
    sys.path.insert(0, str(Path.cwd()))  # as `python -m pytest` has it
    status = pytest.main(OPTIONS + plan["arguments"], plugins=[recorder])
    recorder.say({"end": int(status)})
    os._exit(0)  # neither a thread nor a handler of the policy holds it up


class Recorder:
    """A plugin of pytest: writes down what is reported, and adds tests that must fail."""

    def __init__(self, results: int, word: str, canaries: List[Tuple[str, str]]) -> None:  # noqa: UP006
        self.results, self.word, self.canaries = results, word, canaries

    def say(self, record: Dict[str, Any]) -> None:  # noqa: UP006
        record["word"] = self.word
        os.write(self.results, (json.dumps(record) + "\n").encode())

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: List[Any]) -> None:  # noqa: UP006
        """The first of them runs first, the others last."""
        module = items[0].getparent(pytest.Module) if items else None
        if module is not None:
            made = [
                pytest.Function.from_parent(module, name=name, callobj=failing(word))
                for name, word in self.canaries
            ]
            items[:] = made[:1] + items + made[1:]

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.say(
            {
                "id": report.nodeid,
                "when": report.when,
                "outcome": report.outcome,
                "expected": hasattr(report, "wasxfail"),
                "text": str(report.longrepr)[-400:] if report.outcome == "failed" else "",
            }
        )

    def pytest_collectreport(self, report: Any) -> None:
        if report.outcome == "failed":
            text = str(report.longrepr)[-400:]
            self.say({"id": report.nodeid, "when": "collect", "outcome": "failed", "text": text})


def failing(word: str) -> Callable[[], None]:
    def test() -> None:
        assert word == "", word

    return test


if __name__ == "__main__":
    main()
