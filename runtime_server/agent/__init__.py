"""The sandbox agent: the static program that is PID 1 of every sandbox, and the server's end of its wire.

What it is
    `*.c`            the agent (agent.h lists the files); `build.py` compiles it once
    `frames.py`      the protocol: what the bytes mean, pure functions
    `connection.py`  `AgentListener`, `AgentConnection`: exec, files, kill, over one Unix socket

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

from runtime_server.agent.connection import AgentConnection, AgentListener
from runtime_server.agent.frames import AgentError, AgentLost, Finished, Kept

__all__ = [
    "AgentConnection",
    "AgentError",
    "AgentListener",
    "AgentLost",
    "Finished",
    "Kept",
]
