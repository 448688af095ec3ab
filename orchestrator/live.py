"""What the sandbox servers of a live run do now: sandboxes, queue, and how long commands take.

What it is
    `look` asks every server of a run for its `/metrics`, side by side, and gives up on whoever has not
    answered in time. `exec_p95_ms` is of all commands since that server started, read off a histogram: as
    exact as its buckets.

How to use it
    servers = look(run, "run"); summary(servers)

What it does not do
    It judges nobody: a server that does not answer here is only said not to have. The key goes into a header,
    to the addresses that the run's own servers have published.
"""

from __future__ import annotations

import http.client
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import urlsplit

from orchestrator.contract import ReadyFlag, Role, RunDirectory
from orchestrator.peer import API_KEY_HEADER

PATIENCE_S = 1.5
_LONGEST = 1 << 20
_SAMPLE = re.compile(r"^(\w+)(?:\{([^}]*)\})? ([0-9.eE+-]+|\+Inf|NaN)$", re.MULTILINE)
_BOUND = re.compile(r'le="([^"]+)"')


@dataclass(frozen=True)
class ServerView:
    """One server at one moment; numbers are 0 when it did not answer, and `problem` says why."""

    name: str
    url: str
    problem: str = ""
    in_use: int = 0
    places: int = 0
    queued: int = 0
    warm: int = 0
    rss_mib: int = 0
    commands: int = 0
    exec_p95_ms: float | None = None
    buckets: Mapping[float, float] = field(default_factory=dict, repr=False)

    def as_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "buckets"}


def look(run: RunDirectory, mode: str, patience_s: float = PATIENCE_S) -> list[ServerView]:
    """Every server of the run, asked now; done after `patience_s` whatever they do."""
    key, found = run.read_text(run.runtime_api_key), dict[str, ServerView]()
    addresses = _addresses(run, mode) if key else {}

    def ask(name: str, url: str) -> None:
        found[name] = _ask(name, url, key, patience_s)

    # daemons: one that hangs in the system's resolver must not keep a finished command from ending
    threads = [threading.Thread(target=ask, args=pair, daemon=True) for pair in addresses.items()]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + patience_s
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    late = f"no answer within {patience_s:g} s"
    return [found.get(name) or ServerView(name, url, late) for name, url in sorted(addresses.items())]


def summary(servers: Sequence[ServerView]) -> dict[str, Any]:
    """All servers together, for people and for `--json`."""
    buckets: dict[float, float] = {}
    for server in servers:
        for bound, count in server.buckets.items():
            buckets[bound] = buckets.get(bound, 0.0) + count
    answer = [server for server in servers if not server.problem]
    totals = {
        name: sum(getattr(server, name) for server in answer)
        for name in ("in_use", "places", "queued", "warm")
    }
    return {"servers": len(servers), "answer": len(answer), **totals, "exec_p95_ms": _quantile(buckets, 0.95)}


def _addresses(run: RunDirectory, mode: str) -> dict[str, str]:
    """By name: each server of a fleet, else the one that the run has."""
    latest = run.latest_attempt(Role.RUNTIME)
    fleet = {record.name: record.url for record in run.read_servers() if record.attempt >= latest}
    if fleet:
        return fleet
    flag = run.read(run.ready_flag, ReadyFlag)
    known = flag is not None and (mode == "runtime-url" or flag.attempt >= latest)
    return {"runtime": flag.url} if flag is not None and known else {}


def _ask(name: str, url: str, key: str, timeout_s: float) -> ServerView:
    try:
        parts = urlsplit(url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=timeout_s)
        try:
            connection.request("GET", parts.path.rstrip("/") + "/metrics", headers={API_KEY_HEADER: key})
            answer = connection.getresponse()
            text = answer.read(_LONGEST).decode(errors="replace")
        finally:
            connection.close()
    except (OSError, http.client.HTTPException, ValueError) as error:
        return ServerView(name, url, f"does not answer ({error or type(error).__name__})")
    return (
        _read(name, url, text) if answer.status == 200 else ServerView(name, url, f"answered {answer.status}")
    )


def _read(name: str, url: str, text: str) -> ServerView:
    plain: dict[str, float] = {}
    buckets: dict[float, float] = {}
    for metric, labels, value in _SAMPLE.findall(text):
        if not labels:
            plain[metric] = float(value)
        elif metric == "sandbox_exec_seconds_bucket" and (bound := _BOUND.search(labels)):
            buckets[float(bound[1])] = float(value)
    if "sandbox_running" not in plain:
        return ServerView(name, url, "tells no metrics")
    return ServerView(
        name=name,
        url=url,
        in_use=int(plain.get("sandbox_running", 0)),
        places=int(plain.get("sandbox_places", 0)),
        queued=int(plain.get("sandbox_queued", 0)),
        warm=int(plain.get("sandbox_warm", 0)),
        rss_mib=int(plain.get("process_resident_memory_bytes", 0)) >> 20,
        commands=int(plain.get("sandbox_exec_seconds_count", 0)),
        exec_p95_ms=_quantile(buckets, 0.95),
        buckets=buckets,
    )


def _quantile(buckets: Mapping[float, float], share: float) -> float | None:
    """In milliseconds, as Prometheus reckons it: evenly spread within a bucket; None without commands."""
    ordered = sorted(buckets.items())
    if not ordered or not ordered[-1][1]:
        return None
    wanted, low, below = share * ordered[-1][1], 0.0, 0.0
    for bound, count in ordered:
        if count >= wanted and bound != float("inf"):
            return round(1000 * (low + (bound - low) * (wanted - below) / max(count - below, 1e-9)), 3)
        if bound != float("inf"):
            low, below = bound, count
    return round(1000 * low, 3)
