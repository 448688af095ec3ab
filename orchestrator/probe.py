"""The probe of `orchestrate doctor --probe`: runs on a compute node, checks it, and measures the way between.

What it is
    `python -m orchestrator.probe runtime FOLDER` checks its node, then serves a few fixed requests on a port
    of its own: tell the time; make, replace or remove a numbered file in FOLDER. `… training FOLDER` checks
    its node, connects, and measures: is the port reachable, how far apart are the clocks, and how long
    until a file that the other node changed is seen here. Each writes FOLDER/<role>.json.

What it does not do
    It takes no names and no data over the network, and every request needs the token in FOLDER, which is
    readable by its owner only. It ends by itself after its deadline. Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import secrets
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.checks_files import directory
from orchestrator.checks_node import node
from orchestrator.durable import publish_bytes, read_bytes

DEADLINE_S = 240.0
LAG_LIMIT_S = 90.0
ROUNDS = 3
KINDS = ("new", "replaced", "removed")


class Folder:
    """What doctor and the two probes say to each other through files."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.address = root / "address.json"
        self.code = root / "code"

    def report(self, role: str) -> Path:
        return self.root / f"{role}.json"

    def script(self, role: str) -> Path:
        return self.root / f"{role}.sh"

    def log(self, role: str, stream: str) -> Path:
        return self.root / f"{role}.{stream}"

    def subject(self, kind: str, number: int) -> Path:
        """The file whose visibility is measured."""
        return self.root / f"{kind}-{number}"

    def publish(self, path: Path, data: dict[str, Any]) -> None:
        publish_bytes(path, json.dumps(data).encode(), 0o600)

    def read(self, path: Path) -> dict[str, Any] | None:
        with contextlib.suppress(ValueError):
            data = json.loads(read_bytes(path))
            return data if isinstance(data, dict) else None
        return None


def report(role: str, folder: Folder) -> dict[str, Any]:
    """What this node is like."""
    shared = directory(folder.root, not_judged="whether it is shared is measured")
    checks = [check.as_dict() for check in (*node(role), *shared)]
    return {"host": socket.gethostname(), "python": platform.python_version(), "checks": checks}


# --- the runtime's side ------------------------------------------------------------------------------


def serve(folder: Folder, deadline_s: float = DEADLINE_S) -> None:
    """Publish the address, then answer one client after another until it says bye."""
    deadline = time.monotonic() + deadline_s
    token = secrets.token_hex(16)
    with socket.create_server(("", 0)) as server:
        server.settimeout(1.0)
        about = {"host": _address(), "port": server.getsockname()[1], "token": token}
        folder.publish(folder.address, about)
        while time.monotonic() < deadline:
            with contextlib.suppress(TimeoutError):
                client, _ = server.accept()
                with client:
                    if _converse(client, folder, token, deadline):
                        return


def _address() -> str:
    """The name of this node where it leads to an address, else the address itself."""
    name = socket.gethostname()
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        return "127.0.0.1"
    return name


def _converse(client: socket.socket, folder: Folder, token: str, deadline: float) -> bool:
    """Answer the requests of one client; True once it said bye. A client without the token is hung up on."""
    client.settimeout(20.0)
    with contextlib.suppress(OSError, ValueError), client.makefile("rw") as lines:
        if not secrets.compare_digest(lines.readline(64).strip(), token):
            return False
        while time.monotonic() < deadline and (request := lines.readline(64).split()):
            if request == ["bye"]:
                return True
            kind, number = request[0], int(request[1])
            if kind != "time":
                _change(folder, kind, number)
            lines.write(f"{time.time()!r}\n")
            lines.flush()
    return False


def _change(folder: Folder, kind: str, number: int) -> None:
    subject = folder.subject(kind, number)
    if kind == "removed":
        subject.unlink()
    elif kind in KINDS:
        publish_bytes(subject, b"after", 0o600)


# --- the training's side -----------------------------------------------------------------------------


def measure(folder: Folder, deadline_s: float = DEADLINE_S) -> dict[str, Any]:
    """What lies between the two nodes: {"port": …, "skew_s": …, "lag_s": {kind: seconds}}."""
    about = _wait(lambda: folder.read(folder.address), deadline_s)
    if about is None:
        return {"port": "", "problem": "the runtime node never said where it listens"}
    where = (str(about["host"]), int(about["port"]))
    try:
        with socket.create_connection(where, timeout=10) as connection, connection.makefile("rw") as lines:
            connection.settimeout(30)
            lines.write(f"{about['token']}\n")
            found = {"port": f"{where[0]}:{where[1]}", **_clock(lines), "lag_s": _lags(lines, folder)}
            lines.write("bye\n")
            lines.flush()
            return found
    except OSError as error:
        return {"port": "", "problem": f"{where[0]} port {where[1]}: {error}"}


def _ask(lines: Any, request: str) -> float:
    lines.write(f"{request}\n")
    lines.flush()
    answer = lines.readline(64)
    if not answer:
        raise ConnectionError("the other side hung up")
    return float(answer)


def _clock(lines: Any) -> dict[str, float]:
    """The other clock minus ours, and how exact that is: from the quickest of a few questions."""
    best = (float("inf"), 0.0)
    for _ in range(5):
        start, began = time.time(), time.monotonic()
        there = _ask(lines, "time 0")
        trip = time.monotonic() - began
        best = min(best, (trip, there - (start + trip / 2)))
    return {"trip_s": best[0], "skew_s": best[1]}


def _lags(lines: Any, folder: Folder) -> dict[str, float | None]:
    """Seconds until a change on the other node is seen here, the longest of a few; None: not in time."""
    found: dict[str, float | None] = {}
    for kind in KINDS:
        lags = [_lag(lines, folder, kind, number) for number in range(ROUNDS)]
        known = [lag for lag in lags if lag is not None]
        found[kind] = max(known) if len(known) == len(lags) else None
    return found


def _lag(lines: Any, folder: Folder, kind: str, number: int) -> float | None:
    """One change. The look before it makes this node's caches remember what was there, as in real use."""
    subject = folder.subject(kind, number)
    if kind != "new":
        publish_bytes(subject, b"before", 0o600)
    subject.exists()
    read_bytes(subject)
    _ask(lines, f"{kind} {number}")
    began = time.monotonic()
    wanted = b"" if kind == "removed" else b"after"
    seen = _wait(lambda: True if read_bytes(subject) == wanted else None, LAG_LIMIT_S)
    return time.monotonic() - began if seen else None


def _wait(check: Callable[[], Any], timeout_s: float) -> Any:
    deadline, pause = time.monotonic() + timeout_s, 0.002
    while (found := check()) is None and time.monotonic() < deadline:
        time.sleep(pause)
        pause = min(pause * 1.3, 0.25)
    return found


def main(argv: list[str]) -> int:
    if len(argv) != 2 or argv[0] not in ("runtime", "training"):
        print("usage: python -m orchestrator.probe runtime|training FOLDER", file=sys.stderr)
        return 64
    role, folder = argv[0], Folder(Path(argv[1]))
    os.umask(0o077)
    about = report(role, folder)
    if role == "runtime":
        folder.publish(folder.report(role), about)
        serve(folder)
    else:
        folder.publish(folder.report(role), {**about, "between": measure(folder)})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
