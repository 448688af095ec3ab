"""Starts the real agent as PID 1 of a fresh pid namespace on this machine, with a container's capabilities.

What it does not do
    No container: file system and network are the host's, so commands in these tests touch nothing but
    their own temporary directory.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from runtime_server.agent import AgentConnection, AgentListener, Finished

CAPABILITIES = "-all,+chown,+dac_override,+fowner,+setuid,+setgid,+kill"
# a user that no other process of this machine has, so that its process limit is ours alone
NOBODY = 100_000 + os.getpid()


@dataclass
class Sandbox:
    """A running agent, and the server's end of its connection."""

    directory: Path
    listener: AgentListener
    process: asyncio.subprocess.Process
    agent: AgentConnection

    async def run(
        self,
        *argv: str,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        stdin: bytes | None = None,
        timeout_s: float = 20,
        max_output: int = 1 << 20,
    ) -> Finished:
        return await self.agent.exec(
            argv, cwd=cwd, env=env or {}, stdin=stdin, timeout_s=timeout_s, max_output=max_output
        )

    async def sh(self, script: str, **options: object) -> Finished:
        return await self.run("sh", "-c", script, **options)  # type: ignore[arg-type]

    async def processes(self) -> list[str]:
        """Command lines of everything alive in the namespace but agents, supervisors and `ps` itself."""
        listing = await self.run("ps", "-eo", "stat=,args=")
        lines = [line.split(maxsplit=1) for line in listing.stdout.data.decode().splitlines()]
        names = [args for state, args in lines if not state.startswith("Z")]
        return [args for args in names if "agent.sock" not in args and not args.startswith("ps -eo")]

    async def settles(self, *expected: str) -> bool:
        """Waits, some seconds at most, until exactly these processes are left."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + 10
        while loop.time() < deadline:
            if await self.processes() == list(expected):
                return True
            await asyncio.sleep(0.02)  # each look is a `ps`, and the tests beside this one need the CPU
        return False

    async def zombies(self) -> int:
        listing = await self.run("ps", "-eo", "stat=")
        return listing.stdout.data.decode().split().count("Z")

    def memory_kib(self) -> int:
        """Resident memory of the agent itself."""
        status = Path(f"/proc/{self.agent.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0])

    async def reconnected(self) -> AgentConnection:
        self.agent = await self.listener.accept(None, 10)
        return self.agent


def namespace_command(nproc: int | None = None) -> list[str]:
    """What goes before the agent's own command line so that it becomes PID 1, and nobody special."""
    if os.geteuid() != 0:
        return ["unshare", "-Urpf", "--mount-proc", "--kill-child"]
    unshare = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    if nproc is None:
        return [*unshare, "setpriv", "--inh-caps=-all", f"--bounding-set={CAPABILITIES}"]
    user = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--inh-caps=-all"]
    return [*unshare, *user, "--bounding-set=-all", "prlimit", f"--nproc={nproc}"]


@asynccontextmanager
async def running(binary: Path, *options: str, nproc: int | None = None) -> AsyncIterator[Sandbox]:
    directory = Path(tempfile.mkdtemp(prefix="agent-", dir="/tmp"))
    directory.chmod(0o777)
    program = shutil.copy2(binary, directory / "agent")
    listener = AgentListener(directory / "agent.sock")
    await listener.start()
    process = await asyncio.create_subprocess_exec(
        *namespace_command(nproc), program, *options, str(listener.path)
    )
    try:
        sandbox = Sandbox(directory, listener, process, await listener.accept(None, 10))
        yield sandbox
        await sandbox.agent.close()
    finally:
        await listener.close()
        if process.returncode is None:
            process.kill()
        await process.wait()
        shutil.rmtree(directory)
