"""Schemathesis over the server's own OpenAPI document, with its key, against real sandboxes.

How to run it
    make schemathesis                     five minutes, every phase
    PYTHONPATH=tests/runtime_server python -m contract SECONDS

What it does not do
    The dialects of foreign clients are not in the document. What a body means to a sandbox is the other
    tests' to check: here no answer may be a 5xx, or be another than the document says.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from serverkit import KEY, run_server

from orchestrator.schema import Runtime
from runtime_server.client import Client
from runtime_server.wire import CreateSandbox, OpenSession, Run, StartProcess

HERE = Path(__file__).parent
HOOKS = {"SCHEMATHESIS_HOOKS": "contract_hooks", "PYTHONPATH": str(HERE)}
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "response_headers_conformance",
    "ignored_auth",
    "unsupported_method",
)


async def prepare(url: str) -> dict[str, dict[str, str]]:
    """Sandboxes with something in them. What is sent to which route: ids of things that exist."""
    async with Client(url, KEY) as client:
        main, spare, doomed, paused = [await client.create(CreateSandbox(ttl_s=3600)) for _ in range(4)]
        process = await client.start(main.id, StartProcess(command="echo here; cat", stdin=True))
        session = await client.open_session(main.id, OpenSession(name="main"))
        await client.run(main.id, session.name, Run(command="echo left", on_timeout="leave"))
        await client.write_file(main.id, "/tmp/file", b"content")
        snapshot, dropped = [await client.snapshot(spare.id) for _ in range(2)]
    everywhere = {"query.wait_s": "0", "query.follow": "false"}
    everywhere |= {"path.identity": main.id, "path.number": str(process.number), "path.name": session.name}
    return {
        "": everywhere,
        "GET /v1/snapshots/{identity}": {"path.identity": snapshot.id},
        "DELETE /v1/snapshots/{identity}": {"path.identity": dropped.id},
        "DELETE /v1/sandboxes/{identity}": {"path.identity": doomed.id},
        "POST /v1/sandboxes/{identity}/kill": {"path.identity": spare.id},
        "POST /v1/sandboxes/{identity}/pause": {"path.identity": paused.id},
        "POST /v1/sandboxes/{identity}/resume": {"path.identity": paused.id},
        "DELETE /v1/sandboxes/{identity}/processes/{number}": {"path.number": "1"},
        "DELETE /v1/sandboxes/{identity}/sessions/{name}": {"path.name": "none"},
    }


def settings(seconds: int, parameters: dict[str, dict[str, str]]) -> str:
    """Its configuration. The key is in the environment, not in a file or an argument."""
    lines = [
        f"max-time = {seconds}",
        "continue-on-failure = true",
        "request-timeout = 30",
        'headers = { X-API-Key = "${SANDBOX_TEST_KEY}" }',
        f"parameters = {_table(parameters[''])}",
        "[checks]",
        # no room is no fault, and has its code
        'not_a_server_error.expected-statuses = ["2xx", "4xx", 503, 507]',
        "[generation]",
        "deterministic = true",
    ]
    for name, values in parameters.items():
        if name:
            lines += [
                "[[operations]]",
                f"include-name = {json.dumps(name)}",
                f"parameters = {_table(values)}",
            ]
    return "\n".join(lines) + "\n"


def _table(values: dict[str, str]) -> str:
    return "{ " + ", ".join(f'"{name}" = {json.dumps(value)}' for name, value in values.items()) + " }"


def run(seconds: int, *options: str) -> subprocess.CompletedProcess[str]:
    """A server, and schemathesis against it for so long."""
    config = Runtime(max_parallel_sandboxes=12, queue_timeout=1)
    with run_server(config) as (url, _), tempfile.TemporaryDirectory() as folder:
        parameters = asyncio.run(prepare(url))
        file = Path(folder, "schemathesis.toml")
        file.write_text(settings(seconds, parameters))
        command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(file), "run"]
        command += [f"{url}/openapi.json", "--checks", ",".join(CHECKS), *options]
        return subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, **HOOKS, "SANDBOX_TEST_KEY": KEY},
            capture_output=True,
            text=True,
            timeout=seconds * 3 + 60,
            check=False,
        )


def main() -> int:
    done = run(int(sys.argv[1]) if len(sys.argv) > 1 else 300)
    print(done.stdout, done.stderr, sep="\n")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
