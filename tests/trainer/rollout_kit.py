"""What the tests of rollouts share: the tiny model, a scripted engine, and a real sandbox server."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from trainer.engines import Sample, Sampling
from trainer.environments.address import Address
from trainer.environments.sandbox import SandboxEnvironment, connect
from trainer.model import ByteTokenizer as Bytes
from trainer.model import tiny_policy

__all__ = ["Bytes", "Scripted", "Server", "disturb", "tiny"]


def tiny(seed: int = 0) -> nn.Module:
    """The built-in model, untrained."""
    return tiny_policy(seed)


def disturb(model: torch.nn.Module, by: float = 0.1) -> None:
    """Change every weight, as training would, only more."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * by)


class Scripted:
    """An engine that says what a function of the dialogue tells it to; it keeps every prompt it was sent."""

    version = 3

    def __init__(self, say: Callable[[str, Sampling], str]) -> None:
        self.say = say
        self.prompts: list[list[int]] = []
        self.seeds: list[int | None] = []

    async def generate(self, ids: list[int], sampling: Sampling) -> Sample:
        self.prompts.append(list(ids))
        self.seeds.append(sampling.seed)
        await asyncio.sleep(0)
        said = list(self.say(bytes(ids).decode(), sampling).encode())[: sampling.max_tokens]
        stopped = bool(said) and said[-1] in sampling.stop_token_ids
        return Sample(said, [-0.5] * len(said), "stop" if stopped else "length")

    async def load(self, version: int) -> None:
        self.version = version

    async def probe(self, prompt: list[int]) -> float:
        return 0.0

    async def close(self) -> None:
        pass


class Server:
    """`python -m runtime_server`, alone, as somebody would start it by hand."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "runtime_server"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        said: dict[str, str] = {}
        assert self.process.stdout is not None
        for line in self.process.stdout:
            name, _, value = line.partition(":")
            said[name] = value.strip()
            if name == "try":
                break
        assert "key" in said, "the server did not start"
        self.key_file = Path(said["key"])
        self.address = Address(said["url"], self.key_file.read_text().strip())

    def environment(self) -> SandboxEnvironment:
        return SandboxEnvironment(lambda: self.address, connect, ttl_s=120, queue_timeout_s=60)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.communicate(timeout=60)
