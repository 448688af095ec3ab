"""The sessions of every sandbox: opened, found by name, closed, and found again by a server that came back.

What it does not do
    No HTTP (`routes/sessions.py`); what one session does is in `session.py`.
"""

from __future__ import annotations

import contextlib

from runtime_server import wire
from runtime_server.agent import AgentError, AgentLost
from runtime_server.box import Box
from runtime_server.errors import Conflict, NotFound
from runtime_server.running import PerAgent
from runtime_server.sandboxes import Sandboxes
from runtime_server.session import Command, OpenSession
from runtime_server.wire import Code

OPEN_MAX = 64  # of a sandbox
ENDED_KEPT = 64
TAG = "session:"


class Sessions:
    """Of one sandbox, and one connection to its agent."""

    def __init__(self, box: Box) -> None:
        self.box, self.agent = box, box.agent
        self._known: dict[str, OpenSession] = {}
        self._opening: set[str] = set()

    async def adopt(self) -> None:
        """What an earlier connection had opened."""
        for number, one in self.agent.running.items():
            if one.kind == "session" and one.tag.startswith(TAG):
                name = one.tag.removeprefix(TAG)
                with contextlib.suppress(AgentError):  # it has ended in the meantime
                    shell = await self.agent.attach_session(number)
                    self._known[name] = session = OpenSession(name, self.box, shell)
                    if shell.running is not None:
                        session.command = Command(0, followed=True, left=True)
                        session.command.tell(shell.running)

    def list(self) -> wire.SessionList:
        return wire.SessionList(sessions=[one.record() for one in self._known.values()])

    def get(self, name: str) -> OpenSession:
        try:
            return self._known[name]
        except KeyError:
            raise NotFound(
                f"sandbox {self.box.id} has no session {name!r}; GET …/sessions lists them",
                Code.SESSION_NOT_FOUND,
            ) from None

    async def open(self, request: wire.OpenSession) -> wire.Session:
        """Conflict when there is one of this name, or too many."""
        name = request.name or self._free()
        if name in self._known or name in self._opening:
            raise Conflict(f"sandbox {self.box.id} has a session {name!r} already", Code.SESSION_EXISTS)
        if sum(not one.ended for one in self._known.values()) + len(self._opening) >= OPEN_MAX:
            raise Conflict(f"{OPEN_MAX} sessions are open in {self.box.id}: close one first", Code.TOO_MANY)
        self._opening.add(name)
        try:
            self._known[name] = opened = await self._open(name, request)
        finally:
            self._opening.discard(name)
        self._forget()
        return opened.record()

    async def _open(self, name: str, request: wire.OpenSession) -> OpenSession:
        cwd = self.box.resolve(request.cwd) if request.cwd else self.box.workdir
        async with self.box.in_use():
            shell = await self.agent.open_session(
                cwd=cwd,
                env=request.env,
                shell=request.shell,
                pty=(request.pty.columns, request.pty.rows) if request.pty else None,
                tag=TAG + name,
            )
        return OpenSession(name, self.box, shell, cwd, request.pty is not None)

    async def delete(self, name: str) -> None:
        """Ends the shell and everything that was started in it."""
        session = self.get(name)
        async with self.box.in_use():
            await session.shell.close()
            with contextlib.suppress(AgentLost):
                await self.agent.release(session.shell.number)
        self._known.pop(name, None)

    def _free(self) -> str:
        taken = {*self._known, *self._opening}
        return next(name for number in range(1, len(taken) + 2) if (name := f"s{number}") not in taken)

    def _forget(self) -> None:
        """The oldest of those that have ended, when there are too many."""
        ended = [one.name for one in self._known.values() if one.ended]
        for name in ended[: max(0, len(ended) - ENDED_KEPT)]:
            del self._known[name]


class Shells:
    """The sessions of every sandbox of a server."""

    def __init__(self, sandboxes: Sandboxes) -> None:
        self.sandboxes = sandboxes
        self._of = PerAgent(Sessions)

    async def of(self, identity: str) -> Sessions:
        """Of a sandbox that can be worked with; raises what became of it otherwise."""
        return await self._of.get(self.sandboxes.usable(identity))
