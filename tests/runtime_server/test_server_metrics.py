"""What a server counts, and that the dashboard is drawn from nothing else."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fleetkit import Servers
from prometheus_client.parser import text_string_to_metric_families

from orchestrator import live
from runtime_server.errors import SandboxError
from runtime_server.fleet import Fleet
from runtime_server.metrics import CREATE_PHASES, EXEC_PHASES, RUNS_TOLD, Census, Metrics
from runtime_server.wire import CreateSandbox, Exec

DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana-dashboard.json"
_WORDS = re.compile(r"\b(?:sandbox|process)_[a-z0-9_]+\b")
_BY = re.compile(r"by \(([a-z_, ]+)\)")


def samples(text: str) -> dict[str, list[dict[str, str]]]:
    """Labels of every sample, by its name."""
    found: dict[str, list[dict[str, str]]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(dict(sample.labels))
    return found


def test_gauges_are_counted_when_they_are_asked_for() -> None:
    runs = Counter({f"r{n}": n for n in range(1, 40)})
    census = Census({"running": 3, "paused": 1}, places=8, in_use=4, queued=2, warm=1, runs=runs)
    text = Metrics(lambda: census).render().decode()
    assert "sandbox_places 8.0" in text and 'sandbox_state{state="paused"} 1.0' in text
    told = samples(text)["sandbox_of_run"]
    assert len(told) == RUNS_TOLD and told[0] == {"for_run": "r39"}


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    with Servers(tmp_path_factory.mktemp("run")) as made:
        made.start("1")
        yield made


async def used(servers: Servers) -> str:
    """The metrics of a server that has made, used, lost and refused something."""
    async with Fleet.of(servers.run) as fleet:
        async with fleet.sandbox(CreateSandbox(labels={"run": "mine"}, setup=["true"])) as box:
            await box.exec("true")
            client = await fleet.client_of(box.id)
            await fleet.create(CreateSandbox(labels={"run": "mine"}))
            with pytest.raises(SandboxError):
                await client.exec("s-00000000", Exec(command="true"))
        return await client.metrics()


@pytest.mark.container
async def test_the_dashboard_asks_for_nothing_that_is_not_there(servers: Servers) -> None:
    told = samples(await used(servers))
    board: dict[str, Any] = json.loads(DASHBOARD.read_text())
    expressions = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    names = {name for expression in expressions for name in _WORDS.findall(expression)}
    assert names and names <= set(told), names - set(told)
    for expression in expressions:
        assert expression.count("(") == expression.count(")") and expression.count("{") == expression.count(
            "}"
        )
        grouped = [word.strip() for by in _BY.findall(expression) for word in by.split(",")]
        labels = {
            label for name in _WORDS.findall(expression) for each in told.get(name, []) for label in each
        }
        assert set(grouped) <= labels, (expression, labels)
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


@pytest.mark.container
async def test_every_phase_is_measured(servers: Servers) -> None:
    text = await used(servers)
    for phase in EXEC_PHASES:
        assert re.search(rf'sandbox_exec_phase_seconds_count{{phase="{phase}"}} [1-9]', text), phase
    for phase in CREATE_PHASES:
        assert re.search(rf'sandbox_create_phase_seconds_count{{phase="{phase}"}} [1-9]', text), phase
    assert re.search(r'sandbox_errors_total{code="sandbox_not_found"} [1-9]', text)
    assert 'sandbox_of_run{for_run="mine"}' in text
    (server,) = live.look(servers.run, "run")
    assert server.problem == "" and server.in_use >= 1 and server.places == 8 and server.rss_mib > 10
    assert server.exec_p95_ms is not None


@pytest.mark.container
def test_prometheus_is_told_where_the_server_is(servers: Servers) -> None:
    (told,) = json.loads(servers.run.target("1").read_text())
    record = servers.record("1")
    assert record is not None and f"http://{told['targets'][0]}" == record.url
    assert told["labels"]["run"] == servers.run.run_id and told["labels"]["server"] == "1"
