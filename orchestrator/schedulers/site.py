"""What a Slurm site offers: version, controller, accounting, partitions with their limits and GPUs.

What it is
    `read_site` asks (sinfo, scontrol) through the same seam as the scheduler; the parsers are pure.

How to use it
    site = read_site(LocalCommands()); site.partitions["gpu"].max_time

What it does not do
    It judges nothing (`orchestrator.doctor` does) and submits nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from orchestrator.schedulers.slurm_commands import Commands
from orchestrator.schedulers.slurm_text import seconds

SINFO = "%P|%a|%l|%s|%D|%c|%m|%G|%T"
_WORKS = ("idle", "mixed", "allocated", "completing", "planned", "reserved")


@dataclass
class Partition:
    """One partition. max_time in seconds, None without limit; memory in MiB; per node the largest."""

    name: str
    up: bool = True
    default: bool = False
    max_time: int | None = None
    max_nodes: int | None = None
    nodes: int = 0
    working: int = 0
    cpus: int = 0
    memory: int = 0
    gpus: dict[str, int] = field(default_factory=dict)
    """GPUs of a node by type; "" for GPUs without one."""


@dataclass
class Site:
    """`problem` says why the site could not be asked; the rest is empty then."""

    problem: str = ""
    version: str = ""
    controllers: list[str] = field(default_factory=list)
    settings: dict[str, str] = field(default_factory=dict)
    partitions: dict[str, Partition] = field(default_factory=dict)

    @property
    def default(self) -> Partition | None:
        return next((p for p in self.partitions.values() if p.default), None)


def read_site(commands: Commands, timeout_s: float = 20.0) -> Site:
    """Ask the site. Never raises for what a command or a network can do."""
    version = commands.run(["sinfo", "--version"], timeout=timeout_s)
    if version.rc:
        return Site(problem=version.said)
    ping = commands.run(["scontrol", "ping"], timeout=timeout_s)
    site = Site(version=version.out.strip(), controllers=(ping.out or ping.err).strip().splitlines())
    if ping.rc or not any("UP" in line for line in site.controllers):
        site.problem = f"the controller does not answer: {ping.said}"
        return site
    site.settings = settings(commands.run(["scontrol", "show", "config"], timeout=timeout_s).out)
    listed = commands.run(["sinfo", "-h", "-o", SINFO], timeout=timeout_s)
    site.partitions = partitions(listed.out.splitlines())
    return site


def settings(text: str) -> dict[str, str]:
    """`scontrol show config` as a mapping."""
    rows = (line.partition("=") for line in text.splitlines())
    return {
        name.strip(): value.strip() for name, equals, value in rows if equals and name.strip().isidentifier()
    }


def partitions(lines: Iterable[str]) -> dict[str, Partition]:
    """`sinfo -h -o SINFO`: several lines of a partition, one for each kind and state of nodes, added up."""
    found: dict[str, Partition] = {}
    for line in lines:
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) == 9:
            name = cells[0].removesuffix("*")
            part = found.setdefault(name, Partition(name, default=cells[0].endswith("*")))
            _add(part, cells)
    return found


def _add(part: Partition, cells: list[str]) -> None:
    _, avail, limit, sizes, nodes, cpus, memory, gres, state = cells
    part.up, part.max_time = avail == "up", seconds(limit)
    largest = sizes.rpartition("-")[2]
    part.max_nodes = int(largest) if largest.isdigit() else None
    count = _number(nodes)
    part.nodes += count
    part.working += count if state.rstrip("*$~#!%@^-+").split("*")[0] in _WORKS and "*" not in state else 0
    part.cpus, part.memory = max(part.cpus, _number(cpus)), max(part.memory, _number(memory))
    for kind, number in gpus(gres).items():
        part.gpus[kind] = max(part.gpus.get(kind, 0), number)


def gpus(gres: str) -> dict[str, int]:
    """`gpu:a100:4(S:0-1),gpu:2` as {"a100": 4, "": 2}."""
    found: dict[str, int] = {}
    for item in re.sub(r"\([^)]*\)", "", gres).split(","):
        name, *rest = item.split(":")
        if name == "gpu" and rest and rest[-1].isdigit():
            kind = ":".join(rest[:-1])
            found[kind] = found.get(kind, 0) + int(rest[-1])
    return found


def _number(text: str) -> int:
    digits = re.match(r"\d+", text)
    return int(digits[0]) if digits else 0
