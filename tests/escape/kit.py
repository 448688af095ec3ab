"""One server of one engine, a sandbox that is up to no good, and the rows of the table.

How to use it
    @attempt("what", "how", "contained by")
    async def test_it(field: Field) -> str:       # returns what was seen; an assertion that fails is an escape
        return await field.python("print(call(MOUNT, …))")

What it does not do
    It judges nothing: the attempts do. Whatever an attempt was, the server and a neighbour must answer after
    it: a bound of correctness (`ANSWER_S`), not a measurement.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from serverkit import Server

from runtime_server.client import BoundSandbox, Client

ANSWER_S = 30.0
ROWS_TO = "ORCHESTRATE_ESCAPE"
HERE = Path(__file__).parent
PRELUDE = (HERE / "inside.py").read_text()
UNCONFINED = "process"  # what this engine does not contain is said, not hidden
# What holds there too, for it is the agent's doing or the server's. The rest would be done to this machine.
EVERYWHERE = {
    *("test_mount", "test_namespaces", "test_keyrings", "test_tracing", "test_io_uring", "test_foreign"),
    *("test_kill_agent", "test_tiocsti", "test_renamed", "test_daemon", "test_balloon", "test_output"),
    *(
        "test_invalid_text",
        "test_many_commands",
        "test_frames_in_output",
        "test_after_delete",
        "test_other_key",
    ),
    *("test_master_key_inside", "test_session_key_outside", "test_key_after_delete", "test_forged_ids"),
    *("test_wrong_keys", "test_headers", "test_ten_thousand", "test_body", "test_slow", "test_smuggling"),
    *("test_url_paths", "test_forwarded", "test_json", "test_terminal_codes"),
}


@dataclass(frozen=True)
class Row:
    """One cell of the table."""

    attempt: str
    tried: str
    contained: str
    engine: str
    seen: str


@dataclass(frozen=True)
class World:
    """A running server of one engine."""

    engine: str
    server: Server
    neighbour: str  # id of a sandbox that has nothing to do with any attack

    @property
    def confined(self) -> bool:
        return self.engine != UNCONFINED


@dataclass
class Field:
    """What an attempt works with: the server, its client, and a sandbox of its own."""

    world: World
    client: Client
    bad: BoundSandbox

    async def says(self, command: str, timeout_s: float = 30.0, on: BoundSandbox | None = None) -> str:
        """Both streams of a shell command, in one line."""
        done = await (on or self.bad).exec(f"{{ {command}\n}} 2>&1", timeout_s=timeout_s)
        return " ".join(done.stdout.text.split())

    async def python(self, code: str, timeout_s: float = 30.0, on: BoundSandbox | None = None) -> str:
        """What a Python program prints, in one line; `inside.py` comes before it."""
        done = await (on or self.bad).exec(["python3", "-c", f"{PRELUDE}\n{code}"], timeout_s=timeout_s)
        return " ".join((done.stdout.text + done.stderr.text).split())

    async def lives(self) -> str:
        """The attacked sandbox still does what it is told, and says the truth."""
        done = await asyncio.wait_for(self.bad.exec("echo alive; exit 3"), ANSWER_S)
        assert (done.stdout.text, done.exit_code) == ("alive\n", 3)
        return "the agent answers"

    async def others_answer(self) -> None:
        """The server, and a neighbour, whatever goes on."""
        async with asyncio.timeout(ANSWER_S):
            await self.client.health()
            done = await BoundSandbox(self.client, await self.client.get(self.world.neighbour)).exec(
                "echo here"
            )
            assert done.stdout.text == "here\n"

    def http(self, key: str | None = None) -> httpx.AsyncClient:
        """A client without manners, with the server's key or another one."""
        headers = {"X-API-Key": self.world.server.key if key is None else key}
        return httpx.AsyncClient(base_url=self.world.server.url, headers=headers, timeout=ANSWER_S)


Attempt = Callable[..., Awaitable[str]]


def attempt(what: str, tried: str, contained: str) -> Callable[[Attempt], Callable[..., Awaitable[None]]]:
    """Makes a row of what the attempt returns, once it has passed."""

    def decorate(function: Attempt) -> Callable[..., Awaitable[None]]:
        @functools.wraps(function)
        async def run(field: Field, **more: Any) -> None:
            if not field.world.confined and function.__name__ not in EVERYWHERE:
                note(
                    Row(
                        what, tried, contained, field.world.engine, "not contained: this engine is no sandbox"
                    )
                )
                pytest.skip("the engine process isolates nothing")
            seen = await function(field=field, **more)
            assert seen, "an attempt says what was seen"
            await field.others_answer()
            note(Row(what, tried, contained, field.world.engine, seen[:160]))

        return run

    return decorate


def note(row: Row) -> None:
    if path := os.environ.get(ROWS_TO):
        with Path(path).open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")


def refused(said: str, *allowed: str) -> str:
    """Every word of what was printed is a refusal."""
    names = set(said.split())
    known = {"EPERM", "EACCES", "ENOSYS", "EROFS", "EINVAL", "ENODEV", "ENOENT", "EAFNOSUPPORT", *allowed}
    assert names and names <= known, said
    return " ".join(sorted(names))
