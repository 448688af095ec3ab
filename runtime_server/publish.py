"""How a run learns where its sandbox server is: key, address and flag in the run directory, in that order.

What it is
    `announce` asks the server's own `/health` over HTTP, at the address that others will use, and only when
    that answers with our nonce publishes key (0600), url, and the ready flag last. One server of a fleet
    takes the run's key and publishes a record of its own instead; whoever started the fleet sees to the rest.
    Nothing but that record is taken back: a flag is only a hint, and one whose server is gone is seen by
    everybody who asks `/health`.

What it does not do
    It does not decide when the server is ready or over; `__main__` does.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import socket
import time
from dataclasses import dataclass

import httpx

from orchestrator.contract import (
    ContractError,
    Env,
    EventLog,
    ReadyFlag,
    Role,
    RunDirectory,
    ServerRecord,
    WaitTimeout,
    wait_for,
)
from runtime_server.app import Identity
from runtime_server.wire import API_KEY_HEADER, Health

CHECK_S = 30.0
KEY_S = 10.0


def new_key() -> str:
    """256 random bits."""
    return secrets.token_urlsafe(32)


def shared_key(run: RunDirectory) -> str:
    """The key of the run's fleet; another node may see it a little late. ContractError without one."""
    try:
        return wait_for(lambda: run.read_text(run.runtime_api_key) or None, "the key of the run", KEY_S)
    except WaitTimeout:
        raise ContractError(
            f"{run.runtime_api_key} is empty: a server joins a run whose runtime job has started; "
            "without --server a server is the only one of its run and makes the key"
        ) from None


def identity_of(run: RunDirectory, server: str = "") -> Identity:
    """Who this server is: as the job says, else a first attempt of our own. Each life of each server of a
    fleet has a nonce of its own, within the attempt of the job."""
    if server:
        given = os.environ.get(Env.ATTEMPT, "")
        attempt = int(given) if given.isdigit() else run.latest_attempt(Role.RUNTIME)
        return Identity(run.run_id, attempt, secrets.token_hex(16))
    nonce = os.environ.get(Env.NONCE) or secrets.token_hex(16)
    given = os.environ.get(Env.ATTEMPT, "")
    attempt = int(given) if given.isdigit() else run.take_attempt(Role.RUNTIME, nonce)
    return Identity(run.run_id, attempt, nonce)


def address(host: str, port: int, advertised: str = "") -> str:
    """The URL that other nodes use: the advertised name, else the bound address, else this node's own."""
    name = advertised or host
    if name in ("", "0.0.0.0", "::"):  # noqa: S104 - everything, which is no address to give to others
        name = _own_address()
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"


def _own_address() -> str:
    """The name of this node when it resolves to something others can reach, else the loopback address."""
    name = socket.gethostname()
    try:
        found = {info[4][0] for info in socket.getaddrinfo(name, None, socket.AF_INET)}
    except OSError:
        return "127.0.0.1"
    return name if any(not str(one).startswith("127.") for one in found) else "127.0.0.1"


async def check(url: str, key: str, identity: Identity, timeout_s: float = CHECK_S) -> str:
    """Ask our own `/health` over HTTP until it answers as us. Returns what is wrong, "" when nothing is."""
    deadline, problem = time.monotonic() + timeout_s, ""
    async with httpx.AsyncClient(trust_env=False, timeout=5) as client:
        while time.monotonic() < deadline:
            try:
                got = await client.get(f"{url}/health", headers={API_KEY_HEADER: key})
                got.raise_for_status()
                if Health.model_validate_json(got.content).nonce == identity.nonce:
                    return ""
                problem = f"another server answers at {url}; set runtime.advertise_host"
            except (httpx.HTTPError, ValueError) as error:
                problem = f"{url} does not answer ({error}); set runtime.advertise_host to a reachable name"
            await asyncio.sleep(0.1)
    return problem


@dataclass
class Publication:
    """What one server says in one run directory. `server` is its name in a fleet."""

    run: RunDirectory
    identity: Identity
    key: str
    server: str = ""
    places: int = 0

    def __post_init__(self) -> None:
        writer = f"runtime-server-{self.server}" if self.server else "runtime-server"
        self.events: EventLog = self.run.events_of(Role.RUNTIME, writer)
        self.events.attempt = self.identity.attempt

    async def announce(self, url: str) -> str:
        """Publish once our own check succeeds; returns what is wrong if not. Raises OSError, Superseded."""
        if problem := await check(url, self.key, self.identity):
            return problem
        await asyncio.to_thread(self._write, url)
        return ""

    def withdraw(self) -> None:
        """This server stops."""
        with contextlib.suppress(OSError):
            if self.server:
                self.run.publish(self.run.server(self.server), "")
            self._tell_prometheus([])
        self.events.add("server_stopped", **self._named())

    def _write(self, url: str) -> None:
        self.run.check_attempt(Role.RUNTIME, self.identity.attempt)
        if self.server:
            self._register(url)
        else:
            self._publish(url)
        self._tell_prometheus([url.partition("://")[2]])
        self.events.add("server_ready", url=url, pid=os.getpid(), **self._named())

    def _tell_prometheus(self, targets: list[str]) -> None:
        """A file for its `file_sd_configs`; the key is in a file that it knows."""
        name = self.server or Role.RUNTIME.value
        self.run.targets.mkdir(exist_ok=True)
        labels = {"run": self.run.run_id, "server": name, "node": socket.gethostname()}
        told = [{"targets": targets, "labels": labels}] if targets else []
        self.run.publish(self.run.target(name), json.dumps(told))

    def _named(self) -> dict[str, str]:
        return {"server": self.server} if self.server else {}

    def _register(self, url: str) -> None:
        run, who = self.run, self.identity
        run.servers.mkdir(exist_ok=True)  # a run that was launched by an earlier version
        record = ServerRecord(
            run_id=who.run_id,
            name=self.server,
            attempt=who.attempt,
            job_id=os.environ.get(Env.JOB_ID, ""),
            nonce=who.nonce,
            host=socket.gethostname(),
            pid=os.getpid(),
            url=url,
            places=self.places,
        )
        run.publish(run.server(self.server), record)

    def _publish(self, url: str) -> None:
        run, who = self.run, self.identity
        run.publish(run.runtime_api_key, self.key, mode=0o600)
        run.publish(run.runtime_url, url)
        flag = ReadyFlag(
            run_id=who.run_id,
            attempt=who.attempt,
            job_id=os.environ.get(Env.JOB_ID, ""),
            nonce=who.nonce,
            host=socket.gethostname(),
            pid=os.getpid(),
            url=url,
        )
        run.publish(run.ready_flag, flag)
