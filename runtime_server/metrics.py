"""What the server counts, for Prometheus: `GET /metrics`.

What it is
    Histograms of the time in the queue, of a create and of a command, the latter two also by phase;
    counters of what ended and how; gauges, read when somebody asks, of what there is now (`Census`). The
    dashboard of `deploy/grafana-dashboard.json` is drawn from these names.

What it does not do
    No process-wide registry: every server has its own, so that several can live in one process. No label
    whose values a client invents without bound: of runs the fullest twenty are told apart.
"""

from __future__ import annotations

import time
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

EXEC_PHASES = ("queue", "agent", "command", "serialise")
"""Of one command: from its request's arrival to the agent's call; the way to the agent and back; the command
itself; making the answer."""
CREATE_PHASES = ("image", "queue", "container", "root", "setup")
"""Of one create: finding or fetching its image; waiting for a place; a container with its agent; its root
directory; its set-up commands."""
RUNS_TOLD = 20
_EXEC_S = (0.0003, 0.001, 0.002, 0.003, 0.005, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
_CREATE_S = (0.001, 0.003, 0.01, 0.03, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)


@dataclass(frozen=True)
class Census:
    """What there is at one moment."""

    states: dict[str, int]  # by state: running, paused, queued, starting …
    places: int
    in_use: int
    queued: int
    warm: int
    runs: Tally[str] = field(default_factory=Tally)  # sandboxes by the value of their label `run`


class Metrics:
    """One object with an attribute for each number."""

    def __init__(self, census: Callable[[], Census]) -> None:
        self.registry = CollectorRegistry()
        self.exec_s = self._histogram(
            "sandbox_exec_seconds", "Time of one command, as the server saw it", _EXEC_S
        )
        phases = self._phases("sandbox_exec_phase_seconds", "Time of one command, by phase", _EXEC_S)
        self.exec_phase = {name: phases.labels(name) for name in EXEC_PHASES}
        self._command_s, self._agent_s = self.exec_phase["command"], self.exec_phase["agent"]
        self.create_s = self._histogram(
            "sandbox_create_seconds", "Time from a place to a sandbox that answers", _CREATE_S
        )
        phases = self._phases("sandbox_create_phase_seconds", "Time of one create, by phase", _CREATE_S)
        self.create_phase = {name: phases.labels(name) for name in CREATE_PHASES}
        self.queue_s = self._histogram("sandbox_queue_seconds", "Time spent waiting for a place", _CREATE_S)
        self.created = self._counter("sandbox_created", "Sandboxes made", [])
        self.ended = self._counter("sandbox_ended", "Sandboxes that ended, by reason", ["reason"])
        self.errors = self._counter("sandbox_errors", "Answers that were no success, by code", ["code"])
        self.registry.register(_Gauges(census))
        ProcessCollector(registry=self.registry)

    def render(self) -> bytes:
        return generate_latest(self.registry)

    def executed(self, took_s: float, command_s: float) -> None:
        """A command that took so long for the server, of which so long by itself."""
        self.exec_s.observe(took_s)
        self._command_s.observe(command_s)
        self._agent_s.observe(max(0.0, took_s - command_s))

    @contextmanager
    def creating(self, phase: str) -> Iterator[None]:
        """Measures one phase of a create that goes well."""
        start = time.perf_counter()
        yield
        self.create_phase[phase].observe(time.perf_counter() - start)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, buckets=buckets, registry=self.registry)

    def _phases(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, ["phase"], buckets=buckets, registry=self.registry)

    def _counter(self, name: str, text: str, labels: list[str]) -> Counter:
        return Counter(name, text, labels, registry=self.registry)


class _Gauges(Collector):
    """Counted once for each answer, not kept up with every change."""

    def __init__(self, census: Callable[[], Census]) -> None:
        self._census = census

    def collect(self) -> Iterable[GaugeMetricFamily]:
        now = self._census()
        yield GaugeMetricFamily("sandbox_running", "Sandboxes that exist", now.in_use)
        yield GaugeMetricFamily("sandbox_places", "Sandboxes that may exist at once", now.places)
        yield GaugeMetricFamily("sandbox_queued", "Requests waiting for a place", now.queued)
        yield GaugeMetricFamily("sandbox_warm", "Containers that wait ready", now.warm)
        states = GaugeMetricFamily("sandbox_state", "Sandboxes by state", labels=["state"])
        for state, number in sorted(now.states.items()):
            states.add_metric([state], number)
        yield states
        runs = GaugeMetricFamily(
            "sandbox_of_run", "Sandboxes by the run that they are for", labels=["for_run"]
        )
        for run, number in now.runs.most_common(RUNS_TOLD):
            runs.add_metric([run[:80]], number)
        yield runs

    def describe(self) -> Iterable[GaugeMetricFamily]:
        """Nothing: registering must not count what does not exist yet."""
        return ()
