"""Real OpenHands clients against a real server: run by `make test-clients`, with interpreters of their own.

The ordinary suite skips this folder: the clients need Python 3.12 and packages that contradict ours.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

ROOT = Path(__file__).resolve().parents[2]
IMAGE = "localhost/orchestrate/sandbox:latest"
OPENHANDS = os.environ.get("OPENHANDS_SOURCE", "")
"""Folder with the package `openhands` of V0, or of the SkyRL fork."""

collect_ignore = [] if OPENHANDS else ["test_v0_client.py"]
if OPENHANDS or importlib.util.find_spec("openhands") is None:
    collect_ignore.append("test_v1_client.py")


@dataclass
class Server:
    """`python -m runtime_server`, as anybody would start it."""

    process: subprocess.Popen[str]
    url: str
    key: str

    @classmethod
    def start(cls) -> Self:
        python = os.environ.get("ORCHESTRATE_SERVER_PYTHON", str(ROOT / ".venv/bin/python"))
        environment = {
            k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "OPENHANDS", "OH_"))
        }
        process = subprocess.Popen(
            [python, "-m", "runtime_server"], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
        )
        assert process.stdout is not None
        said = dict(process.stdout.readline().strip().split(":", 1) for _ in range(2))
        return cls(process, said["url"].strip(), Path(said["key"].strip()).read_text().strip())

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=60)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def sandbox_of(self, runtime: str) -> str:
        """Our own name of a runtime's sandbox."""
        import json

        with urlopen(Request(f"{self.url}/v1/sandboxes", headers={"X-API-Key": self.key})) as got:
            found = json.load(got)["sandboxes"]
        return str(next(one["id"] for one in found if one["labels"].get("dialect.id") == runtime))

    def expire(self, sandbox: str) -> None:
        """Its time to live ends now; returns when it is over."""
        headers = {"X-API-Key": self.key, "Content-Type": "application/json"}
        url, body = f"{self.url}/v1/sandboxes/{sandbox}", b'{"ttl_s": 0.01}'
        urlopen(Request(f"{url}/renew", body, headers, method="POST")).close()
        deadline = time.monotonic() + 20
        while b'"dead"' not in urlopen(Request(url, headers=headers)).read():
            assert time.monotonic() < deadline


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    running = Server.start()
    yield running
    running.stop()


class Proxy(ThreadingHTTPServer):
    """Between client and server: sees every request, and may answer, lose or change some."""

    daemon_threads = True

    def __init__(self, to: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.to = to
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.seen: list[tuple[str, str, bytes]] = []
        self.lose: list[str] = []  # of paths that end so: the answer of one request is lost
        self.answers: dict[str, int] = {}  # paths that end so are answered with this status
        self.say: dict[bytes, bytes] = {}  # replaced in answers
        self.slow: dict[str, float] = {}  # answers to paths that end so come so many seconds late

    def paths(self) -> list[str]:
        return [path for _, path, _ in self.seen]


class _Handler(BaseHTTPRequestHandler):
    server: Proxy
    protocol_version = "HTTP/1.1"

    def _any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        path = self.path.partition("?")[0]
        self.server.seen.append((self.command, path, body))
        status = next((code for end, code in self.server.answers.items() if path.endswith(end)), 0)
        if status:
            self._answer(status, b'{"detail": "made up"}', "application/json")
            return
        got = self._forward(body)
        time.sleep(next((late for end, late in self.server.slow.items() if path.endswith(end)), 0))
        if (lost := next((end for end in self.server.lose if path.endswith(end)), None)) is not None:
            self.server.lose.remove(lost)
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self._answer(*got)

    do_GET = do_POST = do_DELETE = _any

    def _forward(self, body: bytes) -> tuple[int, bytes, str]:
        drop = ("host", "connection", "content-length", "accept-encoding")
        headers = {k: v for k, v in self.headers.items() if k.lower() not in drop}
        headers["Host"] = self.headers["Host"]  # the server names its urls after it
        request = Request(self.server.to + self.path, body or None, headers, method=self.command)
        try:
            with urlopen(request, timeout=120) as got:
                return got.status, got.read(), got.headers.get("Content-Type", "")
        except HTTPError as error:
            with error:
                return error.code, error.read(), error.headers.get("Content-Type", "")

    def _answer(self, status: int, body: bytes, kind: str) -> None:
        for old, new in self.server.say.items():
            body = body.replace(old, new)
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        with contextlib.suppress(OSError):  # the client has left
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None: ...


@contextmanager
def proxied(url: str) -> Iterator[Proxy]:
    proxy = Proxy(url)
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join(10)


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    with proxied(server.url) as made:
        yield made
