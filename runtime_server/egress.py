"""The way out of a sandbox: an HTTP proxy of the server, at a port of the sandbox's own loopback.

What it is
    `Egress.open` listens inside of the sandbox's network namespace (`engines/netdoor.py`) and speaks
    `CONNECT host:port` and plain HTTP (`GET http://host/…`) to what comes: names of the list only, resolved
    here, every address checked, connected to the address that was checked. The sandbox itself stays without
    a network.

How to use it
    egress = await Egress.open(pid, Allowlist.of(["pypi.org"]));  env |= ENVIRONMENT;  await egress.close()

What it does not do
    It does not look into connections, keeps nothing and logs no urls. No name is resolved inside.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

from runtime_server.allowlist import Allowlist, public
from runtime_server.engines import netdoor
from runtime_server.errors import BadRequest, Internal
from runtime_server.wire import Code, Network

PORT = 3128
_PROXY = f"http://127.0.0.1:{PORT}"
ENVIRONMENT = {
    **dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), _PROXY),
    **dict.fromkeys(("NO_PROXY", "no_proxy"), "localhost,127.0.0.1,::1"),
}
HEAD_MAX = 16 << 10
HEAD_S, DIAL_S, IDLE_S, DOOR_S, LINGER_S = 15.0, 20.0, 300.0, 15.0, 1.0
CONNECTIONS = 64  # at once, of one sandbox
CHUNK = 64 << 10
HOP_BY_HOP = {b"proxy-connection", b"proxy-authorization", b"connection", b"keep-alive", b"upgrade", b"te"}
Resolve = Callable[[str, int], Awaitable[list[str]]]


def rules(network: Network) -> tuple[str, ...]:
    """The hosts that a request asks for. BadRequest for a list that is none."""
    if network.mode == "none" and network.allow:
        raise BadRequest("network.allow goes with the mode `allowlist`; the mode `none` reaches nothing")
    try:
        Allowlist.of(network.allow)
    except ValueError as error:
        raise BadRequest(f"network.allow: {error}") from None
    return tuple(network.allow)


class Refused(Exception):
    """What is answered instead of a connection: a status and one line."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


async def resolve(host: str, port: int) -> list[str]:
    """Its addresses, by this machine's resolver. OSError when there are none."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(row[4][0]) for row in found))


async def door(pid: int, port: int = PORT) -> socket.socket:
    """A socket that listens on the loopback of another network namespace, that of this process. BadRequest
    where it has none of its own, Internal when it cannot."""
    if os.stat(f"/proc/{pid}/ns/net").st_ino == os.stat("/proc/self/ns/net").st_ino:  # noqa: PTH116
        raise BadRequest("this engine gives sandboxes no network namespace, so none can be opened a little")
    ours, theirs = socket.socketpair()
    user = ["-U", "--preserve-credentials"] if os.getuid() else []
    command = [
        "nsenter",
        "-t",
        str(pid),
        *user,
        "-n",
        sys.executable,
        "-I",
        "-S",
        netdoor.__file__,
        str(port),
    ]
    with ours, theirs:
        process = await asyncio.create_subprocess_exec(
            *command, stdin=theirs.fileno(), stderr=asyncio.subprocess.PIPE
        )
        try:
            async with asyncio.timeout(DOOR_S):
                said = (await process.communicate())[1]
        except TimeoutError:
            process.kill()
            await process.wait()
            said = b"it took too long"
        ours.setblocking(False)
        try:
            _, found, _, _ = socket.recv_fds(ours, 1, 1)
        except OSError:
            found = []
    if not found:
        why = said.decode(errors="replace").strip()[-300:]
        raise Internal(f"no proxy can be opened in the sandbox: {why}", Code.CREATE_FAILED)
    return socket.socket(fileno=found[0])


class Egress:
    """The proxy of one sandbox. `check` and `resolve` are seams for tests."""

    def __init__(
        self, allow: Allowlist, check: Callable[[str], bool] = public, resolve: Resolve = resolve
    ) -> None:
        self.allow, self.check, self.resolve = allow, check, resolve
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @classmethod
    async def open(cls, pid: int, allow: Allowlist) -> Egress:
        """Listens in the sandbox whose first process this is. SandboxError when that cannot be."""
        egress = cls(allow)
        await egress.serve(await door(pid))
        return egress

    async def serve(self, listening: socket.socket) -> None:
        self._server = await asyncio.start_server(self._client, sock=listening, limit=HEAD_MAX)

    async def close(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            if len(self._tasks) > CONNECTIONS:
                raise Refused(503, f"a sandbox has {CONNECTIONS} connections at once")
            await self._answer(reader, writer)
        except Refused as refused:
            said = f"{refused}\n".encode()
            head = f"HTTP/1.1 {refused.status} Refused\r\nContent-Length: {len(said)}\r\n"
            with contextlib.suppress(OSError):
                writer.write(f"{head}Connection: close\r\n\r\n".encode() + said)
                await _linger(reader, writer)
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            pass  # one of the two hung up, or said nothing for too long
        except asyncio.CancelledError:
            pass  # by `close`: nobody waits for this task, and streams log one that was cancelled
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await _head(reader)
        method, target, lines = _request(head)
        host, port, first = _connect(target) if method == "CONNECT" else _forward(method, target, lines)
        there_reader, there = await self._dial(host, port)
        try:
            if method == "CONNECT":
                writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            else:
                there.write(first)
            await _both(_pump(reader, there), _pump(there_reader, writer))
        finally:
            there.close()

    async def _dial(self, host: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """To an address that was checked, and to no other."""
        if not self.allow.allows(host, port):
            raise Refused(403, f"{host}:{port} is not among the hosts that this sandbox may reach")
        try:
            async with asyncio.timeout(DIAL_S):
                addresses = await self.resolve(host, port)
                if not addresses or not all(self.check(address) for address in addresses):
                    raise Refused(403, f"{host} has an address that is not public")
                return await asyncio.open_connection(addresses[0], port, limit=CHUNK)
        except (OSError, TimeoutError, UnicodeError) as error:
            raise Refused(502, f"{host}:{port} cannot be reached: {type(error).__name__}") from None


async def _head(reader: asyncio.StreamReader) -> bytes:
    try:
        async with asyncio.timeout(HEAD_S):
            return await reader.readuntil(b"\r\n\r\n")
    except asyncio.LimitOverrunError:
        raise Refused(431, f"a request to the proxy has {HEAD_MAX} bytes of headers at most") from None


async def _linger(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Hanging up on what was sent and not read would take the answer along."""
    writer.write_eof()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            while await reader.read(CHUNK):
                pass


def _request(head: bytes) -> tuple[str, str, list[bytes]]:
    lines = head[:-4].split(b"\r\n")
    words = lines[0].decode("latin-1").split(" ")
    if len(words) != 3 or not words[2].startswith("HTTP/1.") or b"\n" in head[:-4].replace(b"\r\n", b""):
        raise Refused(400, "that is no request to an HTTP proxy")
    return words[0], words[1], lines[1:]


def _connect(target: str) -> tuple[str, int, bytes]:
    host, _, port = target.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise Refused(400, "CONNECT takes a host and a port")
    return host, int(port), b""


def _forward(method: str, target: str, lines: list[bytes]) -> tuple[str, int, bytes]:
    """One request, then the end: another one on the same connection could be for another host."""
    try:
        url = urlsplit(target)
        port = url.port or 80
    except ValueError:
        raise Refused(400, "that is no url") from None
    if url.scheme != "http" or not url.hostname or "@" in url.netloc or not method.isalpha():
        raise Refused(400, "this is a proxy: ask for http://host/path, or CONNECT host:port")
    kept = [line for line in lines if line.partition(b":")[0].strip().lower() not in (HOP_BY_HOP | {b"host"})]
    path = (url.path or "/") + (f"?{url.query}" if url.query else "")
    first = [f"{method} {path} HTTP/1.1".encode("latin-1"), f"Host: {url.netloc}".encode("latin-1"), *kept]
    return url.hostname, port, b"\r\n".join([*first, b"Connection: close", b"", b""])


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        async with asyncio.timeout(IDLE_S):
            data = await reader.read(CHUNK)
        if not data:
            break
        writer.write(data)
        await writer.drain()
    if writer.can_write_eof():
        writer.write_eof()


async def _both(*pumps: Awaitable[None]) -> None:
    """Until both ways are over; the failure of one ends the other."""
    tasks = [asyncio.ensure_future(pump) for pump in pumps]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
