"""Real sandbox servers of one run, for tests of the server's client and of the trainer.

What it is
    `Servers` makes a run directory with a key, as a runtime job with several nodes does, and starts servers
    in it by name, each a process of this machine.

What it does not do
    There is no job around them: nobody starts one again.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Self

import yaml

from orchestrator.contract import ReadyFlag, Role, RunDirectory, ServerRecord, wait_for
from orchestrator.schema import Config
from runtime_server.engines.state import State, leftovers

START_S = 90.0
KEY = "fleet-key-0123456789abcdef"


class Servers:
    """Used as a context manager it ends what it started."""

    def __init__(self, folder: Path, places: int = 8) -> None:
        self.run = RunDirectory.create(folder)
        config = Config()
        config.runtime.host = "127.0.0.1"
        config.runtime.max_parallel_sandboxes = places
        self.run.config.write_text(yaml.safe_dump(config.model_dump()))
        self.run.publish(self.run.runtime_api_key, KEY, 0o600)
        self.attempt = self.run.take_attempt(Role.RUNTIME, "token")
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            process.send_signal(signal.SIGTERM)
        for process in self.processes.values():
            process.wait(60)
        for path, claim in leftovers().items():  # nobody takes over what the killed ones left
            if claim.startswith(f"{self.run.root.resolve()}\n"):
                State(path, path).remove()

    def start(self, *names: str) -> None:
        """And wait until each has registered; the first one gets the ready flag."""
        for name in names:
            command = [sys.executable, "-m", "runtime_server", "--run-dir", self.run.root, "--server", name]
            self.processes[name] = subprocess.Popen(command, env={**os.environ, "ORCHESTRATE_JOB_ID": ""})
        for name in names:
            wait_for(partial(self.record, name), f"server {name}", START_S)
        self._publish(names[0])

    def record(self, name: str) -> ServerRecord | None:
        assert self.processes[name].poll() is None, f"server {name} ended"
        return self.run.read(self.run.server(name), ServerRecord)

    def _publish(self, name: str) -> None:
        record = self.record(name)
        assert record is not None
        flag = ReadyFlag(
            run_id=record.run_id,
            attempt=self.attempt,
            job_id="",
            nonce=record.nonce,
            host=record.host,
            pid=record.pid,
            url=record.url,
        )
        self.run.publish(self.run.runtime_url, record.url)
        self.run.publish(self.run.ready_flag, flag)

    def kill(self, name: str) -> None:
        """As a crash would: what it had registered stays."""
        process = self.processes.pop(name)
        process.kill()
        process.wait(10)
        assert self.run.read(self.run.server(name), ServerRecord) is not None

    def stop(self, name: str) -> int:
        process = self.processes.pop(name)
        process.send_signal(signal.SIGTERM)
        return process.wait(60)
