"""A runtime job with several servers: it starts them, starts them again, and outlives all but the last."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jobkit import HANG, Pair, events, program, training_up, until

from orchestrator.contract import Outcome, ReadyFlag, Role, ServerRecord
from orchestrator.peer import runtime_health, server_health


class Several(Pair):
    """A run whose runtime job has three servers on this machine."""

    def __init__(self, root: Path, **settings: Any) -> None:
        defaults = {"trainer": program(HANG), "runtime_nodes": 3, "runtime_max_restarts": 2}
        super().__init__(root, **(defaults | settings))

    def serving(self) -> dict[str, ServerRecord]:
        found = self.run.read_servers()
        return {record.name: record for record in found if not server_health(self.run, record).problem}

    def until_serving(self, *names: str, other_than: str = "") -> dict[str, ServerRecord]:
        def there() -> bool:
            now = self.serving()
            return set(now) == set(names) and other_than not in {r.nonce for r in now.values()}

        until(there, f"servers {names}\n{self.logs()}", 20)
        return self.serving()

    def flag(self) -> ReadyFlag:
        found = self.run.read(self.run.ready_flag, ReadyFlag)
        assert found is not None
        return found


@pytest.fixture
def pairs(tmp_path: Path) -> Iterator[list[Several]]:
    made: list[Several] = []
    yield made
    for pair in made:
        pair.clean()


def several(pairs: list[Several], root: Path, **settings: Any) -> Several:
    pairs.append(Several(root, **settings))
    pairs[-1].launch()
    return pairs[-1]


def test_every_server_registers_and_one_that_dies_comes_back(pairs: list[Several], tmp_path: Path) -> None:
    pair = several(pairs, tmp_path)
    training_up(pair)
    servers = pair.until_serving("1", "2", "3")
    assert len({record.url for record in servers.values()}) == 3
    assert len({record.nonce for record in servers.values()}) == 3
    assert pair.run.runtime_api_key.stat().st_mode & 0o777 == 0o600
    lead = next(record for record in servers.values() if record.url == pair.flag().url)
    os.kill(lead.pid, signal.SIGKILL)
    again = pair.until_serving("1", "2", "3", other_than=lead.nonce)
    until(lambda: pair.flag().nonce in {record.nonce for record in again.values()}, "a flag that holds")
    assert pair.run.read_text(pair.run.runtime_url) == pair.flag().url
    assert runtime_health(pair.run, "run").problem == ""
    (ended,) = pair.events_of("runtime.server_ended")
    assert ended["server"] == lead.name and ended["again"] and "SIGKILL" in ended["reason"]
    status = pair.status(Role.RUNTIME)
    assert status is not None and (status.attempt, status.phase) == (1, "running")
    pair.scheduler.cancel(list(pair.ids.values()))
    pair.all_over()


def test_the_run_goes_on_with_the_rest_and_ends_with_the_last(pairs: list[Several], tmp_path: Path) -> None:
    pair = several(pairs, tmp_path, runtime_nodes=2, runtime_max_restarts=0, peer_grace=2)
    training_up(pair)
    first, second = pair.until_serving("1", "2").values()
    os.kill(first.pid, signal.SIGKILL)
    pair.until_serving("2")
    until(lambda: pair.flag().nonce == second.nonce, "the flag to follow")
    assert runtime_health(pair.run, "run").problem == ""
    os.kill(second.pid, signal.SIGKILL)
    pair.all_over(20)
    result, status = pair.result(), pair.status(Role.RUNTIME)
    assert result is not None and result.outcome == Outcome.PEER_GONE
    assert status is not None and "server was killed by SIGKILL while it served" in status.reason


def test_a_fleet_that_is_gone_lives_again_in_the_same_job(pairs: list[Several], tmp_path: Path) -> None:
    pair = several(pairs, tmp_path, runtime_nodes=2, runtime_max_restarts=1)
    training_up(pair)
    key = pair.run.read_text(pair.run.runtime_api_key)
    for _ in range(2):
        servers = pair.until_serving("1", "2")
        before = {record.nonce for record in servers.values()}
        for record in servers.values():
            os.kill(record.pid, signal.SIGKILL)
        until(lambda old=before: not old & {r.nonce for r in pair.serving().values()}, "their end")
    again = pair.until_serving("1", "2")
    assert {record.attempt for record in again.values()} == {2}
    until(lambda: pair.flag().attempt == 2, "a flag of the new life")
    assert pair.run.read_text(pair.run.runtime_api_key) == key
    status = pair.status(Role.TRAINING)
    assert status is not None and (status.attempt, status.phase) == (1, "running")


def test_a_server_that_hangs_is_replaced(pairs: list[Several], tmp_path: Path) -> None:
    pair = several(pairs, tmp_path, runtime_nodes=2, peer_grace=2)
    training_up(pair)
    hung = pair.until_serving("1", "2")["2"]
    os.kill(hung.pid, signal.SIGSTOP)
    pair.until_serving("1", "2", other_than=hung.nonce)
    assert "did not answer" in pair.events_of("runtime.server_ended")[0]["reason"]


def test_readiness_may_need_more_than_one(pairs: list[Several], tmp_path: Path) -> None:
    pair = Several(tmp_path, runtime_ready_nodes=2, runtime_max_restarts=0, ready_timeout=4)
    pairs.append(pair)
    with pair.run.env_file.open("a") as file:
        file.write("export SERVERS_DIE_AT_ONCE=2,3\n")
    pair.launch()
    pair.all_over(20)
    status = pair.status(Role.RUNTIME)
    assert status is not None and "1 of 3 servers answer, 2 must" in status.reason
    assert "training.running" not in events(pair)
