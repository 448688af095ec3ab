"""What the sandbox benchmark measures with: turns, quantiles, its own server, a client that costs little.

What it is
    `by_turns`    measures several ways of doing one thing in the same minutes, one after the other
    `Served`      a real `python -m runtime_server` of a run directory of its own, and what it takes up
    `Line`        one kept connection that sends prepared bytes: its cost is a tenth of a real client's, so
                  that on a machine of few cores the server is measured, and not who asks it

What it does not do
    It knows no row of the benchmark: `sandbox_rows.py` does.
"""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import yaml

from bench.agent import resident_kib
from orchestrator.contract import RunDirectory, wait_for
from orchestrator.schema import Config
from runtime_server.client import Client
from runtime_server.engines import processes
from runtime_server.engines.ownership import bases
from runtime_server.wire import API_KEY_HEADER

START_S = 120.0
Work = Callable[[], Awaitable[object]]


@dataclass(frozen=True)
class Way:
    """One way of doing something. `every`: only in each n-th round, for the slow ones; `before` does not
    count."""

    work: Work
    every: int = 1
    times: int = 1  # in a row: the first of a train pays for the caches that the other ways have used
    before: Work | None = None


def quantile(values: Sequence[float], share: float) -> float:
    """In milliseconds."""
    ordered = sorted(values)
    return round(1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))], 2)


async def took(work: Work) -> float:
    start = time.perf_counter()
    await work()
    return time.perf_counter() - start


async def by_turns(ways: Mapping[str, Way], rounds: int) -> dict[str, list[float]]:
    """Seconds of each. Who comes first changes with the round, so that nobody always follows the same one;
    the first round warms the caches of all and does not count."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    names = [*ways]
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if turn % ways[name].every == 0:
                seconds = [await _measured(ways[name]) for _ in range(ways[name].times)]
                found[name] += seconds if turn else []
    return found


async def _measured(way: Way) -> float:
    if way.before is not None:
        await way.before()
    return await took(way.work)


async def per_second(work: Callable[[int], Awaitable[object]], times: int, at_once: int) -> float:
    limit = asyncio.Semaphore(at_once)

    async def one(number: int) -> None:
        async with limit:
            await work(number)

    return round(times / await took(lambda: asyncio.gather(*(one(n) for n in range(times)))), 1)


@dataclass
class Served:
    """A server, and what there is of it on this machine."""

    process: subprocess.Popen[bytes]
    url: str
    key: str
    token: str

    def client(self) -> Client:
        return Client(self.url, self.key)

    @property
    def rss_mib(self) -> float:
        """Of the server itself: one Python process."""
        return round(resident_kib(self.process.pid) / 1024, 1)

    @property
    def service_rss_mib(self) -> float:
        """Of Podman's API service, which the server keeps."""
        return round(sum(map(resident_kib, processes.services(self.token))) / 1024, 1)

    def agents(self) -> list[int]:
        """Pids of the first processes of its containers."""
        return processes.children(set(processes.naming(self.token)) - set(processes.services(self.token)))


@contextmanager
def serving(base: Path, **runtime: object) -> Iterator[Served]:
    """As a runtime job has it: it keeps its journal, and can be found again."""
    run = RunDirectory.create(base / "runs", "bench")
    config = Config.model_validate({"runtime": {"host": "127.0.0.1", **runtime}})
    run.config.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    process = subprocess.Popen([sys.executable, "-m", "runtime_server", "--run-dir", str(run.root)])
    try:
        wait_for(lambda: _is_ready(run, process), "the server", START_S)
        key = run.read_text(run.runtime_api_key)
        yield Served(process, run.read_text(run.runtime_url), key, _token_of(process.pid))
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=120)


def _is_ready(run: RunDirectory, process: subprocess.Popen[bytes]) -> bool | None:
    if process.poll() is not None:
        raise SystemExit("the server did not start; what it said is above")
    return bool(run.read_text(run.ready_flag)) or None


def _token_of(pid: int) -> str:
    """The name that everything of this server has."""
    owners = [file for base in set(bases()) for file in base.glob("orc-*/owner.json")]
    return next(file.parent.name for file in owners if f'"pid": {pid},' in file.read_text())


# --- asking without a client's cost ---------------------------------------------------------------------


@dataclass(eq=False)
class Line(asyncio.Protocol):
    """See the module's docstring. One request at a time."""

    request: bytes
    _transport: asyncio.Transport | None = None
    _said: bytearray = field(default_factory=bytearray)
    _answer: asyncio.Future[bytes] | None = None

    @classmethod
    async def to_exec(cls, served: Served, sandbox: str, command: bytes) -> Line:
        host, _, port = urlsplit(served.url).netloc.partition(":")
        head = (
            f"POST /v1/sandboxes/{sandbox}/exec HTTP/1.1\r\nHost: {host}:{port}\r\n"
            f"{API_KEY_HEADER}: {served.key}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(command)}\r\n\r\n"
        )
        line = cls(head.encode() + command)
        await asyncio.get_running_loop().create_connection(lambda: line, host, int(port))
        return line

    async def ask(self) -> bytes:
        """The answer's body. RuntimeError for anything but success."""
        assert self._transport is not None
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(self.request)
        return await self._answer

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        self._settle(b"", "the server hung up")

    def data_received(self, data: bytes) -> None:
        self._said += data
        head, ended, body = self._said.partition(b"\r\n\r\n")
        if not ended:
            return
        size = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
        if len(body) >= size:
            self._said.clear()
            self._settle(bytes(body), "" if head.startswith(b"HTTP/1.1 200") else f"{head!r} {body!r}")

    def _settle(self, body: bytes, problem: str) -> None:
        if self._answer is None or self._answer.done():
            return
        if problem:
            self._answer.set_exception(RuntimeError(problem))
        else:
            self._answer.set_result(body)
