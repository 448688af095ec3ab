"""Several servers of one runtime job on a real Slurm: one on each node, started again, outlived."""

from __future__ import annotations

import json
from collections.abc import Iterator
from signal import Signals

import pytest
from cluster import Cluster
from cluster.cluster import Process
from slurmkit import Launches

from orchestrator.contract import JobStatus, Role, RunDirectory, ServerRecord

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


class Fleets(Launches):
    """Launches whose runtime job has two nodes."""

    def begin(self, *assignments: str) -> RunDirectory:
        run = self.start("runtime.nodes=2", *assignments, TRAINER_DOES="hang")
        self.cluster.wait(lambda: (run.training / "up").exists(), 90, self.logs(run))
        return run

    def servers(self, run: RunDirectory) -> dict[str, ServerRecord]:
        self.cluster.wait(lambda: len(run.read_servers()) == 2, 60, f"two servers\n{self.logs(run)}")
        return {record.name: record for record in run.read_servers()}

    def said(self, run: RunDirectory, what: str, **data: object) -> bool:
        found = [event.data for event in run.timeline() if event.what == what]
        return any(data.items() <= each.items() for each in found)

    def cancel(self, run: RunDirectory) -> None:
        done = self.orchestrate("cancel", run.root, "--json")
        assert done.returncode == 0 and json.loads(done.stdout)["state"] == "cancelled", done.stderr
        self.nothing_left(run)


def on_the_other_node(cluster: Cluster, run: RunDirectory) -> str:
    status = run.read(run.status(Role.RUNTIME), JobStatus)
    assert status is not None
    return "cpu2" if status.host == "cpu1" else "cpu1"


def server_on(cluster: Cluster, node: str) -> list[Process]:
    found = cluster.processes(node)
    return [p for p in found if p.argv[1:3] == ["-m", "runtime_server"] and "--server" in p.argv]


def test_a_server_on_each_node_comes_back_by_itself(cluster: Cluster) -> None:
    fleets = Fleets(cluster)
    run = fleets.begin()
    before = fleets.servers(run)
    assert {record.host for record in before.values()} == {"cpu1", "cpu2"}
    far = on_the_other_node(cluster, run)
    (victim,) = server_on(cluster, far)
    cluster.kill(victim)
    cluster.wait(
        lambda: fleets.servers(run)["2"].nonce != before["2"].nonce, 60, f"a new life\n{fleets.logs(run)}"
    )
    assert fleets.said(run, "runtime.server_ended", server="2", again=True)
    assert fleets.servers(run)["1"] == before["1"] and fleets.servers(run)["2"].host == far
    health = f"http://{far}:{fleets.servers(run)['2'].url.rpartition(':')[2]}/health"
    ask = ["-c", "import sys, urllib.request as u; print(u.urlopen(sys.argv[1], timeout=9).status)", health]
    assert cluster.run([cluster.python, *ask]).stdout.strip() == "200"
    fleets.cancel(run)


def test_a_server_that_hangs_on_another_node_is_replaced(cluster: Cluster) -> None:
    fleets = Fleets(cluster)
    run = fleets.begin("training.peer_grace=6")
    before = fleets.servers(run)["2"]
    (hung,) = server_on(cluster, on_the_other_node(cluster, run))
    cluster.kill(hung, Signals.SIGSTOP)
    cluster.wait(
        lambda: fleets.servers(run)["2"].nonce != before.nonce, 90, f"a new life\n{fleets.logs(run)}"
    )
    assert fleets.said(run, "runtime.server_ended", server="2", again=True)
    assert hung.pid not in {process.pid for process in cluster.processes()}
    fleets.cancel(run)


@pytest.fixture
def fragile() -> Iterator[Cluster]:
    with Cluster(settings={"SlurmdTimeout": 6, "MessageTimeout": 4}) as running:
        yield running


def test_a_run_goes_on_without_the_node_that_it_lost(fragile: Cluster) -> None:
    fleets = Fleets(fragile)
    run = fleets.begin()
    fleets.servers(run)
    fragile.crash(on_the_other_node(fragile, run))
    fragile.wait(lambda: fleets.said(run, "runtime.server_ended", server="2"), 90, "its end to be noticed")
    look = fleets.status(run)
    assert look["state"] == "running" and {job["attempt"] for job in look["jobs"]} == {1}
    done = fleets.orchestrate("cancel", run.root, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["state"] == "cancelled", done.stderr
