"""The trainer in numbers, beside TRL's GRPO trainer, vLLM alone and transformers' `generate`.

How to run it (needs `pip install -e .[bench]`; about 15 minutes on two cores)
    python -m bench.trainer [--json] [--small] [--only train,generate,demo]

What it measures, all in one run, on one model: SmolLM2-135M's shape with random weights, float32
    train     train_tok_s, train_peak_mib     a step of ours: GRPO, sequences packed, one optimiser step
              trl_train_tok_s, …_peak_mib     a step of TRL's GRPOTrainer on the same rows, in micro-batches
                                              of as many rows as our budget of tokens holds of the longest
              …_recompute_…                   both again, activations computed again in the backward pass
    generate  rollout_tok_s                   our rollouts over vLLM, one turn, an environment without cost
              vllm_tok_s                      vLLM's own `LLM.generate` on the same prompts
              hf_generate_tok_s               transformers' `generate`, one batch
              sync_ms                         new weights into the engine
              overlap                         a step whose commands wait as long as it generates, ÷ that time
    demo      demo_grpo_reached_s, …_trl_…    the demo's task until success is .8, the mean of five steps;
              demo_ppo_reached_s              start of the engine included

    Tokens of the training rows are all real ones, prompts too; peak memory is the process's resident size.

What it does not do
    No GPU. TRL trains no PPO any more, so GRPO stands against GRPO.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.parts import add_only, only
from bench.trainer_kit import SMALL, Shape, make_model

GROUPS = {
    "train": ("train", "trl_train", "train_recompute", "trl_train_recompute"),
    "generate": ("vllm", "rollout", "hf_generate"),
    "demo": ("demo_grpo", "demo_trl", "demo_ppo"),
}
LIMIT_S = 1200


def measure(row: str, folder: Path, small: bool, quiet: bool) -> dict[str, Any]:
    """One row, in its own process. Raises SystemExit with the end of what it said when it fails."""
    argv = [sys.executable, "-m", "bench.trainer_rows", row, str(folder), *(["--small"] if small else [])]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    if done.returncode:
        raise SystemExit(f"{row} failed with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if not quiet:
        print(f"{row:22}", *(f"{name} {value:.5g}" for name, value in found.items() if value is not None))
        sys.stdout.flush()
    return found


def demo_model(folder: Path) -> None:
    """The built-in model after the demo's warm start."""
    from trainer.model import ByteTokenizer, tiny_policy
    from trainer.warmstart import warm_start
    from trainer.weights import save_model

    policy = tiny_policy(0)
    warm_start(policy, 150, 0, ByteTokenizer())
    save_model(policy, folder)


def table(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The rows under the names of this module's docstring, with the ratios that are wanted."""
    rows: dict[str, Any] = {}
    for row, prefix in (("train", "train"), ("trl_train", "trl_train")):
        for suffix in ("", "_recompute"):
            for name, value in found.get(row + suffix, {}).items():
                rows[f"{prefix}{suffix}_{name}"] = value
    if "train" in found:
        rows["train_speedup"] = rows["train_tok_s"] / rows["trl_train_tok_s"]
        rows["train_memory"] = rows["train_peak_mib"] / rows["trl_train_peak_mib"]
    if "rollout" in found:
        ours = found["rollout"]
        rows |= {"rollout_tok_s": ours["tok_s"], "vllm_tok_s": found["vllm"]["tok_s"]}
        rows |= {"hf_generate_tok_s": found["hf_generate"]["tok_s"], "sync_ms": ours["sync_ms"]}
        rows["rollout_share"] = ours["tok_s"] / found["vllm"]["tok_s"]
        rows["overlap"] = ours["both_s"] / max(ours["generation_s"], ours["environment_s"])
    for name in ("demo_grpo", "demo_ppo", "demo_trl"):
        for key, value in found.get(name, {}).items():
            rows[f"{name}_{key}"] = value
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.trainer", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--json", action="store_true", help="only the JSON line")
    parser.add_argument("--small", action="store_true", help="a tiny model: shows that it runs")
    add_only(parser, GROUPS)
    options = parser.parse_args()
    wanted = only(parser, options.only, GROUPS)
    load = os.getloadavg()[0]
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="bench-trainer-") as base:
        models = {"demo": Path(base) / "demo", "": Path(base) / "model"}
        make_model(models[""], SMALL if options.small else Shape())
        if "demo" in wanted:
            demo_model(models["demo"])
        for group in wanted:
            for row in GROUPS[group]:
                folder = models["demo" if group == "demo" else ""]
                found[row] = measure(row, folder, options.small, options.json)
    print(json.dumps(table(found) | {"load_before": round(load, 2)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
