"""How the training processes are started: the command line and its environment.

What it is
    One process as it is, or `torchrun` with a process for each GPU of a node; on several nodes `srun` starts
    one torchrun on each, and they meet on the first one. Pure but for the look for a free port.

How to use it
    argv = training_argv(command, settings, inside, life="4711.1"); env = step_environment(os.environ, cpus)

What it does not do
    It decides nothing about the end. What CUDA_VISIBLE_DEVICES holds (numbers, UUIDs, MIG slices) it
    neither reads nor changes.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from orchestrator.command import Command, Inbox
from orchestrator.contract import Settings
from orchestrator.processes import die_with_parent
from orchestrator.schedulers.inside import Inside

_FIRST_PORT, _PORTS = 20_000, 12_000  # below what kernels give to outgoing connections
_STALE = re.compile(
    r"(SRUN|PMI|PMI2|PMIX|OMPI|MPI|FLUX|SBATCH)_.*|SLURM_(CPU_BIND|STEP|LAUNCH|SRUN|TASK|GTIDS|PMI|MPI)\w*"
    r"|SLURM_(PROCID|LOCALID|NODEID|DISTRIBUTION|NTASKS_PER_NODE|TASKS_PER_NODE|NPROCS|NTASKS|EXPORT_ENV)"
    r"|SLURM_(MEM_PER_CPU|MEM_PER_GPU|UMASK|PRIO_PROCESS|RLIMIT_\w+|OVERCOMMIT|EXACT|OVERLAP)"
    r"|RANK|LOCAL_RANK|GROUP_RANK|ROLE_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|ROLE_WORLD_SIZE|MASTER_(ADDR|PORT)"
    r"|TORCHELASTIC_.*"
)


def training_argv(command: Sequence[str], settings: Settings, inside: Inside | None, life: str) -> list[str]:
    """The command line of a job's training processes. `life` is unique to this attempt of this run."""
    if settings.launcher != "torchrun":
        return list(command)
    hosts = inside.hosts() if inside else ["127.0.0.1"]
    before = inside.on_every_node(settings.nodes, settings.cpus) if inside else []
    host = hosts[0] if settings.nodes > 1 else "127.0.0.1"
    if before:  # a process of ours on each node, which leaves nothing of the step behind
        before += [sys.executable, "-m", "orchestrator.job", "step", f"{settings.stop_timeout:g}"]
    return [
        *before,
        *(sys.executable, "-m", "torch.distributed.run"),
        f"--nnodes={settings.nodes}",
        f"--nproc-per-node={settings.processes}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={host}:{free_port(life)}",
        f"--rdzv-id={life}",
        "--max-restarts=0",  # a run that lost a process goes on from a checkpoint, in a new life
        "--no-python",
        *command,
    ]


def run_step(argv: list[str], stop_timeout_s: float) -> int:
    """One node's part of a step, in its place: run the command, pass on the end, leave no process.

    Where Slurm knows processes by their parents only, a daemon of the command would outlive the job. The
    warning is not passed on: on several nodes it comes by file.
    """
    with Inbox() as inbox:
        die_with_parent()
        command = Command(argv, inbox, env=dict(os.environ), cwd=Path.cwd())
        while command.poll() is None and not inbox.stop:
            inbox.wait(1.0)
        code = command.end(stop_timeout_s)
    return code if code >= 0 else 128 - code


def free_port(life: str) -> int:
    """A port of this machine that nobody listens at; another one for each life of each run."""
    start = zlib.crc32(life.encode())
    for offset in range(100):
        port = _FIRST_PORT + (start + offset) % _PORTS
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise OSError(f"none of 100 ports from {_FIRST_PORT + start % _PORTS} on is free on this node")


def step_environment(environ: Mapping[str, str], settings: Settings) -> dict[str, str]:
    """The environment without ranks and step variables of whoever submitted or started us.

    What describes the job (SLURM_JOB_*, SLURM_CONF) stays: srun needs it.
    """
    kept = {name: value for name, value in environ.items() if not _STALE.fullmatch(name)}
    if settings.launcher == "torchrun" and settings.cpus and settings.nodes > 1:
        kept["SRUN_CPUS_PER_TASK"] = str(settings.cpus)
    return kept
