"""How trajectories look in a terminal.

What it is
    Functions from the lines of `trainer.view` to `rich.text.Text`. First a line for each episode; then, turn
    by turn, the best one, the worst one and one that came to nothing, or all of them.

What it does not do
    It prints nothing and reads nothing. What policies and sandboxes wrote loses its control characters, so
    that it cannot drive this terminal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

from rich.text import Text

from orchestrator.view import clean

Line = dict[str, Any]

LISTED = 40
"""So many episodes are listed; the rest is counted."""
SHOWN_LINES = 24
"""Lines shown of one text: the head and the tail of longer ones."""
WIDTH = 160
"""Characters shown of one line."""
BAR = 48
_PARTS = {"p": ("░", "blue"), "a": ("█", "green"), "o": ("─", "dim")}
_STYLES = {"ok": "green", "truncated": "yellow", "timeout": "yellow", "infra": "red"}


def shown(run: str, what: str, step: int, lines: Sequence[Line], everything: bool) -> Text:
    """A step's episodes: what there is, each on a line, then some or all of them in full."""
    rows = [_head(run, what, step, lines), Text()]
    rows += [_listed(one) for one in lines[:LISTED]]
    if len(lines) > LISTED:
        rows.append(Text(f"  … and {len(lines) - LISTED} more; --json has all of them", "dim"))
    for one in lines if everything else chosen(lines):
        rows += [Text(), *episode(one)]
    rows += [Text(), _legend()]
    return Text("\n").join(rows)


def chosen(lines: Sequence[Line]) -> list[Line]:
    """The best, the worst, and one that was truncated or lost; fewer where they are the same."""
    valid = [one for one in lines if one["status"] != "infra"]
    picked = [max(valid, key=_reward), min(valid, key=_reward)] if valid else []
    picked += [one for one in lines if one["status"] != "ok"][:1]
    found: list[Line] = []
    for one in picked:
        if all(one is not other for other in found):
            found.append(one)
    return found


def _reward(one: Line) -> float:
    return float(one["reward"])


def _head(run: str, what: str, step: int, lines: Sequence[Line]) -> Text:
    valid = [_reward(one) for one in lines if one["status"] != "infra"]
    counts = Counter(one["status"] for one in lines)
    told = ", ".join(f"{count} {status}" for status, count in counts.most_common())
    mean = f"mean reward {fmean(valid):.3f}" if valid else "none valid"
    return Text.assemble(
        "  ", (run, "bold"), f"  {what} {step}   {len(lines)} episodes ({told})   ", (mean, "bold")
    )


def _listed(one: Line) -> Text:
    seconds = one["timings"].get("total_s", 0.0)
    return Text.assemble(
        "  ",
        _dot(one),
        f" {one['reward']:>6.2f}  ",
        (f"{one['status']:<9} ", _STYLES.get(one["status"], "")),
        f"{len(one['turns']):>3} turns {one['action_tokens']:>7} of {one['tokens']:>7} tokens ",
        f"{seconds:>8.1f} s  ",
        (clean(str(one["task"])), "bold"),
        (f"  {one['failure']}" if one.get("failure") else "", "yellow"),
    )


def _dot(one: Line) -> Text:
    if one["status"] == "infra":
        return Text("×", "red")
    return Text("●" if one["reward"] > 0.5 else "○", "green" if one["reward"] > 0.5 else "dim")


def _legend() -> Text:
    parts = (("p", "prompt"), ("a", "sampled, trained on"), ("o", "observed, masked"))
    text = Text("  ")
    for part, words in parts:
        text.append(_PARTS[part][0], _PARTS[part][1]).append(f" {words}   ", "dim")
    return text


# --- one episode -------------------------------------------------------------------------------------


def episode(one: Line) -> list[Text]:
    """Its head, its tokens as a bar, its turns, and what the judge said."""
    head = Text.assemble(
        "  ",
        _dot(one),
        " ",
        (clean(str(one["task"])), "bold"),
        f"   reward {one['reward']:.3g}   ",
        (one["status"], _STYLES.get(one["status"], "")),
        (f" ({one['failure']})" if one.get("failure") else "", "yellow"),
        (f"   group {one['group']}   {_versions(one)}", "dim"),
    )
    rows = [head, Text("    ").append_text(bar(one["mask"])), _times(one)]
    rows += [Text("      │ ", "blue").append(text) for text in excerpt(one.get("prompt", ""))]
    for number, turn in enumerate(one["turns"], 1):
        rows += _turn(number, turn)
    if one["error"]:
        rows.append(Text(f"    judge │ {clean(one['error'])}", "yellow"))
    return rows


def _versions(one: Line) -> str:
    versions = [version for _, version in one.get("spans", [])] or [one["weight_version"]]
    first, last = versions[0], versions[-1]
    return f"weights {first}" if first == last else f"weights {first} to {last}"


def _times(one: Line) -> Text:
    names = ("create", "setup", "generate", "command", "verify", "total")
    times = [(name, one["timings"].get(f"{name}_s")) for name in names]
    return Text("    " + "   ".join(f"{name} {s:.2f} s" for name, s in times if s is not None), "dim")


def bar(mask: str) -> Text:
    """The parts of an episode as a strip: each at least one cell, else by its share of the tokens."""
    parts = [(part[0], int(part[1:])) for part in mask.split() if int(part[1:])]
    total = sum(size for _, size in parts) or 1
    text = Text()
    for kind, size in parts:
        sign, style = _PARTS[kind]
        text.append(sign * max(1, round(BAR * size / total)), style)
    return text.append(f"  {mask}" if len(mask) <= BAR else f"  {len(parts)} parts", "dim")


def _turn(number: int, turn: Line) -> list[Text]:
    tokens = turn["end"] - turn["start"]
    facts = [f"{tokens} tokens", f"{turn['generate_s']:.2f} s"]
    facts += ["cut off"] if turn["finish_reason"] == "length" else []
    rows = [Text.assemble(Text(f"    turn {number}  ", "bold"), ("  ".join(facts), "dim"))]
    rows += [Text("      ").append(text, "green") for text in excerpt(turn["text"])]
    rows += [_used(use) for use in turn.get("used", [])]
    if not turn.get("used") and turn["exit_code"] is not None:
        rows.append(Text(f"      ↳ exit {turn['exit_code']}  {turn['command_s']:.2f} s", "dim"))
    return rows + [Text("      │ ", "dim").append(text) for text in excerpt(turn["observation"])]


def _used(use: Line) -> Text:
    end = "timed out" if use["timed_out"] else "" if use["exit_code"] is None else f"exit {use['exit_code']}"
    facts = [clean(use["tool"]) or "no call", *([end] if end else []), f"{use['seconds']:.2f} s"]
    row = Text(f"      ↳ {'  '.join(facts)}", "dim")
    problem = clean(use["problem"]).partition("\n")[0]
    return row.append(f"  {problem[:80]}", "yellow") if problem else row


def excerpt(text: str) -> Iterable[str]:
    """A text's lines without control characters: all of a short one, head and tail of a long one."""
    lines = clean(text).expandtabs(4).rstrip("\n").split("\n") if text.strip() else []
    lines = [line if len(line) <= WIDTH else f"{line[:WIDTH]} … {len(line) - WIDTH} more" for line in lines]
    if len(lines) <= SHOWN_LINES:
        return lines
    half = SHOWN_LINES // 2
    return [*lines[:half], f"… {len(lines) - 2 * half} lines …", *lines[-half:]]
