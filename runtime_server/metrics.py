"""What the server counts, for Prometheus: `GET /metrics`.

What it does not do
    No process-wide registry: every server has its own, so that several can live in one process.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_EXEC_S = (0.001, 0.002, 0.003, 0.005, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
_CREATE_S = (0.03, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """One object with an attribute for each number."""

    def __init__(self, running: Callable[[], float], queued: Callable[[], float]) -> None:
        self.registry = CollectorRegistry()
        self.exec_s = self._histogram(
            "sandbox_exec_seconds", "Time of one command, as the server saw it", _EXEC_S
        )
        self.overhead_s = self._histogram(
            "sandbox_exec_overhead_seconds", "Time of one command beyond the command's own", _EXEC_S
        )
        self.create_s = self._histogram(
            "sandbox_create_seconds", "Time from a place to a sandbox that answers", _CREATE_S
        )
        self.queue_s = self._histogram("sandbox_queue_seconds", "Time spent waiting for a place", _CREATE_S)
        self.created = self._counter("sandbox_created", "Sandboxes made", [])
        self.ended = self._counter("sandbox_ended", "Sandboxes that ended, by reason", ["reason"])
        self.errors = self._counter("sandbox_errors", "Answers that were no success, by code", ["code"])
        self._gauge("sandbox_running", "Sandboxes that exist", running)
        self._gauge("sandbox_queued", "Requests waiting for a place", queued)

    def render(self) -> bytes:
        return generate_latest(self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, buckets=buckets, registry=self.registry)

    def _counter(self, name: str, text: str, labels: list[str]) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        Gauge(name, text, registry=self.registry).set_function(read)
