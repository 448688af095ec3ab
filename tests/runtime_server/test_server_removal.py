"""What could not be removed at first is removed later; what is over is not remembered for ever."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from serverkit import until

from orchestrator.schema import Runtime
from runtime_server import wire
from runtime_server.agent import AgentConnection
from runtime_server.app import default_sandboxes
from runtime_server.births import KEYS_KEPT, Birth, Births
from runtime_server.box import Box
from runtime_server.engines import Container, Image, Recipe, processes
from runtime_server.engines.podman import PodmanEngine
from runtime_server.errors import BadRequest, Internal, NotFound, SandboxError
from runtime_server.making import Basis
from runtime_server.places import Places
from runtime_server.removal import Remover
from runtime_server.sandboxes import Sandboxes
from runtime_server.wire import Code

C, IO = Container("c", 1), Path("/io")
SHORT = (0.001, 0.001, 0.001)


class Stubborn:
    """An engine whose service is away for some calls."""

    def __init__(self, failures: int) -> None:
        self.failures, self.killed, self.removed = failures, 0, 0

    async def kill(self, _: object) -> None:
        self.killed += 1

    async def remove(self, _: object, __: Path) -> None:
        if self.failures:
            self.failures -= 1
            raise Internal("Podman does not answer")
        self.removed += 1


class Tasks:
    """What goes on in the background."""

    def __init__(self) -> None:
        self.all: list[asyncio.Task[None]] = []

    def add(self, work: Coroutine[Any, Any, None]) -> None:
        self.all.append(asyncio.create_task(work))


async def test_removed_as_soon_as_it_can_be(caplog: pytest.LogCaptureFixture) -> None:
    engine: Any = Stubborn(2)
    assert await Remover(engine, asyncio.Semaphore(1), Tasks().add, SHORT).now("s-1", C, IO)
    assert (engine.killed, engine.removed) == (2, 1)
    assert "s-1 is not removed yet: Podman does not answer" in caplog.text


async def test_given_up_in_the_end_and_said(caplog: pytest.LogCaptureFixture) -> None:
    engine: Any = Stubborn(9)
    assert not await Remover(engine, asyncio.Semaphore(1), Tasks().add, SHORT).now("s-1", C, IO)
    assert "could not be removed" in caplog.text


async def test_who_undoes_a_create_is_not_held_up_by_what_cannot_be_removed_yet() -> None:
    engine: Any = Stubborn(2)
    starts, tasks = asyncio.Semaphore(1), Tasks()
    async with starts, asyncio.timeout(5):  # held by the create that failed
        await Remover(engine, starts, tasks.add, SHORT).soon("c-1", C, IO)
        assert engine.removed == 0
    await asyncio.gather(*tasks.all)
    assert (engine.killed, engine.removed) == (3, 1)


async def test_keys_of_what_is_over_are_forgotten_those_of_the_living_never() -> None:
    births, ticket, request = Births(), Places(1).seat(), wire.CreateSandbox()
    record = wire.Sandbox(
        id="", image="i", state="dead", workdir="/", labels={}, created_at=0, expires_at=0, reason="deleted"
    )
    for number in range(3 * KEYS_KEPT):
        birth = Birth(request, "image", ticket, key=f"key-{number}")
        birth.task = asyncio.get_running_loop().create_future()
        told = record.model_copy(update={"id": birth.id})
        box: Any = SimpleNamespace(id=birth.id, key=birth.key, record=lambda told=told: told)
        birth.task.set_result(box)
        births.remember(birth)
        if number % 10:
            births.over(box)
    assert all(births.known(f"key-{number}", request) for number in range(0, 3 * KEYS_KEPT, 10))
    last = births.known(f"key-{3 * KEYS_KEPT - 1}", request)
    assert isinstance(last, wire.Sandbox) and (last.id, last.reason) == (told.id, "deleted")
    with pytest.raises(BadRequest, match="another request"):
        births.known(f"key-{3 * KEYS_KEPT - 1}", wire.CreateSandbox(image="other"))
    assert births.known("key-1", request) is None
    assert len(births._past) == KEYS_KEPT


@pytest.mark.container
async def test_of_a_deleted_sandbox_nothing_is_held_but_its_record(boxes: Sandboxes) -> None:
    """Neither its agent and buffers, nor files of the kernel."""

    def held() -> int:
        gc.collect()
        # `type`, not `isinstance`: that one asks the objects, and deprecated ones of libraries warn then.
        return sum(type(one) in (Box, AgentConnection) for one in gc.get_objects())

    before = held()
    for number in range(4):
        made = await boxes.create(wire.CreateSandbox(), key=f"key-{number}")
        await boxes.exec(made.id, wire.Exec(command="true"))
        await boxes.delete(made.id)
    await until(lambda: held() <= before, 20)
    again = await boxes.create(wire.CreateSandbox(), key="key-3")
    assert (again.id, again.state, again.reason) == (made.id, "dead", "deleted")


@pytest.mark.container
async def test_of_a_dead_sandbox_no_file_is_held_open(boxes: Sandboxes) -> None:
    files = Path("/proc/self/fd")
    before = len([*files.iterdir()])
    for _ in range(4):
        made = await boxes.create(wire.CreateSandbox())
        await boxes.exec(made.id, wire.Exec(command="true"))
        processes.send(boxes.get(made.id).container.pid)
    assert len(boxes.boxes) == 4
    await until(lambda: not boxes.live and not left(engine_of(boxes)), 20)
    assert len([*files.iterdir()]) < before + 4  # connections to Podman: not one file for each sandbox


@pytest.mark.container
async def test_one_key_is_one_sandbox_also_while_its_image_is_looked_up(boxes: Sandboxes) -> None:
    engine_of(boxes)._images._known.clear()
    one, two = await asyncio.gather(*(boxes.create(wire.CreateSandbox(), key="key") for _ in range(2)))
    assert one.id == two.id and len(boxes.boxes) == 1


@pytest.fixture
async def boxes() -> AsyncIterator[Sandboxes]:
    boxes = default_sandboxes(Runtime(max_parallel_sandboxes=4))
    await boxes.start()
    yield boxes
    await boxes.stop()


def engine_of(boxes: Sandboxes) -> PodmanEngine:
    assert isinstance(boxes.engine, PodmanEngine)
    return boxes.engine


def left(engine: PodmanEngine) -> list[str]:
    folders = (engine.state.io, engine.state.layers, engine.state.frozen, engine.state.oci)
    return [str(path) for folder in folders for path in folder.iterdir()]


async def idle(engine: PodmanEngine) -> None:
    """Nothing of any container is left, in Podman either."""
    await until(lambda: not left(engine), 30)
    assert await engine._api.json("GET", "/containers/json", params={"all": True}) == []


@pytest.mark.container
async def test_a_layer_goes_with_its_container_whose_dressing_failed(boxes: Sandboxes) -> None:
    """The helper was stopped with its service, so that it could neither finish nor tidy up."""
    engine = engine_of(boxes)
    recipe = boxes.maker.recipe(wire.CreateSandbox(), Basis(await engine.image(boxes.config.sandbox.image)))
    warm = await boxes.maker.start(recipe, empty=True)
    (engine.state.layers / warm.container.id[:16] / "u").mkdir(parents=True)
    await boxes.maker.undo(warm)
    await idle(engine)


@pytest.mark.container
async def test_creates_and_forks_go_on_while_podmans_service_is_started_again(boxes: Sandboxes) -> None:
    engine, box = engine_of(boxes), await boxes.create(wire.CreateSandbox())
    before, links = await engine._roots.helpers(), {path.readlink() for path in engine.state.links.iterdir()}
    freezing = asyncio.create_task(boxes.snapshots.take(boxes.get(box.id), None, {}))
    await asyncio.sleep(0)
    for pid in processes.services(engine.state.token):
        processes.send(pid)
        processes.gone(pid, 10)
    overlay = engine.state.graphroot / "overlay"
    known = {path.name for path in overlay.iterdir()}
    half = engine.state.graphroot / "overlay-layers" / ".tmp-layers.json1"
    half.write_text("{")
    (overlay / ("a" * 64) / "diff").mkdir(parents=True)
    (overlay / "l" / "LOST").symlink_to(f"../{'a' * 64}/diff")
    assert await engine._revive()
    assert not half.exists() and {path.name for path in overlay.iterdir()} == known
    assert all(link.exists() for link in (overlay / "l").iterdir())
    assert (await engine._roots.helpers()) is not before
    snapshot = await freezing
    fork = await boxes.create(wire.CreateSandbox(snapshot=snapshot.id))
    for one in (box, fork):
        await boxes.delete(one.id)
    await boxes.ledger.snapshot_over(snapshot)
    await idle(engine)
    assert links == {path.readlink() for path in engine.state.links.iterdir()}


@pytest.mark.container
@pytest.mark.filterwarnings("ignore:.*UDSSocket:pytest.PytestUnraisableExceptionWarning")
async def test_an_image_is_found_in_the_moment_in_which_the_service_is_killed(boxes: Sandboxes) -> None:
    """And that it once was not is not believed for long."""
    engine = engine_of(boxes)
    engine._images._known.clear()
    for pid in processes.services(engine.state.token):
        processes.send(pid)
        processes.gone(pid, 10)
    assert (await boxes.create(wire.CreateSandbox())).state == "running"
    engine._images._known.clear()
    engine._api.disconnect()
    with pytest.raises(Internal):
        await boxes.create(wire.CreateSandbox())
    engine._api.connect(engine.state.socket)
    assert (await boxes.create(wire.CreateSandbox())).state == "running"
    gc.collect()  # the podman package leaves a socket that was refused to the collector


@pytest.mark.container
async def test_helpers_that_could_not_be_started_are_when_they_are_needed(boxes: Sandboxes) -> None:
    engine = engine_of(boxes)
    await engine._roots.start(engine.state, 1 << 22)  # a service that has died again
    assert (await boxes.create(wire.CreateSandbox())).state == "running"  # Podman alone can do it
    assert engine._service is not None
    engine._roots._where = engine.state, engine._service.pid
    made = boxes.get((await boxes.create(wire.CreateSandbox())).id)
    assert made.container.layer is not None


@pytest.mark.container
async def test_a_create_that_is_given_up_in_the_middle_leaves_no_container(boxes: Sandboxes) -> None:
    engine = engine_of(boxes)
    for _ in range(6):
        making = asyncio.create_task(boxes.create(wire.CreateSandbox()))
        await until(lambda: any(engine.state.io.iterdir()))
        making.cancel()
        await asyncio.gather(making, return_exceptions=True)
    await idle(engine)


@pytest.mark.container
async def test_what_podman_does_not_have_has_its_own_code(boxes: Sandboxes) -> None:
    engine = engine_of(boxes)
    with pytest.raises(NotFound) as failed:
        await engine._api.call("GET", "/containers/nobody/json")
    assert failed.value.code == Code.NOT_FOUND
    with pytest.raises(NotFound) as failed:
        await engine.create(Recipe(name="c-none", image="localhost/none:none", io=engine.new_io("c-none")))
    assert failed.value.code == Code.IMAGE_MISSING
    await engine.remove(Container("c-none", 0), engine.state.io / "c-none")
    with pytest.raises(SandboxError) as gone:
        await boxes.maker.start(
            boxes.maker.recipe(wire.CreateSandbox(), Basis(Image("none", "", "/"))), empty=False
        )
    assert gone.value.code == Code.IMAGE_MISSING
    await idle(engine)
