"""What the stand-in trainer does in tests of several lives: TRAINER_DOES=thrice, follow, or together.

thrice: writes a checkpoint when it is warned and asks for another life; the third one succeeds.
follow: goes on once the runtime has come back at another address.
together: several processes add up their ranks with gloo. With WAITS they first wait for a request for a
checkpoint, rank 0 writes it, and they ask for another life; that one succeeds.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from typing import Any

from orchestrator.contract import Env, RunDirectory

run = RunDirectory(os.environ[Env.RUN_DIR])


def thrice() -> None:
    done = len(list(run.checkpoints.glob("step-*")))

    def checkpoint(*_: Any) -> None:
        (run.checkpoints / f"step-{done + 1}").mkdir(parents=True)
        sys.exit(85)

    print(f"life {done + 1}", flush=True)
    for number in (signal.SIGUSR1, signal.SIGTERM):  # as the real one does
        signal.signal(number, checkpoint)
    if done < 2:
        (run.training / f"up-{done + 1}").touch()
        time.sleep(1000)


def follow() -> None:
    first = run.read_text(run.runtime_url)
    (run.training / "up-1").touch()
    while run.read_text(run.runtime_url) in (first, "") or not (run.training / "go").exists():
        time.sleep(0.1)


def together() -> None:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank, again = dist.get_rank(), run.checkpoints.exists()
    number = torch.tensor([float(rank + 1)])
    dist.all_reduce(number)
    about = {name: os.environ.get(name) for name in ("SLURM_CONF", "SRUN_CPUS_PER_TASK", "FI_PROVIDER")}
    print(f"rank={rank} world={dist.get_world_size()} sum={number.item():g} {about}", flush=True)
    (run.training / f"rank-{rank}-{socket.gethostname()}-{os.environ['LOCAL_RANK']}").touch()
    if "WAITS" in os.environ and not again:
        while run.read_text(run.checkpoint_request) != os.environ[Env.NONCE]:
            time.sleep(0.1)
        dist.barrier()
        if rank == 0:
            (run.checkpoints / "step-1").mkdir(parents=True)
        dist.barrier()
        sys.exit(85)
    dist.barrier()
    if rank:
        dist.destroy_process_group()
        sys.exit(0)


DOES = {"thrice": thrice, "follow": follow, "together": together}
