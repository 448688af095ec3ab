"""What the servers of a live run tell, and that a status never waits for one that does not."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from orchestrator import live, view_live
from orchestrator.contract import ReadyFlag, RunDirectory, ServerRecord
from orchestrator.live import ServerView, summary

TEXT = """# HELP sandbox_running Sandboxes that exist
sandbox_running 3.0
sandbox_places 8.0
sandbox_queued 2.0
sandbox_warm 1.0
process_resident_memory_bytes 1.34217728e+08
sandbox_state{state="running"} 3.0
sandbox_exec_seconds_bucket{le="0.001"} 0.0
sandbox_exec_seconds_bucket{le="0.002"} 90.0
sandbox_exec_seconds_bucket{le="0.01"} 100.0
sandbox_exec_seconds_bucket{le="+Inf"} 100.0
sandbox_exec_seconds_count 100.0
"""


class Metrics(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        known = self.path == "/metrics" and self.headers["X-API-Key"] == "the-key"
        self.send_response(200 if known else 401)
        self.end_headers()
        self.wfile.write(TEXT.encode() if known else b"")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def answering() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Metrics)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def silent() -> Iterator[str]:
    """Takes connections, and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as bound:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    made = RunDirectory.create(tmp_path)
    made.publish(made.runtime_api_key, "the-key", 0o600)
    return made


def record(run: RunDirectory, name: str, url: str, attempt: int = 0) -> None:
    who = {"run_id": run.run_id, "job_id": "", "nonce": name, "host": "h", "pid": 1}
    run.publish(run.server(name), ServerRecord(name=name, attempt=attempt, url=url, **who))


def flag(run: RunDirectory, url: str, attempt: int = 0) -> None:
    who = {"run_id": run.run_id, "job_id": "", "nonce": "n", "host": "h", "pid": 1}
    run.publish(run.ready_flag, ReadyFlag(attempt=attempt, url=url, **who))


def test_one_server(run: RunDirectory, answering: str) -> None:
    assert live.look(run, "run") == []
    flag(run, answering)
    (server,) = live.look(run, "run")
    told = (server.in_use, server.places, server.queued, server.warm, server.rss_mib, server.commands)
    assert told == (3, 8, 2, 1, 128, 100) and server.exec_p95_ms == 6.0
    assert "buckets" not in server.as_dict()
    text = view_live.rows([server])[0].plain
    assert "3 of 8 in use · 2 queued · 1 warm · exec p95 6.0 ms" in text
    run.take_attempt("runtime", "another life")
    run.take_attempt("runtime", "and another")
    assert live.look(run, "run") == [], "that server is of an earlier life"
    assert live.look(run, "runtime-url")[0].in_use == 3


def test_several_servers_of_which_two_do_not_answer(run: RunDirectory, answering: str, silent: str) -> None:
    flag(run, answering)
    record(run, "1", answering)
    record(run, "2", silent)
    record(run, "3", "http://127.0.0.1:1")
    start = time.monotonic()
    servers = live.look(run, "run", patience_s=0.3)
    assert time.monotonic() - start < 5
    whole = summary(servers)
    assert (whole["servers"], whole["answer"], whole["in_use"], whole["exec_p95_ms"]) == (3, 1, 3, 6.0)
    assert [bool(server.problem) for server in servers] == [False, True, True]
    lines = [line.plain for line in view_live.rows(servers)]
    assert "1 of 3 servers answer" in lines[0] and len(lines) == 4
    assert "no server answers" in view_live.rows(servers[1:])[0].plain


def test_a_wrong_key_is_told(run: RunDirectory, answering: str) -> None:
    run.publish(run.runtime_api_key, "wrong", 0o600)
    flag(run, answering)
    assert live.look(run, "run")[0].problem == "answered 401"


@pytest.mark.parametrize(
    ("buckets", "p95"),
    [
        ({}, None),
        ({0.001: 0, float("inf"): 0}, None),
        ({0.001: 100, float("inf"): 100}, 0.95),
        ({0.001: 0, 0.1: 0, float("inf"): 100}, 100.0),  # beyond the last bound: at least that
    ],
)
def test_quantiles(buckets: dict[float, float], p95: float | None) -> None:
    assert summary([ServerView("a", "u", buckets=buckets)])["exec_p95_ms"] == p95
