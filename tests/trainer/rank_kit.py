"""Run a function in several processes that form one group, and get back what each returned."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

PLACE = Path(__file__).resolve().parent
ROOT = PLACE.parent.parent
START = """
import pickle, sys
from datetime import timedelta
from importlib import import_module
from pathlib import Path
import torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
from trainer.ranks import Ranks
dist.init_process_group("gloo", timeout=timedelta(seconds=60))
module, name, given, out = sys.argv[2:6]
ranks = Ranks(dist.get_rank(), dist.get_world_size())
found = getattr(import_module(module), name)(ranks, *pickle.loads(Path(given).read_bytes()))
Path(out, f"rank{ranks.rank}").write_bytes(pickle.dumps(found))
dist.barrier()
dist.destroy_process_group()
"""


def on_ranks(size: int, folder: Path, module: str, name: str, *given: Any) -> list[Any]:
    """`module.name(ranks, *given)` on `size` ranks under torchrun; their results in order."""
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / "start.py"
    script.write_text(START)
    (folder / "given").write_bytes(pickle.dumps(given))
    arguments = [str(script), str(PLACE), module, name, str(folder / "given"), str(folder)]
    done = torchrun(size, arguments)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-6000:]
    return [_load(folder / f"rank{i}") for i in range(size)]


def _load(path: Path) -> Any:
    return pickle.loads(path.read_bytes())  # noqa: S301  # our own, of a moment ago


def torchrun(size: int, arguments: list[str], timeout_s: float = 100) -> subprocess.CompletedProcess[str]:
    """A program on `size` ranks of this machine, over gloo, each with one thread."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    return subprocess.run(
        [*launcher, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
