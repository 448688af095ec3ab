"""How tests ended: read from the recorder's lines or from pytest's own summary, and compared.

What it is
    Pure functions. `statuses` reads what `inside.py` wrote, `read_summary` reads the short summary of
    `pytest -rA`, for runs that are no plain pytest. `tests_verdict` and `expected_verdict` compare.

How to use it
    found = statuses(text, word, canaries); verdict = tests_verdict(found, fail_to_pass, pass_to_pass)

What it does not do
    No sandbox, no I/O.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from trainer.environments import Verdict
from trainer.tasks import Reward

GOOD = ("PASSED", "XFAIL")
"""Of a test that is to pass; one that is known to fail, and does, counts, as in SWE-bench."""
_WORST = ("PASSED", "XFAIL", "XPASS", "SKIPPED", "FAILED", "ERROR")
_SUMMARY = re.compile(r"=+ short test summary info =+")
_LINE = re.compile(r"(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS) (\S.*)")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
Canaries = Sequence[tuple[str, str]]
"""Name of a test that must fail, and the word that it must fail with."""


class Tampered(Exception):
    """What was reported cannot come from tests that were really run."""


def statuses(text: str, word: str, canaries: Canaries) -> dict[str, str]:
    """Status by test id. Lines without `word` are the policy's own invention and do not count.

    Raises Tampered when the run has no end, or when a test that must fail did not.
    """
    records = [record for record in map(_record, text.splitlines()) if record.get("word") == word]
    if not records or "end" not in records[-1]:
        raise Tampered("the tests broke off before their end")
    found: dict[str, str] = {}
    for record in records[:-1]:
        _worse(found, str(record.get("id", "")), _status(record))
    collected = any(record.get("when") in ("setup", "call") for record in records)
    for name, secret in canaries if collected else ():
        _check_canary(records, name, secret)
    return {name: status for name, status in found.items() if not _is_canary(name, canaries)}


def _record(line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return {}
    return record if isinstance(record, dict) else {}


def _status(record: Mapping[str, Any]) -> str:
    """What one phase of a test says; phases that went well say PASSED, and the worst phase counts."""
    outcome, when = record.get("outcome"), record.get("when")
    if outcome == "failed":
        return "FAILED" if when == "call" and not record.get("expected") else "ERROR"
    if outcome == "skipped":
        return "XFAIL" if record.get("expected") else "SKIPPED"
    return "XPASS" if record.get("expected") and when == "call" else "PASSED"


def _worse(found: dict[str, str], name: str, status: str) -> None:
    if name not in found or _WORST.index(status) > _WORST.index(found[name]):
        found[name] = status


def _is_canary(name: str, canaries: Canaries) -> bool:
    return any(name.endswith("::" + canary) for canary, _ in canaries)


def _check_canary(records: Iterable[Mapping[str, Any]], name: str, secret: str) -> None:
    calls = [r for r in records if str(r.get("id", "")).endswith("::" + name) and r.get("when") == "call"]
    if [r.get("outcome") for r in calls] != ["failed"] or secret not in str(calls[0].get("text")):
        raise Tampered("a test that must fail did not: the work interferes with its tests")


def read_summary(output: str) -> dict[str, str]:
    """Status by test id, from the last short summary of `pytest -rA`; empty without one.

    Names may hold spaces, brackets and dashes: a message is told from a name by the brackets being closed.
    """
    parts = _SUMMARY.split(_COLOUR.sub("", output))
    found: dict[str, str] = {}
    for line in parts[-1].splitlines() if len(parts) > 1 else ():
        if match := _LINE.match(line.strip()):
            status, rest = match.groups()
            _worse(found, rest if status == "PASSED" else _without_message(rest), status)
    return found


def _without_message(text: str) -> str:
    """`a.py::b[x - y] - AssertionError: …` without its message."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "[") - (letter == "]")
        if depth <= 0 and text.startswith(" - ", place):
            return text[:place]
    # brackets that never close belong to no name that pytest made
    return text.split(" - ")[0]


def short_name(test: str) -> str:
    """A test's name without its file, as R2E-Gym's expected output has it."""
    return ".".join(test.split("::")[1:])


def tests_verdict(found: Mapping[str, str], reward: Reward) -> Verdict:
    """1 when every test to mend and every test to keep passes; the share of the former with `partial`."""
    broken = [name for name in reward.pass_to_pass if found.get(name) not in GOOD]
    unmended = [name for name in reward.fail_to_pass if found.get(name) not in GOOD]
    if broken:
        return Verdict(0.0, f"{len(broken)} test(s) broken: {_first(broken, found)}")
    if not unmended:
        return Verdict(1.0)
    share = 1 - len(unmended) / len(reward.fail_to_pass)
    reason = f"{len(unmended)} of {len(reward.fail_to_pass)} test(s) not mended: {_first(unmended, found)}"
    return Verdict(share if reward.partial else 0.0, reason)


def expected_verdict(found: Mapping[str, str], expected: Mapping[str, str]) -> Verdict:
    """1 when exactly the expected tests ran and each ended as expected."""
    ran = {short_name(test): status for test, status in found.items() if short_name(test)}
    wanted = {_without_message(_COLOUR.sub("", test)): status for test, status in expected.items() if test}
    wrong = [name for name in wanted if ran.get(name) != wanted[name]]
    if wrong:
        return Verdict(0.0, f"{len(wrong)} of {len(wanted)} test(s) not as expected: {_first(wrong, ran)}")
    if len(ran) != len(wanted):
        return Verdict(0.0, f"{len(ran)} test(s) ran, expected were {len(wanted)}")
    return Verdict(1.0)


def _first(names: Sequence[str], found: Mapping[str, str]) -> str:
    return f"{names[0]} {found.get(names[0], 'did not run')}"
