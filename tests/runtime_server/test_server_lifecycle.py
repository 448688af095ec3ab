"""Snapshots, forks, pauses, warm containers, promised creates: against a real server and real Podman."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest
from serverkit import KEY, ThreadedSandboxes, run_server, until

from orchestrator.schema import Runtime, Sandbox
from runtime_server.client import Client
from runtime_server.errors import SandboxError
from runtime_server.wire import Code, CreateSandbox, Exec, Limits
from runtime_server.wire_lifecycle import Fork

pytestmark = pytest.mark.container

Served = tuple[str, ThreadedSandboxes]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with run_server(Runtime(max_parallel_sandboxes=6, sandbox=Sandbox(ttl=300))) as running:
        yield running


@pytest.fixture
async def client(served: Served) -> AsyncIterator[Client]:
    async with Client(served[0], KEY) as client:
        yield client
        await client.prefetch({})
        for box in (await client.list()).sandboxes:
            await client.delete(box.id)
        for snapshot in await client.snapshots():
            await client.delete_snapshot(snapshot.id)
        await until(lambda: served[1].places.free == 6)


async def _says(client: Client, sandbox: str, command: str) -> str:
    done = await client.exec(sandbox, Exec(command=command, timeout_s=20))
    return done.stdout.text.strip() + done.stderr.text.strip()


PREPARE = "mkdir -p /data && echo one > /data/a && rm /etc/issue && echo new > /etc/motd && { sleep 300 & }"


async def test_a_fork_has_the_files_and_not_the_processes(client: Client) -> None:
    source = await client.create(CreateSandbox(workdir="/data", env={"WHO": "source"}, labels={"task": "7"}))
    await _says(client, source.id, PREPARE)
    await _says(client, source.id, "ln -s a /data/b; chown 5:6 /data/a; chmod 600 /data/a; mv /usr/games /g")
    forked = await client.fork(source.id, 3)
    ids = [box.id for box in forked.sandboxes]
    assert len(ids) == 3 and all(box.labels == {"task": "7"} for box in forked.sandboxes)
    said = await asyncio.gather(
        *(
            _says(
                client, one, "pwd; cat b /etc/motd; stat -c %u:%g:%a a; ls /etc/issue; echo $WHO; pgrep sleep"
            )
            for one in ids
        )
    )
    missing = "ls: cannot access '/etc/issue': No such file or directory"
    assert set(said) == {f"/data\none\nnew\n5:6:600\nsource{missing}"}
    await _says(client, ids[0], "echo mine > /data/a; rm /etc/motd")
    for other in (source.id, ids[1]):
        assert await _says(client, other, "cat /data/a /etc/motd") == "one\nnew"
    assert await _says(client, source.id, "pgrep -c sleep") == "1"


async def test_forks_of_forks(client: Client) -> None:
    first = await client.create()
    await _says(client, first.id, "echo 1 >> /chain")
    for number in (2, 3):
        (second,) = (await client.fork(first.id)).sandboxes
        await client.delete(first.id)
        await _says(client, second.id, f"echo {number} >> /chain")
        first = second
    assert await _says(client, first.id, "cat /chain") == "1\n2\n3"


async def test_a_snapshot_outlives_its_source(client: Client, served: Served) -> None:
    source = await client.create(CreateSandbox(limits=Limits(memory_mb=256)))
    await _says(client, source.id, "echo kept > /kept")
    taken = await client.snapshot(source.id, ttl_s=100, labels={"a": "b"})
    again = await client.snapshot(source.id)
    assert taken.id == again.id and taken.labels == {"a": "b"}, "the same content is the same snapshot"
    await client.delete(source.id)
    made = await client.create(CreateSandbox(snapshot=taken.id))
    assert made.snapshot == taken.id and await _says(client, made.id, "cat /kept") == "kept"
    box = served[1].boxes[made.id]
    assert box.recipe.memory_mb == 256 and (await client.get_snapshot(taken.id)).sandboxes == 1
    folder = served[1].snapshots.get(taken.id).path
    await client.delete_snapshot(taken.id)
    with pytest.raises(SandboxError) as gone:
        await client.create(CreateSandbox(snapshot=taken.id))
    assert gone.value.code == Code.SNAPSHOT_NOT_FOUND
    assert folder.exists() and await _says(client, made.id, "cat /kept") == "kept"
    await client.delete(made.id)
    await until(lambda: not folder.exists())


async def test_a_snapshot_expires(client: Client, served: Served) -> None:
    source = await client.create()
    taken = await client.snapshot(source.id, ttl_s=0.2)
    await until(lambda: not served[1].snapshots.kept)
    with pytest.raises(SandboxError) as gone:
        await client.get_snapshot(taken.id)
    assert gone.value.code == Code.SNAPSHOT_NOT_FOUND


async def test_all_forks_or_none(client: Client, served: Served) -> None:
    source = await client.create()
    with pytest.raises(SandboxError) as never:
        await client.fork(source.id, 7)
    assert never.value.code == Code.BAD_REQUEST
    with pytest.raises(SandboxError) as late:
        await client.fork(source.id, 6, Fork(queue_timeout_s=0.1))
    assert late.value.code == Code.QUEUE_TIMEOUT
    assert len((await client.list()).sandboxes) == 1 and served[1].places.free == 5


async def test_a_paused_sandbox_stands_still(client: Client) -> None:
    made = await client.create()
    count = "i=0; while :; do i=$((i+1)); echo $i > /tmp/n.new; mv /tmp/n.new /tmp/n; done"
    running = asyncio.create_task(client.exec(made.id, Exec(command=count, timeout_s=60)))
    while not (await client.exec(made.id, Exec(command="cat /tmp/n"))).stdout.text:
        assert not running.done()
    assert (await client.pause(made.id)).state == "paused"
    assert (await client.pause(made.id)).state == (await client.get(made.id)).state == "paused"
    with pytest.raises(SandboxError) as refused:
        await client.exec(made.id, Exec(command="true"))
    assert refused.value.code == Code.PAUSED and refused.value.infrastructure
    taken = [(await client.snapshot(made.id)).id for _ in range(2)]
    assert taken[0] == taken[1], "nothing changes while it is paused"
    assert (await client.resume(made.id)).state == "running"
    before = int(await _says(client, made.id, "cat /tmp/n"))
    while int(await _says(client, made.id, "cat /tmp/n")) <= before:
        assert not running.done()
    await client.pause(made.id)
    await client.delete(made.id)  # also one that stands still
    with pytest.raises(SandboxError):
        await running


async def test_a_warm_container_fits_any_request(client: Client, served: Served) -> None:
    image = (await client.capabilities()).default_image
    told = await client.prefetch({image: 2, "localhost/no/such:1": 1})
    assert told.images[image] == "here" and "not here" in told.images["localhost/no/such:1"]
    await until(lambda: len(served[1].pool.ready) == 3)
    room = await client.capacity()
    assert room.warm[image] == 2 and room.warm_total == 3 and room.places == 6 and room.in_use == 0
    waiting = {warm.container.id for warm in served[1].pool.ready}
    made = await client.create(CreateSandbox(env={"A": "1"}, workdir="/some/where"))
    assert served[1].boxes[made.id].container.id in waiting
    assert (
        await _says(client, made.id, "echo $A $HOME; pwd; hostname; id -u")
        == "1 /root\n/some/where\nsandbox\n0"
    )
    cold = await client.create(CreateSandbox(limits=Limits(memory_mb=128)))
    assert served[1].boxes[cold.id].container.id not in waiting
    assert await _says(client, cold.id, "env | sort | grep -v ^PWD") == await _says(
        client, made.id, "unset A; env | sort | grep -v ^PWD"
    )
    await client.prefetch({})
    await until(lambda: not served[1].pool.ready)


async def test_warm_containers_give_way_to_sandboxes(client: Client, served: Served) -> None:
    image = (await client.capabilities()).default_image
    assert (await client.prefetch({image: 100})).wanted == 6
    await until(lambda: len(served[1].pool.ready) == 6)
    made = await asyncio.gather(*(client.create() for _ in range(6)))
    assert len({box.id for box in made}) == 6
    await until(lambda: not served[1].pool.ready)


async def test_a_create_that_does_not_wait_is_promised(client: Client, served: Served) -> None:
    held = await asyncio.gather(*(client.create() for _ in range(6)))
    promised = await client.create(CreateSandbox(wait_s=0, labels={"x": "y"}), key="promise-1")
    assert promised.state == "queued" and promised.queue is not None and promised.queue.position == 1
    second = await client.create(CreateSandbox(wait_s=0.01))
    assert second.queue is not None and second.queue.position == 2
    assert {box.state for box in (await client.list()).sandboxes} == {"running", "queued"}
    with pytest.raises(SandboxError) as unready:
        await client.exec(promised.id, Exec(command="true"))
    assert unready.value.code == Code.NOT_READY and unready.value.infrastructure
    await client.delete(second.id)
    await client.delete(held[0].id)
    while (got := await client.get(promised.id)).state != "running":
        assert got.state in ("queued", "starting")
    assert got.labels == {"x": "y"} and await _says(client, promised.id, "echo hi") == "hi"
    assert (
        await client.create(CreateSandbox(wait_s=0, labels={"x": "y"}), key="promise-1")
    ).id == promised.id
    await client.delete(promised.id)
    for nobody in (second, promised):
        with pytest.raises(SandboxError) as forgotten:
            await client.exec(nobody.id, Exec(command="true"))
        assert forgotten.value.code == Code.SANDBOX_NOT_FOUND


async def test_what_became_of_a_promise_that_failed(client: Client) -> None:
    await asyncio.gather(*(client.create() for _ in range(6)))
    promised = await client.create(CreateSandbox(wait_s=0, queue_timeout_s=0.1))
    while (got := await client.get(promised.id)).state != "dead":
        assert got.state == "queued"
    assert got.reason == Code.QUEUE_TIMEOUT and "runtime.max_parallel_sandboxes" in got.message


async def test_a_group_comes_in_together(client: Client, served: Served) -> None:
    held = [await client.create() for _ in range(5)]
    group = [
        asyncio.create_task(client.create(CreateSandbox(group="g", group_size=2, labels={"g": str(n)})))
        for n in range(2)
    ]
    await until(lambda: served[1].places.waiting == 2)
    await client.delete(held[0].id)
    made = await asyncio.gather(*group)
    assert {box.state for box in made} == {"running"}


async def test_setup_commands_come_first(client: Client, served: Served) -> None:
    made = await client.create(CreateSandbox(setup=["mkdir /x", "echo ready > /x/y"]))
    assert await _says(client, made.id, "cat /x/y") == "ready"
    with pytest.raises(SandboxError) as failed:
        await client.create(CreateSandbox(setup=["echo it is broken >&2; exit 3"]))
    assert failed.value.code == Code.CREATE_FAILED and "it is broken" in str(failed.value)
    await until(lambda: served[1].places.free == 5)


async def test_a_lifetime_ends_whatever_happens(client: Client) -> None:
    made = await client.create(CreateSandbox(max_lifetime_s=0.7, ttl_s=100))
    assert made.ends_at is not None and made.ends_at - made.created_at <= 1
    with pytest.raises(SandboxError) as over:
        await client.exec(made.id, Exec(command="sleep 60"))
    assert over.value.code == Code.EXPIRED


async def test_a_full_disk_is_said_as_such(client: Client) -> None:
    made = await client.create()
    with pytest.raises(SandboxError) as full:
        await client.write_file(made.id, "/dev/shm/x", b"x" * (65 << 20))
    assert full.value.code == Code.DISK_FULL and not full.value.infrastructure
