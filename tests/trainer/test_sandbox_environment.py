"""Who is to blame for what a sandbox service says, and that nothing is left behind.

The service here is an object in this process that keeps its sandboxes in dictionaries;
test_sandbox_real.py has the same environment against the real server.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from runtime_server.errors import (
    BadRequest,
    Gone,
    Internal,
    NotFound,
    SandboxError,
    TooLarge,
    Unauthorized,
    Unavailable,
)
from runtime_server.wire import Code, CreateSandbox, Exec, ExecResult, Sandbox, Stream
from trainer.environments.address import Address
from trainer.environments.sandbox import SandboxEnvironment
from trainer.errors import Broken, EnvironmentFailure, Lost, Refused
from trainer.tasks import Setup, Task, Verify

TASK = Task(
    "t", "$ ", Verify("check", {"test.py": "1"}, 5.0), Setup({"hint.txt": "7"}, ["prepare"]), workdir="/w"
)


class Service:
    """Sandboxes in memory. `fail` gets each call's name and may raise; commands are answered by `say`."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.commands: list[object] = []
        self.fail: Callable[[str], None] = lambda call: None
        self.say: Callable[[object], ExecResult] = lambda command: ExecResult(exit_code=0)
        self.hold: asyncio.Event | None = None
        self.closed = 0

    async def create(self, request: CreateSandbox) -> Sandbox:
        self.fail("create")
        if self.hold:
            await self.hold.wait()
        name = f"sandbox-{len(self.files)}"
        self.files[name] = {}
        return Sandbox(
            id=name, image="i", state="running", workdir=request.workdir or "/", created_at=0, expires_at=1
        )

    async def exec(self, sandbox: str, request: Exec) -> ExecResult:
        await asyncio.sleep(0)
        self.fail(str(request.command))
        self.commands.append(request.command)
        return self.say(request.command)

    async def kill(self, sandbox: str) -> None:
        self.fail("kill")
        self.commands.append("kill")

    async def write_file(self, sandbox: str, path: str, data: bytes, mode: int = 0o644) -> object:
        self.fail(path)
        self.files[sandbox][path] = data
        return None

    async def delete(self, sandbox: str) -> None:
        del self.files[sandbox]
        self.fail("delete")

    async def capabilities(self) -> object:
        self.fail("capabilities")
        return None

    async def close(self) -> None:
        self.closed += 1


def environment(service: Service) -> SandboxEnvironment:
    return SandboxEnvironment(lambda: Address("http://a", "k"), lambda address: service)


def failing(call: str, error: SandboxError) -> Service:
    def fail(name: str) -> None:
        if name == call:
            raise error

    service = Service()
    service.fail = fail
    return service


async def episode(service: Service) -> float:
    world = environment(service)
    try:
        async with world.open(TASK) as workspace:
            await workspace.run("act", 5, 100)
            return (await workspace.verify()).reward
    finally:
        await world.close()
        assert not service.files, "a sandbox was left"


async def test_an_episode_sets_up_acts_and_is_judged() -> None:
    service, seen = Service(), []
    service.say = lambda command: (seen.append(set(service.files["sandbox-0"])), ExecResult(exit_code=0))[1]
    assert await episode(service) == 1
    assert service.commands == ["prepare", "act", "kill", "check"]
    assert seen == [{"/w/hint.txt"}, {"/w/hint.txt"}, {"/w/hint.txt", "/w/test.py"}]


async def test_a_result_is_stdout_then_stderr_and_a_failing_test_earns_nothing() -> None:
    service = Service()
    service.say = lambda command: ExecResult(
        exit_code=0 if command == "prepare" else 124,
        timed_out=command != "prepare",
        stdout=Stream.of(b"\xffout"),
        stderr=Stream.of(b"err"),
    )
    async with environment(service).open(TASK) as workspace:
        result = await workspace.run("act", 5, 100)
        assert (result.output, result.exit_code, result.timed_out) == (b"\xffouterr", 124, True)
        verdict = await workspace.verify()
    assert verdict.reward == 0 and "ran out of time" in verdict.reason


@pytest.mark.parametrize(
    ("call", "error", "kind"),
    [
        ("create", Unavailable("x"), Lost),
        ("create", Unavailable("x", Code.QUEUE_TIMEOUT), Lost),
        ("create", Internal("x", Code.CREATE_FAILED), Lost),
        ("create", NotFound("x", Code.IMAGE_MISSING), Lost),
        ("create", Unauthorized("x"), Refused),
        ("create", BadRequest("x"), Refused),
        ("/w/hint.txt", Gone("x"), Lost),  # the policy has not acted yet
        ("prepare", Gone("x", Code.OOM), Lost),
        ("act", Unavailable("x"), Lost),
        ("act", Gone("x", Code.EXPIRED), Lost),
        ("act", NotFound("x", Code.SANDBOX_NOT_FOUND), Lost),  # the server forgot it
        ("act", Gone("x"), Lost),
        ("act", Gone("x", Code.OOM), Broken),
        ("check", Gone("x"), Lost),
        ("check", Gone("x", Code.OOM), Broken),
        ("check", Internal("x"), Lost),
        ("/w/test.py", Unavailable("x"), Lost),
    ],
)
async def test_blame(call: str, error: SandboxError, kind: type[EnvironmentFailure]) -> None:
    with pytest.raises(kind) as caught:
        await episode(failing(call, error))
    assert type(caught.value) is kind and str(error.code) in str(caught.value)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("act", BadRequest("argument list too long")),
        ("/w/test.py", BadRequest("is a directory", Code.FILE_ERROR)),
    ],
)
async def test_what_the_policy_makes_impossible_is_a_result(call: str, error: SandboxError) -> None:
    await episode(failing(call, error))


@pytest.mark.parametrize("code", [Code.FILE_ERROR, Code.FILE_NOT_FOUND, Code.BAD_REQUEST])
async def test_a_policy_that_removes_its_directory_is_scored(code: Code) -> None:
    service = Service()

    def fail(name: str) -> None:
        if name in ("act", "check"):
            raise BadRequest("no such directory", code)

    service.fail = fail
    assert await episode(service) == 0


async def test_a_command_line_that_is_too_large_is_a_result() -> None:
    async with environment(failing("act", TooLarge("too large"))).open(TASK) as workspace:
        assert (await workspace.run("act", 5, 100)).exit_code == 126


async def test_a_setup_command_that_fails_says_what_it_said() -> None:
    service = Service()
    service.say = lambda command: ExecResult(exit_code=3, stderr=Stream.of(b"no such thing"))
    with pytest.raises(Lost, match="'prepare' ended with 3: no such thing"):
        await episode(service)


async def test_a_sandbox_that_comes_after_its_episode_was_cancelled_is_removed() -> None:
    service = Service()
    service.hold = asyncio.Event()
    world, entered = environment(service), asyncio.Event()

    async def play() -> None:
        entered.set()
        async with world.open(TASK):
            raise AssertionError

    playing = asyncio.create_task(play())
    await entered.wait()
    await asyncio.sleep(0)  # into create
    playing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await playing
    service.hold.set()
    await world.close()
    assert not service.files and service.closed == 1


async def test_a_delete_that_fails_fails_nothing() -> None:
    assert await episode(failing("delete", Unavailable("gone"))) == 1


async def test_a_server_that_came_back_elsewhere_is_found() -> None:
    addresses = iter([Address("http://a", "1"), Address("http://a", "1"), Address("http://b", "2")])
    connected: list[Address] = []
    service = Service()

    def connect(address: Address) -> Service:
        connected.append(address)
        return service

    world = SandboxEnvironment(lambda: next(addresses), connect)
    for _ in range(3):
        async with world.open(TASK):
            pass
    await world.close()
    assert [address.url for address in connected] == ["http://a", "http://b"] and service.closed == 2


async def test_a_sandbox_that_the_next_life_took_over_is_removed_there() -> None:
    """The old one is gone when the episode ends; the new one has its sandboxes."""
    old, new = failing("delete", Unavailable("gone")), Service()
    where = {"url": "http://old"}
    world = SandboxEnvironment(
        lambda: Address(where["url"], "k"), lambda address: old if address.url == "http://old" else new
    )
    async with world.open(TASK):
        new.files["sandbox-0"] = {}
        where["url"] = "http://new"
    await asyncio.gather(*world._leaving)
    assert not new.files
    await world.close()


async def test_waiting_for_a_server_ends_and_says_why() -> None:
    with pytest.raises(Lost, match="within 0 s"):
        await environment(failing("capabilities", Unavailable("refused"))).wait_ready(0)
    with pytest.raises(Refused):
        await environment(failing("capabilities", Unauthorized("wrong key"))).wait_ready(60)
    await environment(Service()).wait_ready(0)


async def test_a_key_that_is_not_yet_the_servers_own_is_no_reason_to_stop() -> None:
    """A server that moves publishes address and key one after the other."""
    service = failing("capabilities", Unauthorized("x"))
    moving = SandboxEnvironment(lambda: Address("http://a", "k"), lambda address: service, moving_s=60)
    with pytest.raises(Lost, match="may be moving"):
        await moving.wait_ready(0)
    assert await moving.life() is None
    service.fail = lambda name: None
    assert await moving.life() == Address("http://a", "k")
    still = SandboxEnvironment(
        lambda: Address("http://a", "k"), lambda address: failing("create", Unauthorized("x"))
    )
    with pytest.raises(Refused):
        async with still.open(TASK):
            pass
