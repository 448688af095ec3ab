"""One sandbox's life, by a client that keeps count of what it was told.

What it is
    `Cycle.go` makes a sandbox, runs commands that each write a line into a file there, compares that
    file with what was answered, and deletes the sandbox. What goes wrong lands in a `Tally`: a sandbox
    that is gone although nobody killed it, a command that ran twice, or not at all although answered.

What it does not do
    It kills nothing (`kills.py`).
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

import httpx
from soak.place import Place

from runtime_server import wire
from runtime_server.client import Client
from runtime_server.errors import NotFound, SandboxError, from_failure
from runtime_server.wire import Code, CreateSandbox, Exec

T = TypeVar("T")
LOG = "/soak-log"
LOST = (Code.SANDBOX_DIED, Code.EVICTED)
DEAD_S = 15.0
BACK_S = 120.0


@dataclass
class Tally:
    """What happened so far."""

    counted: Counter[str] = field(default_factory=Counter)
    killed: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    live: dict[str, Cycle] = field(default_factory=dict)  # by the name of the sandbox's pid namespace

    def forget(self, cycle: Cycle) -> None:
        """Before its sandbox goes: the kernel gives the number of a namespace to the next one."""
        for name in [name for name, one in self.live.items() if one is cycle]:
            del self.live[name]


class Cycle:
    """See the module's docstring."""

    def __init__(self, number: int, seed: int, place: Place, tally: Tally) -> None:
        self.number, self.place, self.tally = number, place, tally
        self.random = random.Random(f"{seed} {number}")
        self.step = "create"
        self.killed = ""  # what of it was killed, by us
        self.box = ""
        self._sure: list[str] = []
        self._unsure: list[str] = []

    async def go(self) -> None:
        async with self.place.client() as client:
            self.box = await self._create(client)
            if not self.box:
                return
            try:
                await self._use(client)
            except SandboxError as error:
                self._lost(error)
            try:
                if self.killed in ("agent", "container"):
                    await self._seen_dead(client)
                self.step = "delete"
                self.tally.forget(self)
                await self._patiently(lambda: client.delete(self.box))
            except SandboxError as error:
                self._wrong(f"the delete of {self.box} failed: {error.code}: {error}")

    async def _create(self, client: Client) -> str:
        """Its id once it is acknowledged; asked for with one key, however often."""
        request = CreateSandbox(labels={"cycle": str(self.number)}, ttl_s=900)
        key = f"soak-{self.number}-{self.random.getrandbits(64)}"
        try:
            made = await self._patiently(lambda: client.create(request, key=key))
            if self.random.random() < 0.1:
                again = await self._patiently(lambda: client.create(request, key=key))
                if again.id != made.id:
                    self._wrong(f"one key made two sandboxes, {made.id} and {again.id}")
        except SandboxError as error:
            # while Podman's service was killed beneath it, a create may fail; nothing was promised then
            self.tally.counted["create_failed"] += 1
            if not error.infrastructure:
                self._wrong(f"a create was refused: {error.code}: {error}")
            return ""
        self.tally.counted["create"] += 1
        return made.id

    async def _use(self, client: Client) -> None:
        self.step = "first command"
        self.tally.live[await self._keyed("readlink /proc/self/ns/pid")] = self
        if self.random.random() < 0.25:
            await self._session(client)
        for number in range(self.random.randint(1, 4)):
            self.step = f"command {number}"
            mark = f"{self.number}-{number}"
            command = f"echo {mark} >> {LOG}; echo {mark}"
            await (self._with_key if self.random.random() < 0.5 else self._without_key)(client, mark, command)
        self.step = "count"
        self._compare((await self._keyed(f"cat {LOG} 2>/dev/null || true")).split())

    async def _with_key(self, client: Client, mark: str, command: str) -> None:
        if (said := await self._keyed(command)) != mark:
            self._wrong(f"{mark} was answered with {said!r}")
        self._sure.append(mark)
        self.tally.counted["exec"] += 1

    async def _without_key(self, client: Client, mark: str, command: str) -> None:
        self._unsure.append(mark)
        try:
            done = await client.exec(self.box, Exec(command=command, timeout_s=60))
        except SandboxError as error:
            if error.code != Code.UNREACHABLE:
                raise
            self.tally.counted["exec_unsure"] += 1
            await self._server_back()
            return
        if done.stdout.text.strip() != mark:
            self._wrong(f"{mark} was answered with {done}")
        self._unsure.remove(mark)
        self._sure.append(mark)
        self.tally.counted["exec"] += 1

    async def _keyed(self, command: str) -> str:
        """What it said; sent again with its key for as long as nobody answers."""
        key = f"{self.box}-{self.random.getrandbits(64):x}"
        url = f"http://127.0.0.1:{self.place.port}/v1/sandboxes/{self.box}/exec"
        headers = {wire.API_KEY_HEADER: self.place.key, wire.IDEMPOTENCY_HEADER: key}
        body = {"command": command, "timeout_s": 60}
        async with httpx.AsyncClient(timeout=120, trust_env=False) as raw:
            while True:
                try:
                    got = await raw.post(url, json=body, headers=headers)
                except httpx.TransportError:
                    self.tally.counted["exec_repeated"] += 1
                    await self._server_back()
                    continue
                if got.is_success:
                    return wire.ExecResult.model_validate_json(got.content).stdout.text.strip()
                raise from_failure(got.status_code, wire.Failed.model_validate_json(got.content).error)

    async def _session(self, client: Client) -> None:
        """A variable that counts what the shell ran."""
        self.step = "session"
        opened = await self._patiently(lambda: client.open_session(self.box, wire.OpenSession()))
        sure = unsure = 0
        for _ in range(self.random.randint(1, 4)):
            try:
                done = await client.run(
                    self.box, opened.name, wire.Run(command="n=$((n+1)); echo $n", timeout_s=60)
                )
            except SandboxError as error:
                if error.code != Code.UNREACHABLE:
                    raise
                unsure += 1
                await self._server_back()
                continue
            sure += 1
            self.tally.counted["session"] += 1
            if not sure <= int(done.stdout.text) <= sure + unsure:
                self._wrong(
                    f"after {sure} commands (and {unsure} unsure) the session counts {done.stdout.text}"
                )

    # --- judging ---

    def _compare(self, found: list[str]) -> None:
        ran = Counter(found)
        for mark in self._sure:
            if ran[mark] != 1:
                self._wrong(f"{mark} was answered and ran {ran[mark]} times")
        for mark in self._unsure:
            if ran[mark] > 1:
                self._wrong(f"{mark} ran {ran[mark]} times")
        if strange := set(ran) - {*self._sure, *self._unsure}:
            self._wrong(f"the sandbox holds what nobody wrote there: {sorted(strange)[:5]}")

    def _lost(self, error: SandboxError) -> None:
        """Only what was killed may be lost, and the answer must say what became of it."""
        self.tally.lost[f"{self.killed or 'nobody'}: {error.code}"] += 1
        if not self.killed:
            self._wrong(f"{self.box} was lost at {self.step}, and nobody killed it: {error.code}: {error}")
        elif error.code not in LOST:
            self._wrong(f"{self.box}, whose {self.killed} was killed, answers {error.code}: {error}")

    async def _seen_dead(self, client: Client) -> None:
        self.step = "seen dead"
        for _ in range(int(DEAD_S / 0.1)):
            try:
                record = await self._patiently(lambda: client.get(self.box))
            except NotFound:
                return self._wrong(f"{self.box}, whose {self.killed} was killed, is not known any more")
            if record.state == "dead":
                return None if record.reason else self._wrong(f"{self.box} is dead without a reason")
            await asyncio.sleep(0.1)
        return self._wrong(f"{self.box} is said to be {record.state}, and its {self.killed} was killed")

    def _wrong(self, line: str) -> None:
        self.tally.problems.append(f"cycle {self.number}: {line}")

    # --- a server that may be away ---

    async def _patiently(self, call: Callable[[], Awaitable[T]]) -> T:
        """What does no harm when it is repeated, until somebody answers."""
        while True:
            try:
                return await call()
            except SandboxError as error:
                if error.code != Code.UNREACHABLE:
                    raise
            await self._server_back()

    async def _server_back(self) -> None:
        await asyncio.sleep(0.05)  # whoever killed it says so at once, but later than we see it
        async with asyncio.timeout(BACK_S):
            await self.place.up.wait()
