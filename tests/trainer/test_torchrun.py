"""Whole trainings under torchrun: the losses of one process, bit-equal resume, and all ranks end together."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cluster import Cluster
from rank_kit import PLACE, torchrun
from training_kit import new_run, small_config

from orchestrator.contract import RunDirectory, read_json_lines
from orchestrator.schema import Config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

COMPARED = ("loss_policy", "loss_value", "kl", "entropy", "reward_mean", "grad_norm_policy", "mismatch")


def prepared(folder: Path, **trainer: Any) -> RunDirectory:
    """A run of three steps of three prompts × three episodes."""
    folder.mkdir(exist_ok=True)
    config = small_config(folder, tasks=9, total_steps=3, save_every=1, ranks_timeout=60, **trainer)
    data = config.model_dump(mode="json")
    data["rollout"]["prompts_per_step"] = 3
    data["training"]["cpus"] = 1
    Config.model_validate(data)
    (folder / "config.yaml").write_text(yaml.safe_dump(data))
    run = new_run(folder)
    (folder / "run").write_text(str(run.root))
    return run


def trained(folder: Path, size: int, *asked: str, code: int = 0) -> str:
    """Run it on so many ranks; returns what they said."""
    done = torchrun(size, [str(PLACE / "torchrun_main.py"), str(folder), *asked], timeout_s=300)
    said = done.stdout + done.stderr
    assert (done.returncode != 0) == bool(code), said[-8000:]
    return said


def rows(run: RunDirectory) -> list[dict[str, float]]:
    return [{name: row.get(name, 0.0) for name in COMPARED} for row in read_json_lines(run.metrics)]


def weights(folder: Path, rank: int = 0) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(folder / f"policy-{rank}.pt")
    return found


def alike(first: Path, second: Path) -> bool:
    mine, theirs = weights(first), weights(second)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """One process, as it was before there were ranks."""
    folder = tmp_path_factory.mktemp("alone")
    run = prepared(folder)
    trained(folder, 1)
    return run


@pytest.mark.parametrize("size", [2, 4])
def test_several_ranks_train_as_one_process(tmp_path: Path, alone: RunDirectory, size: int) -> None:
    run = prepared(tmp_path / "several")
    said = trained(tmp_path / "several", size)
    assert said.count("step    0") == 1, said
    for mine, theirs in zip(rows(run), rows(alone), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5, rel=1e-4)
    played = [read_json_lines(r.rollouts / "step-000000.jsonl") for r in (run, alone)]
    assert [line["task"] for line in played[0]] == [line["task"] for line in played[1]]
    for rank in range(1, size):
        mine, first = weights(tmp_path / "several", rank), weights(tmp_path / "several")
        assert all(torch.equal(mine[name], first[name]) for name in first)


def test_ranks_resume_bit_for_bit_and_one_process_goes_on_from_theirs(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    prepared(whole)
    trained(whole, 2)
    run = prepared(parts)
    # The second step's third opening on rank 1: rank 0 hears of it and both save the state before the step.
    trained(parts, 2, "rank=1", "what=checkpoint", "at=8")
    ends = [json.loads(line) for line in (parts / "ends.jsonl").read_text().splitlines()]
    assert ends == ["Interrupted: checkpoint"] * 2
    assert (run.checkpoints / "latest").read_text() == "step-000001\n"
    trained(parts, 2)
    assert alike(whole, parts)
    # the same checkpoint, read by one process and by four
    for size in (1, 4):
        other = tmp_path / f"other{size}"
        moved = prepared(other, checkpoint_dir=str(run.checkpoints))
        (run.checkpoints / "latest").write_text("step-000002\n")
        trained(other, size)
        assert rows(moved)[-1] == pytest.approx(rows(run)[2], abs=1e-5, rel=1e-4)


def test_a_rank_that_dies_ends_the_others(tmp_path: Path) -> None:
    prepared(tmp_path / "run")
    start = time.monotonic()
    said = trained(tmp_path / "run", 2, "rank=1", "what=die", "at=4", code=1)
    assert time.monotonic() - start < 90, "the other rank waited for it"
    assert "exitcode  : 7" in said or "exitcode: 7" in said, said[-3000:]


def test_adapters_packing_and_recomputation_train_on_ranks_as_alone(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    found = []
    for size in (1, 2):
        folder = tmp_path / f"ranks{size}"
        run = prepared(folder, packing=True, activation_checkpointing=True)
        data = yaml.safe_load((folder / "config.yaml").read_text())
        data["model"] |= {"lora_rank": 4, "lora_alpha": 8}
        (folder / "config.yaml").write_text(yaml.safe_dump(data))
        trained(folder, size)
        found.append(rows(run))
    for mine, theirs in zip(*found, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5, rel=1e-4)


def test_ranks_evaluate_as_one_process_and_go_on_where_others_ended(tmp_path: Path) -> None:
    """Two ranks, told to end on one of them, then three, then nothing is left for one process to do."""
    found = []
    for name, lives in (
        ("alone", [(1, ())]),
        ("several", [(2, ("rank=1", "what=checkpoint", "at=3")), (3, ())]),
    ):
        run = prepared(tmp_path / name)
        path = tmp_path / name / "config.yaml"
        data = yaml.safe_load(path.read_text())
        data["data"]["validation"] = data["data"]["train"]
        data["rollout"] |= {"validation_rollouts": 2, "max_parallel_episodes": 1, "max_turns": 1}
        data["evaluation"] = {"k": "1,2"}
        path.write_text(yaml.safe_dump(data))
        for size, words in lives:
            trained(tmp_path / name, size, *words)
        lines = read_json_lines(run.rollouts / "validation-000000.jsonl")
        found.append([(one["number"], one["task"], one["turns"][0]["text"], one["reward"]) for one in lines])
    assert found[0] == found[1] and [one[0] for one in found[0]] == list(range(18))
    ends = [json.loads(line) for line in (tmp_path / "several" / "ends.jsonl").read_text().splitlines()]
    assert ends[:2] == ["Interrupted: checkpoint"] * 2 and len(set(ends[2:])) == 1 and "pass@2" in ends[2]
    judged = [one for path in run.judged.iterdir() for one in read_json_lines(path)]
    numbers = [one["number"] for one in judged if "number" in one]
    assert sorted(numbers) == list(range(18)), "none twice, none missing"


@pytest.mark.vllm
def test_ranks_bring_their_shards_into_a_vllm_each(tmp_path: Path) -> None:
    """Every step's probe compares what vLLM samples with the sharded policy, on the rank that is worst."""
    folder = tmp_path / "run"
    run = prepared(folder)
    data = yaml.safe_load((folder / "config.yaml").read_text())
    data["rollout"] |= {"engine": "vllm", "kv_cache_bytes": 64 << 20, "max_prompt_length": 256}
    data["rollout"] |= {"max_response_length": 256}
    (folder / "config.yaml").write_text(yaml.safe_dump(data))
    trained(folder, 2)
    found = read_json_lines(run.metrics)
    assert len(found) == 3 and all(row["probe"] < 1e-3 for row in found)
    assert all(row["mismatch_max"] < 1e-3 for row in found)


@pytest.mark.cluster
def test_two_hosts_of_a_slurm_train_as_one_process(cluster: Cluster, alone: RunDirectory) -> None:
    """srun starts one torchrun on each host; they meet on the first one, over its network."""
    folder = cluster.shared / "two-hosts"
    run = prepared(folder)
    for path in [folder, *folder.rglob("*")]:
        os.chown(path, cluster.uid, cluster.uid)
    step = ["srun", "--nodes=2", "--ntasks-per-node=1", "--nodelist=cpu1,cpu2", "--kill-on-bad-exit=1"]
    launcher = [cluster.python, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    meeting = ["--rdzv-backend=c10d", "--rdzv-endpoint=cpu1:29517", "--rdzv-id=two-hosts"]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{cluster.repo}:{PLACE}"}
    program = [str(PLACE / "torchrun_main.py"), str(folder)]
    done = cluster.run([*step, *launcher, *meeting, *program], env=environment, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert "step    2" in done.stdout
    for mine, theirs in zip(rows(run), rows(alone), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5, rel=1e-4)
