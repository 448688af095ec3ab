"""A private Slurm for people: starts one, gives you a shell in it, removes it when the shell ends.

How to run it
    make cluster                                    a shell on the login host, as an ordinary user
    make cluster CMD='srun -p gpu_test hostname'    one command instead; its exit code is ours
    make cluster ARGS=--accounting                  with slurmdbd, so that sacct answers

What it does not do: nothing survives it. Copy what you want to keep out of the shared directory first.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence

from . import config
from .cluster import Cluster
from .machine import ClusterError

BANNER = """
A private Slurm of four nodes; you are {user} on its login host.

  partitions   test (cpu1, cpu2: {cpus} CPUs each)   gpu_test (gpu1, gpu2: {gpus} GPUs each)
               gpu_low (as gpu_test, but its jobs make way for those of gpu_test)
  shared       {shared}   the same directory on every host; it goes with the cluster
  submit       srun -N2 hostname      sbatch -p gpu_test --gres=gpu:1 --wrap 'echo $CUDA_VISIBLE_DEVICES'
               orchestrate doctor     orchestrate launch --config dev --dry-run
  look         sinfo   squeue   scontrol show job
  leave        exit, or Ctrl-D; then everything is removed
"""


def main(argv: Sequence[str] | None = None) -> int:
    options = _arguments(argv)
    try:
        with Cluster(accounting=options.accounting) as cluster:
            return _one_command(cluster, options.command) if options.command else _shell(cluster)
    except ClusterError as error:
        print(f"No cluster: {error}", file=sys.stderr)
        return 2


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make cluster", description="Start a private Slurm and enter it.")
    parser.add_argument("--accounting", action="store_true", help="with slurmdbd and its database")
    parser.add_argument("-c", dest="command", help="run this with bash, then leave; default: a shell")
    return parser.parse_args(argv)


def _shell(cluster: Cluster) -> int:
    print(BANNER.format(user=cluster.user, cpus=config.CPUS, gpus=config.GPUS, shared=cluster.shared))
    _attached(cluster, ["bash"], terminal=sys.stdin.isatty())
    return 0  # the exit code of a shell is that of whatever came last in it


def _one_command(cluster: Cluster, command: str) -> int:
    return _attached(cluster, ["bash", "-c", command], terminal=False)


def _attached(cluster: Cluster, argv: list[str], terminal: bool) -> int:
    """Run with our own streams; Ctrl-C reaches the command, which decides."""
    environment = cluster.environment() | {"TERM": os.environ.get("TERM", "dumb")}
    command = subprocess.Popen(cluster.command(argv, terminal=terminal), env=environment)
    while True:
        try:
            status = command.wait()
        except KeyboardInterrupt:
            continue
        return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())
