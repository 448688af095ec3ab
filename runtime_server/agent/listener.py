"""Where one sandbox's agent connects: a Unix socket that only the sandbox's first process can make use of.

What it does not do
    It starts nothing. It serves one connection and then stops listening; `accept` again takes the agent back
    after the connection was lost, within the agent's orphan timeout, also in a new process of the server.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from pathlib import Path

from runtime_server.agent import frames
from runtime_server.agent.calls import Wire
from runtime_server.agent.connection import AgentConnection
from runtime_server.agent.frames import AgentLost, Kind, frame

SOCKET_PATH_MAX = 107
_PEER = struct.Struct("3i")


class AgentListener:
    """The socket one sandbox's agent connects to. Listening starts before the container does."""

    def __init__(self, socket_path: Path) -> None:
        if len(os.fsencode(socket_path)) > SOCKET_PATH_MAX:
            raise ValueError(
                f"{socket_path} is longer than the {SOCKET_PATH_MAX} bytes a Unix socket's path may have: "
                "choose a shorter directory"
            )
        self.path = socket_path
        self._socket: socket.socket | None = None

    async def start(self) -> None:
        """Listens; the agent may run as any user of the sandbox, so the socket is open to all who see it."""
        await self.close()
        server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            server.bind(os.fspath(self.path))
            self.path.chmod(0o777)
            server.listen(16)
        except OSError:
            server.close()
            raise
        self._socket = server

    async def accept(self, pid: int | None, timeout_s: float) -> AgentConnection:
        """The agent, once it has greeted; then nobody else can connect. Listens first when it has to.

        `pid` is the container's first process as this host sees it; every other peer is hung up on. None
        takes whoever comes. AgentLost when the agent does not appear within `timeout_s`.
        """
        if self._socket is None:
            await self.start()
        try:
            async with asyncio.timeout(timeout_s):
                while (connection := await self._accept_one(pid)) is None:
                    pass
        except TimeoutError as error:
            raise AgentLost(f"the sandbox's agent did not connect within {timeout_s:g} s") from error
        await self.close()
        return connection

    async def close(self) -> None:
        """Stops listening and removes the socket file."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        self.path.unlink(missing_ok=True)

    async def _accept_one(self, pid: int | None) -> AgentConnection | None:
        assert self._socket is not None
        loop = asyncio.get_running_loop()
        peer, _ = await loop.sock_accept(self._socket)
        who = _PEER.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))[0]
        if pid is not None and who != pid:
            peer.close()
            return None
        _, wire = await loop.create_unix_connection(Wire, sock=peer)
        try:
            hello = await wire.hello
            wire.send(frame(Kind.WELCOME, 0, frames.PROTOCOL.to_bytes(4, "little")))
        except AgentLost:
            return None
        except asyncio.CancelledError:
            wire.lose("nobody waits for this agent any more")
            raise
        return AgentConnection(wire, who, hello)
