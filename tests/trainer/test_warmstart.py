"""The warm start: the same seed gives the same weights, and it teaches manners, no answers."""

from __future__ import annotations

import random
from collections import Counter

import torch
from rollout_kit import Bytes, tiny

from trainer.agent import Shell
from trainer.warmstart import session, warm_start


def test_the_same_seed_gives_the_same_weights() -> None:
    one, two, other = tiny(), tiny(), tiny()
    assert warm_start(one, 3, 7, Bytes()) == warm_start(two, 3, 7, Bytes()) < 6
    warm_start(other, 3, 8, Bytes())
    same = [torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True)]
    differ = [not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True)]
    assert all(same) and all(differ) and not one.training


def test_no_steps_change_nothing() -> None:
    model = tiny()
    assert warm_start(model, 0, 0, Bytes()) == 0
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny().parameters(), strict=True))


def test_sessions_look_like_episodes_and_favour_no_digit() -> None:
    shell, draw = Shell(Bytes()), random.Random(0)
    texts = [bytes(session(shell, draw)).decode() for _ in range(2000)]
    assert "$ cat hint.txt\nIt is seven.\n$ echo 7 > answer.txt\n" in texts
    digits = Counter(text[text.index("echo ") + 5] for text in texts)
    assert set(digits) == set("0123456789") and max(digits.values()) < 1.4 * min(digits.values())
