"""Rows of metrics, and the alarms that look at them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import pytest

from orchestrator.contract import RunDirectory
from orchestrator.durable import read_json_lines
from orchestrator.schema import Config
from trainer.errors import Missing
from trainer.loggers import KINDS, Careful, open_loggers
from trainer.metrics import COLLAPSED_STEPS, Clock, Metrics, Row, alarms
from trainer.preflight import problems


def names(row: Row, before: list[Row] | None = None) -> list[tuple[str, bool]]:
    return [(alarm.name, alarm.fatal) for alarm in alarms(row, before or [], limit=0.1)]


def test_rows_are_json_lines_and_curves(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "training" / "metrics.jsonl", tmp_path / "board")
    for step in range(3):
        metrics.log({"step": step, "success_rate": step / 2, "kl": math.inf})
    metrics.close()
    text = (tmp_path / "training" / "metrics.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert rows[2]["success_rate"] == 1.0 and rows[2]["kl"] is None
    assert metrics.last("success_rate", 2) == [0.5, 1.0] and metrics.last("kl") == []
    assert len(list((tmp_path / "board").glob("events.out.tfevents*"))) == 1


def test_after_a_resume_no_step_is_counted_twice(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    before = Metrics(path)
    for step in range(5):
        before.log({"step": step, "reward_mean": 1.0})
    with path.open("a") as file:
        file.write('{"step": 5, "rew')  # killed while writing
    after = Metrics(path, start=3)
    assert [row["step"] for row in after.rows] == [0, 1, 2]
    for step in range(3, 6):
        after.log({"step": step, "reward_mean": 2.0})
    assert [(row["step"], row["reward_mean"]) for row in read_json_lines(path)] == [
        (0, 1.0), (1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0),
    ]  # fmt: skip


def test_a_run_that_starts_anew_starts_with_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    Metrics(path).log({"step": 0})
    assert Metrics(path, start=0).rows == [] and path.read_text() == ""


def test_the_parts_of_a_step_add_up_to_its_total() -> None:
    clock = Clock()
    with clock("rollout"):
        sum(range(10_000))
    with clock("rollout"), clock("unlisted"):
        sum(range(10_000))
    row = clock.row()
    parts = [row[f"time/{name}"] for name in ("rollout", "logprob", "update", "sync", "idle")]
    assert row["time/rollout"] > 0 and math.isclose(sum(parts), row["time/total"])


def test_a_healthy_step_raises_no_alarm() -> None:
    row = {"step": 1.0, "mismatch": 1e-6, "first_ratio_error": 0.0, "nonfinite": 0.0, "status/truncated": 0.3}
    assert names(row) == []


def test_what_is_not_finite_is_an_alarm_and_three_in_a_row_are_fatal() -> None:
    bad = {"nonfinite": 2.0}
    assert names(bad) == [("nonfinite", False)]
    assert names({"loss_policy": math.nan}) == [("nonfinite", False)]
    assert names(bad, [{"loss_value": 0.1}, bad]) == [("nonfinite", False)]
    assert names(bad, [bad, bad]) == [("nonfinite", True)]


def test_a_first_ratio_other_than_one_is_an_alarm() -> None:
    assert names({"first_ratio_error": 0.01}) == [("ratio", False)]


def test_a_mismatch_above_the_limit_is_fatal() -> None:
    assert names({"mismatch": 0.2}) == [("mismatch", True)]


def test_a_policy_that_does_not_end_its_episodes_any_more_has_collapsed() -> None:
    good, bad = {"status/truncated": 0.4}, {"status/truncated": 1.0}
    assert names(bad, [good]) == [("truncated", False)]
    assert names(bad, [good] + [bad] * (COLLAPSED_STEPS - 1)) == [("truncated", True)]
    assert names(bad, [bad] * 50) == [("truncated", False)]  # it never ended any: not learned yet
    assert names({"status/truncated": 0.0, "status/infra": 1.0}, [good]) == []
    assert names({"status/truncated": 0.5, "status/infra": 0.5}, [good]) == [("truncated", False)]


def test_a_mismatch_that_jumps_is_an_alarm_though_it_is_allowed() -> None:
    before: list[Row] = [{"mismatch": 1e-6}] * 8
    assert names({"mismatch": 5e-4}, before) == []  # much more than it was, and still nothing
    assert names({"mismatch": 0.02}, before) == [("mismatch_jump", False)]
    assert names({"mismatch": 0.02}, before[:4]) == []  # too few steps to know what is usual
    assert names({"mismatch": 0.02}, [{"mismatch": 0.01}] * 8) == []
    assert names({"mismatch": 0.2}, before) == [("mismatch", True)]


def test_where_episodes_may_be_old_a_mismatch_stops_nothing() -> None:
    assert [a.fatal for a in alarms({"mismatch": 0.2}, [], limit=0.1, stale=True)] == [False]
    assert alarms({"mismatch": 0.02}, [{"mismatch": 1e-6}] * 8, limit=0.1, stale=True) == []


# --- loggers -----------------------------------------------------------------------------------------


class Kept:
    """A logger in this process; `fails` makes it raise."""

    def __init__(self, fails: bool = False) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.fails, self.closed = fails, 0

    def log(self, row: Mapping[str, float], step: int) -> None:
        if self.fails:
            raise OSError("no network")
        self.rows.append((step, dict(row)))

    def close(self) -> None:
        self.closed += 1


def test_loggers_get_every_row_without_what_is_not_finite(tmp_path: Path) -> None:
    kept = Kept()
    metrics = Metrics(tmp_path / "metrics.jsonl", loggers=[kept])
    metrics.log({"step": 3, "kl": 0.5, "loss_policy": math.nan})
    metrics.close()
    assert kept.rows == [(3, {"kl": 0.5})] and kept.closed == 1


def test_a_logger_that_fails_is_named_once_and_ends_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    kept = Kept(fails=True)
    careful = Careful("wandb", kept)
    for step in range(3):
        careful.log({}, step)
    careful.close()
    assert (
        capsys.readouterr().err == "warning: wandb is left out from now on: no network\n" and not kept.closed
    )


def test_a_logger_that_is_not_installed_names_its_extra(tmp_path: Path) -> None:
    run, config = RunDirectory.create(tmp_path), Config()
    absent = [name for name in KINDS if find_spec(name) is None]
    for name in absent:
        with pytest.raises(Missing, match=rf"pip install 'orchestrate-rl\[{name}\]'"):
            open_loggers([name], run, config)
        config.trainer.loggers = [name]  # type: ignore[list-item]
        assert any(f"orchestrate-rl[{name}]" in problem for problem in problems(config))
    with pytest.raises(Missing, match="'mlflow'; there are wandb, trackio"):
        open_loggers(["mlflow"], run, config)
    assert open_loggers([], run, config) == []


@pytest.mark.parametrize("name", KINDS)
def test_the_real_package_takes_rows_without_a_network(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(name)
    for variable, value in (
        ("WANDB_MODE", "offline"),
        ("WANDB_SILENT", "true"),
        ("TRACKIO_DIR", str(tmp_path / "trackio")),
        ("HF_HUB_OFFLINE", "1"),
    ):
        monkeypatch.setenv(variable, value)
    run = RunDirectory.create(tmp_path)
    run.training.mkdir(exist_ok=True)
    (logger,) = open_loggers([name], run, Config())
    for step in range(2):
        logger.log({"kl": 0.5}, step)
    logger.close()
    assert isinstance(logger, Careful) and not logger.failed
