"""Stands in the place of the trainer in tests of whole launches on a cluster: some steps, no model.

`python -m trainer --run-dir R`, found first on PYTHONPATH. TRAINER_DOES is what it does: steps (the
default), fail, hang, or one of `lives`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request

from orchestrator.contract import Env, RunDirectory, append_line
from trainer import lives  # ours: this folder is first on the path

run, does = RunDirectory(os.environ[Env.RUN_DIR]), os.environ.get("TRAINER_DOES", "steps")
subprocess.run(["setsid", "--fork", "sleep", "1000"], check=True)
if does == "fail":
    print("the trainer gives up", file=sys.stderr)
    sys.exit(7)
if does == "hang":
    (run.training / "up").touch()
    time.sleep(1000)
if does in lives.DOES:
    lives.DOES[does]()
with urllib.request.urlopen(f"{run.read_text(run.runtime_url)}/health", timeout=10) as answer:  # noqa: S310
    assert answer.status == 200
for step in range(3):
    append_line(run.metrics, json.dumps({"step": step, "success_rate": step / 2}))
foreign = sorted(name for name in os.environ if name.startswith(("SBATCH_", "FOREIGN")))
devices = os.environ.get("CUDA_VISIBLE_DEVICES", "")
print(f"foreign={foreign} devices={devices!r} conf={os.environ.get('SLURM_CONF')}", flush=True)
run.publish(run.summary, json.dumps({"metrics": {"success_rate": 1.0}, "reason": "all steps done"}))
