"""Real servers for tests: as processes, with what they leave behind, or in a thread, to look inside."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import httpx
import uvicorn
import uvloop
from ordinary import Ordinary

from orchestrator.schema import Runtime
from runtime_server.app import Identity, create_app, default_sandboxes
from runtime_server.client import Client
from runtime_server.engines import processes
from runtime_server.engines.ownership import bases
from runtime_server.listening import Bounded
from runtime_server.sandboxes import Sandboxes

START_S = 60


async def until(check: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Look again and again: there is nothing to wait on when the other side is another process or thread."""
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.01)


@dataclass
class Server:
    """`python -m runtime_server` that stands alone."""

    process: subprocess.Popen[str]
    url: str
    key: str
    key_file: Path
    curl: str

    @classmethod
    def start(cls, *options: str, env: dict[str, str] | None = None, user: Ordinary | None = None) -> Self:
        process = spawn(*options, env=env, user=user)
        assert process.stdout is not None
        said: dict[str, str] = {}
        while len(said) < 3 and (line := process.stdout.readline()):
            name, _, value = line.partition(":")
            said[name] = value.strip()
        assert len(said) == 3, "the server did not start"
        key_file = Path(said["key"])
        return cls(process, said["url"], key_file.read_text().strip(), key_file, said["try"])

    def client(self) -> Client:
        return Client(self.url, self.key)

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        code = self.process.wait(timeout=60)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


def spawn(
    *options: str, env: dict[str, str] | None = None, user: Ordinary | None = None
) -> subprocess.Popen[str]:
    command = ["-m", "runtime_server", *options]
    command = user.python(*command, env=env) if user else [sys.executable, *command]
    environment = {**os.environ, **(env or {})}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def refused(*options: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """A server that is expected not to start."""
    command = [sys.executable, "-m", "runtime_server", *options]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=START_S,
        env={**os.environ, **(env or {})},
        check=False,
    )


def state_of(pid: int) -> list[Path]:
    """The state directories whose owner is this process."""
    found = [p for base in set(bases()) for p in base.glob("orc-*")]
    return [p for p in found if f'"pid": {pid},' in _text(p / "owner.json")]


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def traces(folders: list[Path]) -> list[str]:
    """What is left of a server that had these directories: directories, processes, mounts, cgroups."""
    left = [str(p) for p in folders if p.exists()]
    for token in {p.name for p in folders}:
        left += [f"process {pid}" for pid in processes.of_server(token, f"orchestrate-{token}")]
        left += [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if token in line]
        left += [str(p) for p in processes.cgroups_of(f"orchestrate-{token}")]
    return left


KEY = "test-key-0123456789abcdef"


class ThreadedSandboxes(Sandboxes):
    """Knows its event loop, so that another thread can hand it work."""

    loop: asyncio.AbstractEventLoop

    async def start(self) -> None:
        self.loop = asyncio.get_running_loop()
        await super().start()


@contextmanager
def run_server(config: Runtime) -> Iterator[tuple[str, ThreadedSandboxes]]:
    """URL and sandboxes of a server that runs for the time of the `with`."""
    boxes = ThreadedSandboxes(config, default_sandboxes(config).engine)
    app = create_app(config, key=KEY, identity=Identity("r1", 3, "n1"), sandboxes=boxes)
    settings = uvicorn.Config(app, lifespan="on", log_config=None, ws="none", loop="uvloop", http=Bounded)
    server = uvicorn.Server(settings)
    bound = socket.create_server(("127.0.0.1", 0))
    ready = threading.Event()

    async def serve() -> None:
        serving = asyncio.create_task(server.serve([bound]))
        await until(lambda: server.started or serving.done(), START_S)
        ready.set()
        await serving

    def work() -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve())

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert ready.wait(60) and server.started, "the server did not start"
        yield f"http://127.0.0.1:{bound.getsockname()[1]}", boxes
    finally:
        server.should_exit = True
        thread.join(60)
        bound.close()


def breaking(after: int) -> Breaking:
    return Breaking(after)


class Breaking(httpx.AsyncHTTPTransport):
    """A connection that breaks after so many pieces of a body."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after, self.calls = after, 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await super().handle_async_request(request)
        self.calls += 1
        if "output" in request.url.path or request.url.path.endswith("/run"):
            assert isinstance(response.stream, httpx.AsyncByteStream)
            response.stream = Broken(response.stream, self.after)
        return response


class Broken(httpx.AsyncByteStream):
    def __init__(self, stream: httpx.AsyncByteStream, after: int) -> None:
        self.stream, self.after = stream, after

    async def __aiter__(self) -> AsyncIterator[bytes]:
        left = self.after
        async for data in self.stream:
            if not left:
                yield data[: len(data) // 2]
                raise httpx.ReadError("broken by the test")
            yield data
            left -= 1

    async def aclose(self) -> None:
        await self.stream.aclose()
