"""The life of sandboxes: queue, expiry, repetition, death, and what the server says about itself."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator

import httpx
import pytest
from serverkit import KEY, run_server, until

from orchestrator.schema import Runtime
from runtime_server.app import Identity, create_app, default_sandboxes
from runtime_server.client import Client
from runtime_server.errors import BadRequest, Gone, NotFound, Unauthorized, Unavailable
from runtime_server.sandboxes import Sandboxes
from runtime_server.wire import Code, CreateSandbox, Exec, Limits

pytestmark = pytest.mark.container


@pytest.fixture(scope="module")
def small() -> Iterator[tuple[str, Sandboxes]]:
    """A server with two places, in this process."""
    config = Runtime(max_parallel_sandboxes=2, queue_timeout=30)
    with run_server(config) as running:
        yield running


@pytest.fixture
async def client(small: tuple[str, Sandboxes]) -> AsyncIterator[Client]:
    async with Client(small[0], KEY) as client:
        yield client
        for box in (await client.list()).sandboxes:
            await client.delete(box.id)


async def test_a_full_server_lets_wait(client: Client, small: tuple[str, Sandboxes]) -> None:
    first, _ = await client.create(), await client.create()
    waiting = asyncio.create_task(client.create())
    await until(lambda: small[1].places.waiting > 0)
    await client.delete(first.id)
    third = await waiting
    assert (await client.exec(third.id, Exec(command="echo yes"))).stdout.text == "yes\n"


async def test_waiting_has_a_limit(client: Client) -> None:
    await client.create()
    await client.create()
    with pytest.raises(Unavailable) as failed:
        await client.create(CreateSandbox(queue_timeout_s=0.2))
    assert failed.value.code == Code.QUEUE_TIMEOUT and failed.value.infrastructure


async def test_a_waiting_client_that_leaves_is_forgotten(
    client: Client, small: tuple[str, Sandboxes]
) -> None:
    first, second = await client.create(), await client.create()
    body, headers = "{}", {"X-API-Key": KEY, "Content-Type": "application/json"}
    with pytest.raises(httpx.ReadTimeout):
        async with httpx.AsyncClient(timeout=0.3) as raw:
            await raw.post(f"{small[0]}/v1/sandboxes", content=body, headers=headers)
    await until(lambda: not small[1].places.waiting)
    await client.delete(first.id)
    await client.delete(second.id)
    assert (await client.list()).sandboxes == []


async def test_the_same_key_gives_the_same_sandbox(client: Client) -> None:
    first, again = await asyncio.gather(client.create(key="k1"), client.create(key="k1"))
    assert first.id == again.id == (await client.create(key="k1")).id
    assert len((await client.list()).sandboxes) == 1
    with pytest.raises(BadRequest, match="another request"):
        await client.create(CreateSandbox(workdir="/other"), key="k1")


async def test_nobody_uses_it_so_it_expires(client: Client, small: tuple[str, Sandboxes]) -> None:
    made = await client.create(CreateSandbox(ttl_s=0.3))
    await until(lambda: bool(small[1].boxes[made.id].reason))
    assert (await client.get(made.id)).reason == Code.EXPIRED
    with pytest.raises(Gone) as failed:
        await client.exec(made.id, Exec(command="true"))
    assert failed.value.code == Code.EXPIRED and failed.value.infrastructure


async def test_use_and_renewal_keep_it(client: Client) -> None:
    made = await client.create(CreateSandbox(ttl_s=1.0))
    assert (await client.exec(made.id, Exec(command="sleep 1.5"))).ok
    renewed = await client.renew(made.id, 600)
    assert renewed.state == "running" and renewed.expires_at > time.time() + 500


async def test_deleting_twice_is_no_error_and_it_is_gone(client: Client) -> None:
    made = await client.create()
    await client.delete(made.id)
    await client.delete(made.id)
    with pytest.raises(NotFound):
        await client.get(made.id)


async def test_a_sandbox_whose_first_process_dies_says_so(
    client: Client, small: tuple[str, Sandboxes]
) -> None:
    made = await client.create()
    running = asyncio.create_task(client.exec(made.id, Exec(command="sleep 100")))
    box = small[1].boxes[made.id]
    await until(lambda: box.busy > 0)
    os.kill(box.container.pid, signal.SIGKILL)
    with pytest.raises(Gone) as failed:
        await running
    assert failed.value.code == Code.SANDBOX_DIED and not failed.value.infrastructure
    with pytest.raises(Gone):
        await client.exec(made.id, Exec(command="true"))
    assert (await client.get(made.id)).reason == Code.SANDBOX_DIED


async def test_workdir_env_labels_and_limits(client: Client) -> None:
    request = CreateSandbox(
        workdir="/made/for/this", env={"A": "1"}, labels={"x": "y"}, limits=Limits(pids=100, memory_mb=200)
    )
    made = await client.create(request)
    assert (made.workdir, made.labels) == ("/made/for/this", {"x": "y"})
    assert (await client.exec(made.id, Exec(command="pwd; echo $A"))).stdout.text == "/made/for/this\n1\n"
    assert (await client.list()).sandboxes[0].labels == {"x": "y"}


async def test_more_than_the_node_has_is_refused(client: Client) -> None:
    with pytest.raises(BadRequest, match="this node has"):
        await client.create(CreateSandbox(limits=Limits(cpus=10_000)))


async def test_an_image_that_is_not_there_is_said_at_once(client: Client) -> None:
    start = time.monotonic()
    with pytest.raises(NotFound) as failed:
        await client.create(CreateSandbox(image="localhost/no/such:1"))
    assert failed.value.code == Code.IMAGE_MISSING and "localhost/orchestrate/sandbox" in str(failed.value)
    assert time.monotonic() - start < 5


async def test_an_image_that_cannot_be_pulled_is_said_with_the_reason(client: Client) -> None:
    with pytest.raises(NotFound, match="could not be pulled") as failed:
        await client.create(CreateSandbox(image="127.0.0.1:1/no/such:1"))
    assert failed.value.code == Code.IMAGE_MISSING


async def test_capabilities_tell_what_holds(client: Client) -> None:
    found = await client.capabilities()
    assert found.engine == "podman" and found.storage_driver == "overlay" and found.max_sandboxes == 2
    assert found.default_image in found.images
    assert found.enforced["network_isolation"] and found.enforced["shm"] and found.enforced["disk"]


async def test_metrics_count(client: Client) -> None:
    made = await client.create()
    await client.exec(made.id, Exec(command="true"))
    text = await client.metrics()
    assert "sandbox_running 1.0" in text and "sandbox_exec_seconds_bucket" in text
    assert "sandbox_create_seconds_count" in text


@pytest.mark.parametrize(
    "route", ["/metrics", "/v1/sandboxes", "/v1/capabilities", "/nothing", "/openapi.json"]
)
async def test_every_route_needs_the_key(small: tuple[str, Sandboxes], route: str) -> None:
    async with httpx.AsyncClient(base_url=small[0]) as raw:
        assert (await raw.get(route)).status_code == 401
        assert (await raw.get(route, headers={"X-API-Key": "wrong"})).status_code == 401
        assert (await raw.get(route, headers={"Authorization": f"Bearer {KEY}"})).status_code in (200, 404)


async def test_health_says_more_to_those_who_have_the_key(small: tuple[str, Sandboxes]) -> None:
    async with httpx.AsyncClient(base_url=small[0]) as raw:
        assert (await raw.get("/health")).json() == {"status": "ok"}
        assert (await raw.get("/health", headers={"X-API-Key": "wrong"})).status_code == 401
        known = (await raw.get("/health", headers={"X-API-Key": KEY})).json()
        assert (known["run_id"], known["attempt"], known["nonce"]) == ("r1", 3, "n1")


async def test_a_wrong_key_is_unauthorized_for_the_client(small: tuple[str, Sandboxes]) -> None:
    async with Client(small[0], "x" * 40) as stranger:
        with pytest.raises(Unauthorized):
            await stranger.create()


async def test_what_makes_no_sense_is_refused_with_the_reason(small: tuple[str, Sandboxes]) -> None:
    headers = {"X-API-Key": KEY, "Content-Type": "application/json"}
    async with httpx.AsyncClient(base_url=small[0], headers=headers) as raw:
        unknown = await raw.post("/v1/sandboxes", json={"imag": "x"})
        broken = await raw.post("/v1/sandboxes", content="{")
    assert unknown.status_code == broken.status_code == 400
    assert "imag" in unknown.json()["error"]["message"]


@pytest.mark.parametrize("framing", [f"Content-Length: {1 << 40}", "Transfer-Encoding: chunked"])
async def test_a_body_that_is_too_large_is_not_read_to_its_end(
    small: tuple[str, Sandboxes], framing: str
) -> None:
    """Announced or not: the answer comes, and what was sent is not kept."""
    host, port = small[0].removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"POST /v1/sandboxes HTTP/1.1\r\nHost: x\r\nX-API-Key: {KEY}\r\n{framing}\r\n\r\n"
    writer.write(head.encode())
    chunk = b"100000\r\n" + b"x" * (1 << 20) + b"\r\n"
    answer = asyncio.create_task(reader.readline())
    for _ in range(80 if "chunked" in framing else 0):
        if answer.done():
            break
        writer.write(chunk)
        await writer.drain()
    assert b" 413 " in await asyncio.wait_for(answer, 20)
    writer.close()


async def test_unreachable_is_said_as_such() -> None:
    async with Client("http://127.0.0.1:9", "k" * 20, tries=1) as nobody:
        with pytest.raises(Unavailable) as failed:
            await nobody.create()
    assert failed.value.code == Code.UNREACHABLE and failed.value.infrastructure


async def test_draining_refuses_new_work_and_lets_the_old_end() -> None:
    config = Runtime(max_parallel_sandboxes=2)
    with run_server(config) as (url, boxes):
        async with Client(url, KEY) as client:
            made = await client.create()
            running = asyncio.create_task(client.exec(made.id, Exec(command="sleep 1; echo done")))
            await until(lambda: boxes.boxes[made.id].busy > 0)
            loop = boxes.loop
            draining = asyncio.wrap_future(asyncio.run_coroutine_threadsafe(boxes.drain(10), loop))
            await until(lambda: boxes.draining)
            with pytest.raises(Unavailable) as failed:
                await client.create()
            assert failed.value.code == Code.SERVER_DRAINING
            assert (await running).stdout.text == "done\n"
            await draining


async def test_the_app_starts_its_own_sandboxes() -> None:
    app = create_app(Runtime(), key=KEY, identity=Identity())
    assert default_sandboxes(Runtime()).live == []
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as raw:
            made = await raw.post("/v1/sandboxes", json={}, headers={"X-API-Key": KEY})
            assert made.status_code == 201
