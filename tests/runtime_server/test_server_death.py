"""What calls answer whose sandbox dies beneath them: that it died, whatever else has ended with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from orchestrator.schema import Runtime
from runtime_server import wire
from runtime_server.app import default_sandboxes
from runtime_server.box import Box
from runtime_server.engines import processes
from runtime_server.engines.podman import PodmanEngine
from runtime_server.errors import Gone, SandboxError
from runtime_server.output import Event, follow
from runtime_server.running import Processes, Program, Running
from runtime_server.sandboxes import Sandboxes
from runtime_server.session import OpenSession
from runtime_server.sessions import Sessions, Shells
from runtime_server.wire import Code

pytestmark = pytest.mark.container
ABC = wire.Input(data="abc\n")
SIZE = wire.Terminal(columns=80, rows=24)


@dataclass
class Scene:
    """A sandbox in which a session runs a command that was left, and a process reads."""

    boxes: Sandboxes
    box: Box
    shells: Sessions
    session: OpenSession
    processes: Processes
    program: Program


@pytest.fixture
async def boxes() -> AsyncIterator[Sandboxes]:
    """A server's sandboxes in this event loop."""
    boxes = default_sandboxes(Runtime(max_parallel_sandboxes=40))
    await boxes.start()
    yield boxes
    await boxes.stop()


async def scene(boxes: Sandboxes, left: str = "read x") -> Scene:
    box = boxes.get((await boxes.create(wire.CreateSandbox())).id)
    shells, processes = await Shells(boxes).of(box.id), await Running(boxes).of(box.id)
    session = shells.get((await shells.open(wire.OpenSession())).name)
    if left:
        run = wire.Run(command=left, stdin=True, timeout_s=0.01, on_timeout="leave")
        assert (await session.run(run)).running
    record = await processes.start(wire.StartProcess(command="cat", stdin=True))
    return Scene(boxes, box, shells, session, processes, processes.get(record.number))


async def podman_kill(boxes: Sandboxes, box: Box) -> None:
    """As an operator would, with `podman kill`."""
    assert isinstance(boxes.engine, PodmanEngine)
    transport = httpx.AsyncHTTPTransport(uds=str(boxes.engine.state.socket))
    async with httpx.AsyncClient(transport=transport, timeout=60) as podman:
        url = f"http://podman/v4.0.0/libpod/containers/{box.container.id}/kill"
        (await podman.post(url, params={"signal": "KILL"})).raise_for_status()


async def told(box: Box, events: AsyncGenerator[Event, None]) -> list[Event]:
    return [event async for event in follow(box, events)]


async def died(work: Awaitable[Any]) -> str:
    """What it answers: a code, or the answer itself."""
    try:
        answer = await work
    except SandboxError as error:
        return str(error.code)
    if isinstance(answer, list) and isinstance(answer[-1], wire.OutputError):
        return str(answer[-1].error.code)
    return repr(answer)


async def test_a_container_killed_under_a_session_command_and_all_else(boxes: Sandboxes) -> None:
    one = await scene(boxes, left="")
    box, run = one.box, wire.Run(command="echo begun; sleep 1000")
    work = [
        one.session.run(run),
        one.program.wait(1000),
        boxes.exec(box.id, wire.Exec(command="sleep 1000")),
        told(box, one.program.output("0", "both", True)),
    ]
    other = (await one.shells.open(wire.OpenSession(name="other"))).name
    work.append(told(box, one.shells.get(other).stream(run)))
    calls = [asyncio.create_task(died(call)) for call in work]
    async with asyncio.timeout(60):
        while not (one.session.busy and one.shells.get(other).busy and box.busy >= len(calls)):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await podman_kill(boxes, box)
        assert await asyncio.gather(*calls) == [Code.SANDBOX_DIED] * len(calls)
        assert await died(one.session.run(run)) == Code.SANDBOX_DIED
    assert box.reason == Code.SANDBOX_DIED


CALLS: dict[str, Callable[[Scene], Awaitable[Any]]] = {
    "run": lambda s: s.session.run(wire.Run(command="true")),
    "ready": lambda s: s.session.ready(),
    "stream": lambda s: told(s.box, s.session.stream(wire.Run(command="true"))),
    "rest": lambda s: s.session.rest(1),
    "interrupt": lambda s: s.session.interrupt(1),
    "feed": lambda s: s.session.feed(ABC),
    "resize": lambda s: s.session.resize(SIZE),
    "output": lambda s: told(s.box, s.session.output(None, "0", "both", True)),
    "sessions": lambda s: Shells(s.boxes).of(s.box.id),
    "open": lambda s: s.shells.open(wire.OpenSession()),
    "close": lambda s: s.shells.delete(s.session.name),
    "processes": lambda s: Running(s.boxes).of(s.box.id),
    "start": lambda s: s.processes.start(wire.StartProcess(command="true")),
    "wait": lambda s: s.program.wait(1),
    "input": lambda s: s.program.feed(ABC),
    "signal": lambda s: s.program.signal(15),
    "window": lambda s: s.program.resize(SIZE),
    "follow": lambda s: told(s.box, s.program.output("0", "both", True)),
    "end": lambda s: s.processes.delete(s.program.number),
    "exec": lambda s: s.boxes.exec(s.box.id, wire.Exec(command="true")),
    "kill": lambda s: s.box.kill(),
    "read": lambda s: s.box.read_file("/etc/passwd"),
    "write": lambda s: s.box.write_file("/tmp/x", b"x", 0o600),
    "pause": lambda s: s.boxes.pause(s.box.id),
    "resume": lambda s: s.boxes.resume(s.box.id),
    "renew": lambda s: s.boxes.renew(s.box.id, 60),
    "snapshot": lambda s: s.boxes.snapshots.take(s.box, None, {}),
}


async def test_calls_in_the_moment_in_which_nobody_has_looked_yet(boxes: Sandboxes) -> None:
    """The connection to the agent is gone, and what watches it has not been given its turn."""
    answers = {}
    for name, call in CALLS.items():
        one = await scene(boxes)
        processes.send(one.box.container.pid)
        async with asyncio.timeout(20):
            while not one.box.agent.closed:  # noqa: ASYNC110 - an event would come too late
                await asyncio.sleep(0)
            assert not one.box.reason, "the moment has passed"
            answers[name] = await died(call(one))
            await boxes.delete(one.box.id)
    assert answers == dict.fromkeys(CALLS, Code.SANDBOX_DIED)


async def test_input_that_waits_for_its_turn_while_the_sandbox_dies(boxes: Sandboxes) -> None:
    one = await scene(boxes)
    async with asyncio.timeout(20), one.program.typing, one.session.typing:
        calls = [asyncio.create_task(died(work)) for work in (one.program.feed(ABC), one.session.feed(ABC))]
        await asyncio.sleep(0)
        await podman_kill(boxes, one.box)
        await one.box.agent.wait_closed()
    async with asyncio.timeout(20):
        assert await asyncio.gather(*calls) == [Code.SANDBOX_DIED] * 2


async def test_a_shell_that_ends_by_itself_is_still_that(boxes: Sandboxes) -> None:
    one = await scene(boxes, left="")
    assert (await one.session.run(wire.Run(command="exit 3"))).ended
    with pytest.raises(Gone) as failed:
        await one.session.run(wire.Run(command="true"))
    assert (failed.value.code, failed.value.detail) == (Code.SESSION_ENDED, {"exit_code": 3})


async def test_a_shell_that_is_killed_between_two_commands(boxes: Sandboxes) -> None:
    """Whether its end is known here by then or on its way: that it has ended is what is said."""
    one = await scene(boxes, left="")
    for number in range(12):
        session = one.shells.get((await one.shells.open(wire.OpenSession())).name)
        pid = (await session.run(wire.Run(command="echo $$"))).stdout.text.strip()
        await boxes.exec(one.box.id, wire.Exec(command=f"(sleep 0.0{number % 4}; kill -9 {pid}) &"))
        with pytest.raises(Gone) as failed:
            async with asyncio.timeout(10):
                while True:
                    await session.run(wire.Run(command="true"))
        assert failed.value.code == Code.SESSION_ENDED
