"""The server that is soaked: started, killed, started again with the same claim; what it has on this node.

What it does not do
    It judges nothing: `quiet.py` does.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

import yaml

from orchestrator.contract import Env, RunDirectory
from orchestrator.schema import Config
from runtime_server.client import Client
from runtime_server.engines import processes
from runtime_server.engines.ownership import bases
from runtime_server.engines.state import State
from runtime_server.errors import SandboxError

START_S, STOP_S = 90.0, 120.0
PLACES = 64


class Place:
    """One run directory and its server, always at the same address and with the same key."""

    def __init__(self, folder: Path) -> None:
        self.run = RunDirectory.create(folder / "runs", "soak")
        self.key = secrets.token_urlsafe(32)
        self.run.publish(self.run.runtime_api_key, self.key, mode=0o600)
        with socket.create_server(("127.0.0.1", 0)) as bound:
            self.port = int(bound.getsockname()[1])
        wanted = {"host": "127.0.0.1", "port": self.port, "max_parallel_sandboxes": PLACES}
        config = Config.model_validate({"runtime": wanted})
        self.run.config.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        self.starts = 0
        self.up = asyncio.Event()
        self.process: subprocess.Popen[bytes] | None = None
        self.log = (folder / "server.log").open("ab")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Whatever happened: no server and nothing of it stays behind."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait(timeout=STOP_S)
        self.log.close()

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def state(self) -> State:
        """The directories whose owner is the server that runs now."""
        root, storage = bases()
        for file in root.glob("orc-*/owner.json"):
            if f'"pid": {self.pid},' in file.read_text():
                return State(file.parent, storage / file.parent.name)
        raise FileNotFoundError(f"no state directory of the server {self.pid} below {root}")

    def client(self) -> Client:
        return Client(f"http://127.0.0.1:{self.port}", self.key)

    async def start(self) -> None:
        self.process = self._spawn()
        self.starts += 1
        deadline = time.monotonic() + START_S
        async with self.client() as client:
            while True:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"the server did not start:\n{self.said()}")
                try:
                    await client.health()
                    break
                except SandboxError:
                    await asyncio.sleep(0.02)
        self.up.set()

    def _spawn(self) -> subprocess.Popen[bytes]:
        """As the runtime job of a fleet has it."""
        environment = {**os.environ, Env.RUN_DIR.value: str(self.run.root), Env.ATTEMPT.value: "1"}
        command = ["-m", "runtime_server", "--run-dir", str(self.run.root), "--server", "soak"]
        return subprocess.Popen([sys.executable, *command], env=environment, stdout=self.log, stderr=self.log)

    async def kill(self) -> None:
        """The server alone, as an out-of-memory killer would; then its next life."""
        assert self.process is not None
        self.up.clear()
        self.process.send_signal(signal.SIGKILL)
        await asyncio.to_thread(self.process.wait)
        await self.start()

    async def stop(self) -> int:
        assert self.process is not None
        self.process.terminate()
        return await asyncio.to_thread(self.process.wait, STOP_S)

    def said(self) -> str:
        return Path(self.log.name).read_text()[-3000:]

    # --- what is there ---

    def conmons(self) -> list[int]:
        token = self.state.token
        return sorted(set(processes.naming(token)) - set(processes.services(token)))

    def agents(self) -> list[int]:
        """First processes of containers."""
        return processes.children(self.conmons())
