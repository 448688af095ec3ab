"""The sandbox agent: the static program that is PID 1 of every sandbox, and the server's end of its wire.

What it is
    `*.c`            the agent (agent.h lists the files); `build.py` compiles it once
    `frames.py`      the protocol: what the bytes mean, pure functions
    `listener.py`    `AgentListener`: where one sandbox's agent connects
    `connection.py`  `AgentConnection`: exec, processes, sessions, files, archives, over one Unix socket
    `process.py`, `session.py`, `archive.py`, `mirror.py`   what these are; `calls.py`: the calls in flight

How to use it

    binary = build.agent_binary()                   # to be mounted at /.orchestrate/agent
    listener = AgentListener(directory / "agent.sock")
    await listener.start()                          # then start the container
    agent = await listener.accept(container_pid, timeout_s=10)
    result = await agent.exec(["make"], cwd=None, env={}, stdin=None, timeout_s=60, max_output=1 << 20)

What it does not do
    No containers, no HTTP. It imports only the standard library and `filelock`.
"""

from __future__ import annotations

from runtime_server.agent.connection import AgentConnection
from runtime_server.agent.frames import AgentError, AgentLost, Finished, Kept, Running
from runtime_server.agent.listener import AgentListener
from runtime_server.agent.mirror import Chunk
from runtime_server.agent.process import Process
from runtime_server.agent.session import Session, SessionEnded

__all__ = [
    "AgentConnection",
    "AgentError",
    "AgentListener",
    "AgentLost",
    "Chunk",
    "Finished",
    "Kept",
    "Process",
    "Running",
    "Session",
    "SessionEnded",
]
