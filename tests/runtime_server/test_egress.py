"""The way out of a sandbox: which hosts, which addresses, and what a proxy must not be talked into."""

# ruff: noqa: E501 - a line for each trick
from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
from serverkit import KEY, ThreadedSandboxes, run_server

from orchestrator.schema import Runtime
from runtime_server.allowlist import Allowlist, public
from runtime_server.client import Client
from runtime_server.egress import CONNECTIONS, Egress
from runtime_server.errors import BadRequest
from runtime_server.wire import CreateSandbox, Network

HERE = "127.0.0.1"


@pytest.mark.parametrize(
    "line", ["", "*", "*.*", "1.2.3.4", "::1", "a:0", "a:99999", "http://a", "a b", "127.1", "0x7f.1"]
)
def test_what_is_no_rule(line: str) -> None:
    with pytest.raises(ValueError, match="allowed"):
        Allowlist.of([line])


@pytest.mark.parametrize(
    ("host", "port", "allowed"),
    [
        ("pypi.org", 443, True), ("PyPI.org.", 80, True), ("pypi.org", 22, False), ("a.pypi.org", 443, False),
        ("x.files.org", 443, True), ("files.org", 443, False), ("evilfiles.org", 443, False), ("b.org", 8080, True),
        ("b.org", 443, False), ("pypi.org.evil", 443, False), ("127.0.0.1", 443, False), ("pypi.org\0.b", 443, False),
    ],
)  # fmt: skip
def test_names(host: str, port: int, allowed: bool) -> None:
    assert Allowlist.of(["pypi.org", "*.files.org", "b.org:8080"]).allows(host, port) is allowed


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.0.0.1", "172.16.3.4", "192.168.1.1", "169.254.169.254", "0.0.0.0", "100.64.0.1", "224.0.0.1",
        "255.255.255.255", "192.0.2.1", "::1", "::", "fe80::1", "fe80::1%eth0", "fd00:ec2::254", "::ffff:127.0.0.1",
        "::ffff:8.8.8.8", "64:ff9b::7f00:1", "2002:7f00:1::", "2001:db8::1", "ff02::1", "::7f00:1", "nonsense", "",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public(address: str) -> None:
    assert not public(address)


def test_addresses_that_are_public() -> None:
    assert public("8.8.8.8") and public("2606:4700:4700::1111")


@asynccontextmanager
async def _echo() -> AsyncIterator[int]:
    """A server on this machine that says back what it hears, after a line of its own."""

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        data = await reader.read(65536)
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nheard:" + data)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(client, HERE, 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


class Names:
    """A resolver whose answers are made up, and counted."""

    def __init__(self, *answers: list[str]) -> None:
        self.answers, self.asked = list(answers), 0

    async def __call__(self, host: str, port: int) -> list[str]:
        self.asked += 1
        return self.answers[min(self.asked, len(self.answers)) - 1]


@asynccontextmanager
async def _proxy(*rules: str, names: Names | None = None, here: bool = True) -> AsyncIterator[int]:
    check = (lambda address: address == HERE) if here else public
    egress = Egress(Allowlist.of(rules), check, names or Names([HERE]))
    listening = socket.create_server((HERE, 0))
    await egress.serve(listening)
    try:
        yield listening.getsockname()[1]
    finally:
        await egress.close()


async def _ask(port: int, data: str, more: str = "") -> str:
    reader, writer = await asyncio.open_connection(HERE, port)
    writer.write(data.encode("latin-1"))
    if more:
        first = await reader.readuntil(b"\r\n\r\n")
        writer.write(more.encode())
        answer = first + await asyncio.wait_for(reader.read(), 20)
    else:
        answer = await asyncio.wait_for(reader.read(), 20)
    writer.close()
    return answer.decode("latin-1")


async def test_a_tunnel_to_an_allowed_host() -> None:
    async with _echo() as port, _proxy(f"good.test:{port}") as proxy:
        said = await _ask(proxy, f"CONNECT good.test:{port} HTTP/1.1\r\nHost: x\r\n\r\n", "hello")
    assert said.startswith("HTTP/1.1 200") and said.endswith("heard:hello")


async def test_a_plain_request_loses_what_is_the_proxys() -> None:
    async with _echo() as port, _proxy(f"good.test:{port}") as proxy:
        head = f"GET http://good.test:{port}/a?b=1 HTTP/1.1\r\nHost: evil.test\r\nProxy-Authorization: s\r\nA: 1\r\n\r\n"
        said = await _ask(proxy, head)
    assert f"heard:GET /a?b=1 HTTP/1.1\r\nHost: good.test:{port}\r\nA: 1\r\nConnection: close\r\n\r\n" in said


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("CONNECT evil.test:443 HTTP/1.1", 403), ("CONNECT good.test:22 HTTP/1.1", 403), ("CONNECT good.test HTTP/1.1", 400),
        ("CONNECT 127.0.0.1:443 HTTP/1.1", 403), ("CONNECT 2130706433:443 HTTP/1.1", 403), ("CONNECT [::1]:443 HTTP/1.1", 403),
        ("CONNECT good.test:443@evil:1 HTTP/1.1", 403), ("GET / HTTP/1.1", 400), ("GET http://good.test@evil/ HTTP/1.1", 400),
        ("GET ftp://good.test/ HTTP/1.1", 400), ("GET https://good.test/ HTTP/1.1", 400), ("nonsense", 400),
        ("GET http://good.test:x/ HTTP/1.1", 400), ("CONNECT good.test:443 HTTP/1.1\nHost: evil", 400), ("CONNECT :443 HTTP/1.1", 400),
    ],
)  # fmt: skip
async def test_what_is_refused(line: str, status: int) -> None:
    async with _proxy("good.test") as proxy:
        assert (await _ask(proxy, f"{line}\r\n\r\n")).startswith(f"HTTP/1.1 {status} ")


async def test_an_allowed_name_with_an_address_of_the_inside() -> None:
    async with _proxy("good.test", names=Names(["8.8.8.8", "169.254.169.254"]), here=False) as proxy:
        said = await _ask(proxy, "CONNECT good.test:443 HTTP/1.1\r\n\r\n")
    assert "403" in said and "not public" in said


async def test_a_name_that_changes_its_answer() -> None:
    """What was checked is what is connected: nobody asks a second time."""
    names = Names([HERE], ["10.0.0.1"])
    async with _echo() as port, _proxy(f"good.test:{port}", names=names) as proxy:
        assert "200" in await _ask(proxy, f"CONNECT good.test:{port} HTTP/1.1\r\n\r\n", "x")
        assert names.asked == 1
        assert "403" in await _ask(proxy, f"CONNECT good.test:{port} HTTP/1.1\r\n\r\n")


async def test_headers_and_connections_have_a_bound() -> None:
    async with _proxy("good.test") as proxy:
        assert (await _ask(proxy, f"CONNECT good.test:443 HTTP/1.1\r\nA: {'x' * 20_000}\r\n\r\n")).startswith(
            "HTTP/1.1 431"
        )
        held = [await asyncio.open_connection(HERE, proxy) for _ in range(CONNECTIONS)]
        said = await _ask(proxy, "CONNECT good.test:443 HTTP/1.1\r\n\r\n")
        assert said.startswith("HTTP/1.1 503")
        for _, writer in held:
            writer.close()


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[str, ThreadedSandboxes]]:
    with run_server(Runtime(max_parallel_sandboxes=4)) as found:
        yield found


FETCH = """
import os, urllib.request
print(os.environ['https_proxy'], urllib.request.urlopen('http://good.test:PORT/x', timeout=20).read().decode())
"""


@pytest.mark.container
async def test_a_sandbox_reaches_what_is_allowed(running: tuple[str, ThreadedSandboxes]) -> None:
    """And has no interface for it."""
    url, boxes = running
    async with _echo() as port, Client(url, KEY) as client:
        network = Network(mode="allowlist", allow=[f"good.test:{port}"])
        async with client.sandbox(CreateSandbox(network=network)) as sandbox:
            egress = boxes.get(sandbox.id).egress
            assert egress is not None
            egress.resolve, egress.check = Names([HERE]), lambda address: address == HERE
            done = await sandbox.exec(["python3", "-c", FETCH.replace("PORT", str(port))])
            assert "http://127.0.0.1:3128 heard:GET /x HTTP/1.1" in done.stdout.text, done.stderr.text
            assert (
                "403"
                in (
                    await sandbox.exec(["python3", "-c", FETCH.replace("good.test:PORT", "evil.test")])
                ).stderr.text
            )
            assert (await sandbox.exec("tail -n +3 /proc/net/dev | grep -vc lo:")).stdout.text.strip() == "0"
            await sandbox.kill()
            done = await sandbox.exec(["python3", "-c", FETCH.replace("PORT", str(port))])
            assert "heard:" in done.stdout.text
        async with client.sandbox() as sandbox:
            assert "KeyError" in (await sandbox.exec(["python3", "-c", FETCH])).stderr.text


@pytest.mark.container
async def test_lists_that_are_none(running: tuple[str, ThreadedSandboxes]) -> None:
    async with Client(running[0], KEY) as client:
        for network in (Network(mode="allowlist", allow=["10.0.0.1"]), Network(allow=["pypi.org"])):
            with pytest.raises(BadRequest), contextlib.suppress(AssertionError):
                await client.create(CreateSandbox(network=network))
