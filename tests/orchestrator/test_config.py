"""Layers and their order, origins, and errors that name the place, what is allowed and the nearest key."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from orchestrator import config_keys
from orchestrator.config import Resolved, dump, load, user_file
from orchestrator.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def problems(*assignments: str, name: str | None = None, environ: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(name, assignments, environ or {})
    return caught.value.problems


def written(folder: Path, text: str, name: str = "mine.yaml") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def user_says(folder: Path, text: str) -> dict[str, str]:
    path = user_file({"XDG_CONFIG_HOME": str(folder)})
    path.parent.mkdir(parents=True)
    path.write_text(text)
    return {"XDG_CONFIG_HOME": str(folder)}


# --- layers ------------------------------------------------------------------------------------------


def test_each_layer_goes_over_the_one_before(tmp_path: Path) -> None:
    mine = written(tmp_path, "training: {cpus: 2, nodes: 2, memory: 2G, time_limit: 2h}\n")
    environ = user_says(tmp_path, "training: {nodes: 3, memory: 3G, time_limit: 3h}\n")
    environ |= {"ORCHESTRATE__TRAINING__MEMORY": "4G", "ORCHESTRATE__TRAINING__TIME_LIMIT": "4h"}
    found = load(mine, ["training.time_limit=5h"], environ)
    training = found.config.training
    assert (training.gpus_per_node, training.cpus, training.nodes) == (1, 2, 3)
    assert (training.memory, training.time_limit) == (4096, 18000)


def test_every_value_knows_where_it_came_from(tmp_path: Path) -> None:
    mine = written(tmp_path, "# a comment\ntraining:\n  cpus: 2\n")
    environ = {"ORCHESTRATE__TRAINING__NODES": "3"}
    found = load(mine, ["run.seed=4"], environ)
    assert found.origin("training.cpus") == f"{mine}:3"
    assert found.origin("training.nodes") == "environment ORCHESTRATE__TRAINING__NODES"
    assert found.origin("run.seed") == "command line"
    assert re.fullmatch(r".*config/base\.yaml:\d+", found.origin("runtime.cpus"))
    assert found.origin("trainer.policy_lr") == "default"
    assert found.provenance()["training.cpus"] == {"layer": "config", "where": f"{mine}:3"}
    assert set(found.provenance()) == set(config_keys.keys())


def test_a_configuration_extends_another(tmp_path: Path) -> None:
    written(tmp_path, "extends: local\nrun: {name: middle, seed: 1}\n", "middle.yaml")
    mine = written(tmp_path, "extends: middle\nrun: {seed: 2}\n")
    config = load(mine).config
    assert (config.scheduler.kind, config.run.name, config.run.seed) == ("local", "middle", 2)


def test_extending_in_a_circle_is_refused(tmp_path: Path) -> None:
    written(tmp_path, "extends: mine\n", "other.yaml")
    assert "mine → other → mine" in problems(name=written(tmp_path, "extends: other\n"))[0]


@pytest.mark.parametrize("name", ["local", "dev", "production", None])
def test_the_configurations_of_the_project_are_right(name: str | None) -> None:
    load(name)


def test_a_frozen_configuration_gives_itself_again(tmp_path: Path) -> None:
    before = load("local", ["environment.variables.A=1: #x", "algorithm.dual_clip=null"])
    again = load(written(tmp_path, dump(before.config)))
    assert again.config == before.config


# --- values ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("training.nodes=4", 4),
        ("trainer.policy_lr=3e-4", 3e-4),
        ("data.shuffle=no", False),
        ("trainer.total_steps=null", None),
        ("algorithm.dual_clip=", None),
        ("scheduler.extra_args=[--exclusive, --nice=5, 7]", ["--exclusive", "--nice=5", "7"]),
        ("scheduler.extra_args=[]", []),
        ("scheduler.qos=no", "no"),  # text stays as typed: neither false …
        ("training.gpu_type=1e3", "1e3"),  # … nor a thousand
        ("scheduler.account=007", "007"),
        ("model.path=a: b", "a: b"),
        ("scheduler.account=", ""),
        ("runtime.memory=1.5GiB", 1536),
        ("runtime.time_limit=1-12:00:00", 129600),
        ("runtime.time_limit=90:00", 5400),
        ("runtime.time_limit=45m", 2700),
    ],
)
def test_values_of_the_command_line(assignment: str, value: object) -> None:
    assert _value(load(None, [assignment]), assignment.partition("=")[0]) == value


def _value(found: Resolved, key: str) -> object:
    value: object = found.config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def test_variables_add_up_and_keep_their_case(tmp_path: Path) -> None:
    mine = written(tmp_path, "environment:\n  variables:\n    A: 1\n    On: yes\n")
    environ = {
        "ORCHESTRATE__ENVIRONMENT__VARIABLES__My_Var": "x",
        "ORCHESTRATE__ENVIRONMENT__VARIABLES__B__C": "2",
    }
    found = load(mine, ["environment.variables.A=one"], environ)
    assert found.config.environment.variables == {"A": "one", "On": "yes", "My_Var": "x", "B__C": "2"}
    assert found.origin("environment.variables.A") == "command line"


# --- errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        ("training.gpu_per_node=2", "unknown key training.gpu_per_node; did you mean training.gpus_per_node"),
        ("nodes=2", "unknown key nodes; did you mean runtime.nodes or training.nodes?"),
        ("rollout.temprature=1", "did you mean rollout.temperature?"),
        ("zzz.qqq=1", "`orchestrate config keys` lists every key"),
        ("training.nodes=two", "training.nodes takes a whole number, at least 1; got `two`"),
        ("training.nodes=0", "training.nodes takes a whole number, at least 1; got `0`"),
        ("training.nodes=true", "training.nodes takes a whole number, at least 1; got `true`"),
        ("training.nodes=1.5", "training.nodes takes a whole number, at least 1; got `1.5`"),
        ("training.nodes=", "training.nodes takes a whole number, at least 1; got ``"),
        ("training.nodes=[1]", "training.nodes takes a whole number, at least 1; got a list"),
        ("data.shuffle=7", "data.shuffle takes true or false; got `7`"),
        ("scheduler.kind=pbs", "scheduler.kind takes one of local, slurm; got `pbs`"),
        (
            "runtime.memory=lots",
            "'lots' is no size; write a number of MiB, or one with K, M, G or T, like 4G",
        ),
        ("runtime.time_limit=soon", "'soon' is no duration; write seconds, or 90s, 45m, 2h"),
        ("scheduler.extra_args=--x", "scheduler.extra_args takes a list, like [a, b]; got `--x`"),
        ("runtime.sandbox=1", "runtime.sandbox is a section; set a key below it, like runtime.sandbox.image"),
        (
            "run.name=a b",
            "run.name takes text: 1 to 40 letters, digits, dots, dashes or underscores; got `a b`",
        ),
        ("training.nodes=[1", "training.nodes=[1 is not YAML: expected"),
        ("training.nodes", "'training.nodes' is no assignment; write key=value, like training.nodes=2"),
        ("=1", "'=1' is no assignment"),
    ],
)
def test_what_is_wrong_and_what_is_allowed(assignment: str, says: str) -> None:
    (problem,) = problems(assignment)
    assert says in problem and problem.startswith("command line: ")


def test_errors_name_file_and_line(tmp_path: Path) -> None:
    text = "training:\n  nodes: 1\n  gpus: 4\n  cpus: x\n  nodes: 2\nmodel: 7\nextra: {a: 1}\n"
    mine = written(tmp_path, text)
    told = problems(name=mine)
    starts = [t.partition(": ")[0].rpartition(":")[2] for t in told]
    assert sorted(starts) == ["3", "4", "5", "6", "7"] and all(t.startswith(mine) for t in told)
    assert any("training.nodes is given twice" in t for t in told)


def test_errors_of_the_environment_name_the_variable() -> None:
    (told,) = problems(environ={"ORCHESTRATE__TRAINING__NODE": "2"})
    assert told.startswith("environment ORCHESTRATE__TRAINING__NODE: unknown key training.node")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("training: [", ":1: not YAML"),
        ("- a\n", "expected sections"),
        ("training: {nodes: !!python/object:os.system 1}", "training.nodes takes a whole number"),
        ("\x00", "not YAML"),
        ("a: &x {b: *x}", "unknown key a"),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, text: str, says: str) -> None:
    assert says in problems(name=written(tmp_path, text))[0]


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert load(written(tmp_path, "training:\n\n# nothing\n")).config == load(None).config


def test_files_that_are_missing_or_no_text(tmp_path: Path) -> None:
    assert "one of the names" in problems(name="nope")[0]
    assert f"no configuration file {tmp_path}/x.yaml" in problems(name=f"{tmp_path}/x.yaml")[0]
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read as text" in problems(name=f"{tmp_path}/b.yaml")[0]


def test_all_problems_are_told_at_once() -> None:
    assert len(problems("a=1", "training.nodes=0", "data.shuffle=2")) == 3


# --- the reference page ------------------------------------------------------------------------------


def test_every_key_says_what_it_means() -> None:
    assert [key.name for key in config_keys.keys().values() if not key.doc] == []


def test_the_reference_page_is_current() -> None:
    """Mend with: orchestrate config keys --markdown > docs/reference/config.md"""
    assert (ROOT / "docs" / "reference" / "config.md").read_text() == config_keys.markdown()
