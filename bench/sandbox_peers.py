"""Who the sandbox benchmark is measured against: `podman` by hand, and SWE-ReX's own server in a container.

What it is
    `Podman`   commands of Podman on the image, store and limits that the server uses too, with state of its
               own; run by one child process in its own mount namespace, so that no mount of it can stay
    `Rex`      a container of that image in which SWE-ReX's server runs, and its real client. Its packages are
               this environment's, mounted into the container, so that the image is the same; it has the
               network of this machine, because that is the fastest one

What it does not do
    SWE-ReX's packages are compiled for one Python: where the image has another than this environment, its
    server does not start, and its rows are left out. One request opens one connection: so does its client.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.schema import Runtime
from runtime_server.engines import namespace
from runtime_server.engines.service import find_programs
from runtime_server.engines.state import State
from runtime_server.image_store import default_store

if TYPE_CHECKING:
    from swerex.runtime.remote import RemoteRuntime

IMAGE = Runtime().sandbox.image
LIMITS = ("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=4096:4096")
PACKAGES = "/opt/packages"
ALIVE_S, POLL_S = 60.0, 0.005
COMMAND_S = 120


class Podman:
    """Commands one at a time, through the child that runs `answer_lines`."""

    def __init__(self, child: asyncio.subprocess.Process) -> None:
        self._child = child
        self._turn = asyncio.Lock()
        self._made: list[str] = []

    async def __call__(self, *command: str) -> None:
        assert self._child.stdin is not None and self._child.stdout is not None
        async with self._turn:
            self._child.stdin.write(json.dumps(command).encode() + b"\n")
            problem = json.loads(await self._child.stdout.readline())
        if problem:
            raise SystemExit(f"podman {' '.join(command)}: {problem}")

    async def run(self, *command: str, options: Sequence[str] = ("--network", "none")) -> str:
        """Start a container; returns its name once Podman has returned."""
        name = f"bench-{len(self._made)}"
        self._made.append(name)
        await self("run", "-d", "--name", name, *options, *LIMITS, IMAGE, *command)
        return name

    async def clear(self) -> None:
        while self._made:
            await self("rm", "-f", "-t", "0", self._made.pop())


@asynccontextmanager
async def podman() -> AsyncIterator[Podman]:
    state = State.create()
    try:
        child = await asyncio.create_subprocess_exec(
            *namespace.entry().prefix,
            *(sys.executable, "-m", "bench.sandbox_peers", json.dumps(podman_command(state))),
            env={**os.environ, "XDG_RUNTIME_DIR": str(state.xdg)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        by_hand = Podman(child)
        yield by_hand
        await by_hand.clear()
        assert child.stdin is not None
        child.stdin.close()
        await child.wait()
    finally:
        await asyncio.to_thread(state.remove)


def podman_command(state: State) -> list[str]:
    """Podman as one would run it by hand, with everything it writes in directories of its own."""
    storage = ["--root", str(state.graphroot), "--runroot", str(state.runroot), "--tmpdir", str(state.tmp)]
    store = ["--storage-driver", "overlay", "--storage-opt", f"additionalimagestore={default_store()}"]
    engine = ["--cgroup-manager", "cgroupfs", "--events-backend", "file", "--runtime", find_programs()[0]]
    return ["podman", *storage, *store, *engine]


def answer_lines(command: Sequence[str]) -> None:
    """In the child: a list of arguments a line, and for each what went wrong, or null."""
    for line in sys.stdin:
        with tempfile.TemporaryFile("w+") as said:
            # no pipes: the monitor of a container that goes on would hold them open
            done = subprocess.run(
                [*command, *json.loads(line)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
                timeout=COMMAND_S,
                check=False,
            )
            said.seek(0)
            print(json.dumps(said.read()[-400:] or done.returncode if done.returncode else None), flush=True)


# --- SWE-ReX --------------------------------------------------------------------------------------------


async def rex(by_hand: Podman) -> RemoteRuntime:
    """A new container with its server, once that answers."""
    from swerex.runtime.remote import RemoteRuntime

    port, token = _free_port(), secrets.token_hex(8)
    packages = Path(sys.modules["swerex"].__file__ or "").parents[1]
    options = ["--network", "host", "-v", f"{packages}:{PACKAGES}:ro", "-e", f"PYTHONPATH={PACKAGES}"]
    server = ["python3", "-m", "swerex.server", "--host", "127.0.0.1", "--port", str(port)]
    await by_hand.run(*server, "--auth-token", token, options=options)
    runtime = RemoteRuntime(host="http://127.0.0.1", port=port, auth_token=token, timeout=COMMAND_S)
    runtime.logger.setLevel(logging.CRITICAL)
    deadline = time.monotonic() + ALIVE_S
    while not (await runtime.is_alive(timeout=5)).is_alive:
        if time.monotonic() > deadline:
            raise TimeoutError(f"SWE-ReX's server did not answer within {ALIVE_S:g} s")
        await asyncio.sleep(POLL_S)
    return runtime


def has_rex() -> bool:
    """Whether it is installed, for the Python that the sandbox image of this project has."""
    from importlib.util import find_spec

    return find_spec("swerex") is not None and sys.version_info[:2] == (3, 11)


@contextmanager
def quiet() -> Iterator[None]:
    """Its loggers write to the terminal as they are made."""
    before = os.environ.get("SWE_REX_LOG_STREAM_LEVEL")
    os.environ["SWE_REX_LOG_STREAM_LEVEL"] = "CRITICAL"
    try:
        yield
    finally:
        os.environ.pop("SWE_REX_LOG_STREAM_LEVEL")
        if before is not None:
            os.environ["SWE_REX_LOG_STREAM_LEVEL"] = before


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as bound:
        return int(bound.getsockname()[1])


def true_program() -> str:
    return shutil.which("true") or "/bin/true"


if __name__ == "__main__":
    answer_lines(json.loads(sys.argv[1]))
