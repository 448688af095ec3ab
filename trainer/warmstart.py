"""A warm start for a model that has never seen a shell: a few supervised steps on made-up sessions.

What it is
    `warm_start` teaches the built-in tiny model the manners of a task family (look around, then write
    an answer) and none of its answers: commands and digits of its sessions are drawn uniformly. PPO
    then has something to reinforce. The same seed gives the same weights.

How to use it
    loss = warm_start(model, steps=150, seed=0, tokenizer=tokenizer)

What it does not do
    It is no pre-training: a real model comes with its own manners and needs none of this.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn

from trainer.agent import Shell, Tokenizer
from trainer.tasks import HINT, NOTES

BATCH = 64
LEARNING_RATE = 3e-3
IGNORED = -100

LOOKS = {"cat hint.txt": HINT, "ls": "hint.txt\nnotes.txt\n", "cat notes.txt": NOTES}


def warm_start(model: nn.Module, steps: int, seed: int, tokenizer: Tokenizer) -> float:
    """Train `model` in place for `steps` AdamW steps; returns the last loss (nats per token)."""
    if steps < 1:
        return 0.0
    shell, draw = Shell(tokenizer), random.Random(seed)  # noqa: S311 - sessions, no secret
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    model.train()
    for _ in range(steps):
        loss = _loss(model, _batch([session(shell, draw) for _ in range(BATCH)]))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch ships it untyped
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    return float(loss.detach())


def session(shell: Shell, draw: random.Random) -> list[int]:
    """One session in tokens: look at something, then write some digit; each choice uniform."""
    look = draw.choice(list(LOOKS))
    _, seen = shell.observation(LOOKS[look].encode(), 4096)
    answer = f"echo {draw.randrange(10)} > answer.txt"
    return [*shell.prompt(shell.PROMPT), *shell.line(look), *seen, *shell.line(answer)]


def _batch(sessions: list[list[int]]) -> Tensor:
    """Right-padded with IGNORED, shape [sessions, longest]."""
    longest = max(map(len, sessions))
    return torch.tensor([ids + [IGNORED] * (longest - len(ids)) for ids in sessions])


def _loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean cross-entropy of each next token; padding on the right is not seen by what is before it."""
    ids = ids.to(next(model.parameters()).device)
    logits: Tensor = model(input_ids=ids.clamp(min=0)).logits[:, :-1].float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=IGNORED)
