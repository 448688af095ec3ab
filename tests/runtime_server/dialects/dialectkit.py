"""Foreign clients in a few lines: what they send, byte for byte, where the real ones cannot be installed."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

IMAGE = "localhost/orchestrate/sandbox:latest"
V1_COMMAND = "/usr/local/bin/openhands-agent-server --port 60000"
_numbers = itertools.count(1)


def v0_command(port: str = "60000", plugins: tuple[str, ...] = ("agent_skills", "jupyter")) -> list[str]:
    prefix = "/openhands/micromamba/bin/micromamba run -n openhands poetry run python -u -m"
    options = f"--working-dir /workspace --plugins {' '.join(plugins)} --username root --user-id 0"
    return f"{prefix} openhands.runtime.action_execution_server {port} {options}".split()


@dataclass
class Control:
    """The control API, with the server's key."""

    url: str
    key: str
    http: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.http = httpx.Client(base_url=self.url, headers={"X-API-Key": self.key}, timeout=60)

    def start(self, command: object = None, **more: Any) -> dict[str, Any]:
        body = {"image": IMAGE, "command": command or v0_command(), "session_id": f"s-{uuid.uuid4()}"}
        got = self.http.post("/start", json=body | {"environment": {}, "resource_factor": 1} | more)
        assert got.status_code == 200, got.text
        return dict(got.json())

    def get(self, path: str, **params: Any) -> Any:
        got = self.http.get(path, params=params)
        assert got.status_code == 200, got.text
        return got.json()

    def post(self, path: str, body: object = None) -> httpx.Response:
        return self.http.post(path, json=body)

    def stop(self, runtime: str | None) -> None:
        assert self.post("/stop", {"runtime_id": runtime}).status_code == 200

    @contextmanager
    def v0(self, **more: Any) -> Iterator[V0]:
        made = self.start(**more)
        try:
            with V0(made["url"], made["session_api_key"], made) as client:
                yield client
        finally:
            self.stop(made["runtime_id"])

    @contextmanager
    def v1(self, **more: Any) -> Iterator[V1]:
        made = self.start(V1_COMMAND, **{"working_dir": "/", **more})
        try:
            with V1(made["url"], made["session_api_key"], made) as client:
                yield client
        finally:
            self.stop(made["runtime_id"])


class _Inside:
    def __init__(self, url: str, key: str, record: dict[str, Any]) -> None:
        self.url, self.key, self.record = url, key, record
        self.http = httpx.Client(base_url=url, headers={"X-Session-API-Key": key}, timeout=60)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()


class V0(_Inside):
    """Actions as the client of OpenHands V0 sends them."""

    def send(self, kind: str, args: dict[str, Any], timeout: float = 30, **more: Any) -> httpx.Response:
        return self.http.post(
            "/execute_action", json={"action": {"action": kind, "args": args, "timeout": timeout, **more}}
        )

    def act(self, kind: str, args: dict[str, Any], timeout: float = 30, fresh: bool = True) -> dict[str, Any]:
        """`fresh`: with an id, as everything that went through the event stream has."""
        mark = {"id": next(_numbers), "timestamp": "2025-11-21T10:00:00.1"} if fresh else {}
        got = self.send(kind, args, timeout, **mark)
        assert got.status_code == 200, got.text
        return dict(got.json())

    def run(self, command: str, timeout: float = 30, **args: Any) -> dict[str, Any]:
        return self.act("run", {"command": command, **args}, timeout)

    def code(self, made: dict[str, Any]) -> int:
        return int(made["extras"]["metadata"]["exit_code"])


class V1(_Inside):
    """Commands as the client of OpenHands V1 polls for them."""

    def begin(self, command: str, **more: Any) -> str:
        got = self.http.post("/api/bash/start_bash_command", json={"command": command, "timeout": 20, **more})
        assert got.status_code == 200, got.text
        return str(got.json()["id"])

    def run(self, command: str, **more: Any) -> tuple[int, str, str]:
        """Exit code, stdout, stderr; every event exactly once."""
        identity, last, found = self.begin(command, **more), -1, list[dict[str, Any]]()
        while not found or found[-1]["exit_code"] is None:
            params = {
                "kind__eq": "BashOutput",
                "command_id__eq": identity,
                "sort_order": "TIMESTAMP",
                "limit": 100,
            }
            page = self.http.get(
                "/api/bash/bash_events/search", params=params | ({"order__gt": last} if last >= 0 else {})
            )
            assert page.status_code == 200, page.text
            found += page.json()["items"]
            last = found[-1]["order"] if found else -1
        assert [event["order"] for event in found] == [*range(len(found))]
        assert len({event["id"] for event in found}) == len(found)
        assert all(event["exit_code"] is None for event in found[:-1])
        out, err = ("".join(event[name] or "" for event in found) for name in ("stdout", "stderr"))
        return found[-1]["exit_code"], out, err
