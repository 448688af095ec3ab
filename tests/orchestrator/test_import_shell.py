"""`orchestrate config import`: shell files read without a shell, names mapped, values checked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from orchestrator.cli_commands import cli
from orchestrator.config import find_key, load
from orchestrator.import_shell import TARGETS, as_yaml, convert, parse

OLD = r"""#!/bin/bash
# the old way
export GPU_PARTITION="gpu_test"   # the GPUs
CPU_PARTITION='test'
CPUS_FOR_RUNTIME=16
MEM_FOR_RUNTIME="64G"
MAX_PARALLEL_AGENTS=32
TP_SIZE=2
RUNTIME_READY_TIMEOUT=600
DATA_ROOT="$HOME/data"
TRAIN_DATA="${DATA_ROOT}/train.parquet"
VAL_DATA="${NO_SUCH:-$DATA_ROOT}/val.parquet"
GPUS_PER_NODE=2
BATCH_SIZE=16; ROLLOUT_N=4
TIME_LIMIT=720
GPU_MEMORY_UTILIZATION=1.5
ENV_FILE=
DEBUG=1
HF_TOKEN=abc123
WANDB_PROJECT="agents # 1"
HOSTS=$(touch /tmp/never-run-by-an-import)
GPU_PARTITON=x
NODE_LIST=(a b)
"""


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("A=plain # comment", "plain"),
        ("A=has#hash", "has#hash"),
        ("A='single $X # kept'", "single $X # kept"),
        ('A="double \\" quote"', 'double " quote'),
        ('A="cost \\$5"', "cost $5"),
        ("A=a\"b\"'c'", "abc"),
        ("  export   A=1", "1"),
        ("A=", ""),
        ("B=x\nA=${B}y$B", "xyx"),
        ("A=${NOPE:-z}", "z"),
        ("A=one \\\n two", "one"),
        ('A="two\nlines"', "two\nlines"),
        ("A=1\nA=2", "2"),
        ("B=1; A=3", "3"),
    ],
)
def test_values_are_read_as_a_shell_would(text: str, value: str) -> None:
    found = {each.name: each for each in parse(text)}["A"]
    assert (found.value, found.problem) == (value, "")


@pytest.mark.parametrize("text", ["A=$(id)", 'A="`id`"', "A=(1 2)", "A=${OTHER}"])
def test_what_needs_a_shell_is_a_problem(text: str) -> None:
    (found,) = parse(text)
    assert found.problem


def test_every_target_is_a_key_and_every_name_is_there_once() -> None:
    names = [name for words in TARGETS for name in words.split()]
    assert len(names) == len(set(names))
    assert all(find_key(key) is not None for keys, _ in TARGETS.values() for key in keys)


def test_a_file_becomes_a_configuration(tmp_path: Path) -> None:
    found = convert(parse(OLD))
    text = as_yaml(found, "old.conf")
    path = tmp_path / "new.yaml"
    path.write_text(text)
    config = load(str(path), [], {}).config
    assert (config.training.partition, config.runtime.partition) == ("gpu_test", "test")
    assert config.runtime.memory == 65536 and config.runtime.max_parallel_sandboxes == 32
    assert config.training.time_limit == config.runtime.time_limit == 12 * 3600
    assert config.data.train == "~/data/train.parquet" and config.data.validation == "~/data/val.parquet"
    assert config.rollout.rollouts_per_prompt == 4 and config.environment.debug
    assert config.environment.variables == {"WANDB_PROJECT": "agents # 1"}
    assert "# GPU_PARTITION, line 3" in text and "abc123" not in text


def test_what_was_not_taken_is_named() -> None:
    found = convert(parse(OLD))
    left = {each.name: why for each, why in found.unmapped}
    assert left["GPU_PARTITON"].startswith("perhaps training.partition")
    assert "secret" in left["HF_TOKEN"] and "shell" in left["HOSTS"] and "array" in left["NODE_LIST"]
    assert "other values use it" in left["DATA_ROOT"]
    assert len(found.wrong) == 1 and "at most 1; got `1.5`" in found.wrong[0]
    assert not Path("/tmp/never-run-by-an-import").exists()


def test_a_secret_does_not_slip_in_through_another_value() -> None:
    found = convert(parse("HF_TOKEN=abc123\nMODEL_PATH=https://u:$HF_TOKEN@hub/m\n"))
    assert not found.values and "abc123" not in as_yaml(found, "x")


def test_two_names_for_one_key_are_not_both_taken() -> None:
    found = convert(parse("EPOCHS=2\nTOTAL_EPOCHS=3\n"))
    assert found.values["trainer.total_epochs"][0] == "2"
    assert "already set by EPOCHS" in found.unmapped[0][1]


def test_the_command(tmp_path: Path) -> None:
    source, target = tmp_path / "old.conf", tmp_path / "new.yaml"
    source.write_text(OLD.replace("1.5", "0.5") + "MAX_TURNS=4\n")
    run = CliRunner()
    done = run.invoke(cli, ["config", "import", str(source), "-o", str(target)])
    assert done.exit_code == 0 and "unmapped" in done.stderr and "abc123" not in done.output
    assert yaml.safe_load(target.read_text())["rollout"]["max_turns"] == 4
    again = run.invoke(cli, ["config", "import", str(source), "-o", str(target)])
    assert again.exit_code == 2 and "--force" in again.stderr
    about = json.loads(run.invoke(cli, ["config", "import", str(source), "--json"]).stdout)
    assert about["values"]["rollout.max_turns"] == {"value": "4", "from": "MAX_TURNS", "line": 24}
    source.write_text(OLD)
    assert run.invoke(cli, ["config", "import", str(source)]).exit_code == 1
    assert run.invoke(cli, ["config", "import", "/no/such.conf"]).exit_code == 2
