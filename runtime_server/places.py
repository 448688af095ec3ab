"""Places for sandboxes: so many may exist at once, the others wait their turn, groups together.

What it is
    First come, first served, with a time limit for waiting, a position, and an estimate from how long places
    were held lately. Who comes as part of a group gets a place when the whole group does: a group that is
    not complete holds nobody up, one that is complete and does not fit yet holds up those behind it, so
    that neither a group nor a single one can starve.

How to use it
    ticket = places.enter(); await places.wait(ticket, timeout_s); …; places.give(held_s=12.0)

What it does not do
    It knows nothing of sandboxes.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field

from runtime_server.errors import BadRequest, SandboxError, Unavailable
from runtime_server.wire import Code, Queue

HOLDS_KEPT = 64  # so many that ended lately say how long one is held


@dataclass(eq=False)
class Party:
    """Those who get their places in the same instant. `size`: the places they need together."""

    name: str
    size: int
    tickets: list[Ticket] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        return sum(ticket.places for ticket in self.tickets) >= self.size


@dataclass(eq=False)
class Ticket:
    """One who waits, perhaps for several places."""

    places: int
    party: Party
    turn: asyncio.Future[None]

    @property
    def waiting(self) -> bool:
        return not self.turn.done()

    @property
    def seated(self) -> bool:
        turn = self.turn
        return turn.done() and not turn.cancelled() and turn.exception() is None


class Places:
    """See the module's docstring."""

    def __init__(self, number: int) -> None:
        self.number = self.free = number
        self._line: list[Party] = []
        self._holds: deque[float] = deque(maxlen=HOLDS_KEPT)
        self._closed: SandboxError | None = None

    @property
    def waiting(self) -> int:
        return sum(ticket.waiting for party in self._line for ticket in party.tickets)

    def enter(self, places: int = 1, group: str = "", group_size: int = 1) -> Ticket:
        """Stand in line. Unavailable once it is closed, BadRequest for what can never be."""
        if self._closed is not None:
            raise self._closed
        party = self._party(group, max(places, group_size))
        ticket = Ticket(places, party, asyncio.get_running_loop().create_future())
        party.tickets.append(ticket)
        self._admit()
        return ticket

    async def wait(self, ticket: Ticket, timeout_s: float) -> None:
        """Unavailable (queue_timeout) when its turn does not come in time, or what `close` was given."""
        try:
            async with asyncio.timeout(timeout_s):
                await ticket.turn
        except BaseException as error:  # whatever ends the waiting, a place that came must not be lost
            self.leave(ticket)
            if isinstance(error, TimeoutError):
                raise self._too_late(timeout_s) from None
            raise

    def leave(self, ticket: Ticket) -> None:
        """Go without: out of the line, or with the places handed on that came in the same instant."""
        if ticket.seated:
            for _ in range(ticket.places):
                self.give()
            return
        ticket.turn.cancel()
        if ticket in ticket.party.tickets:
            ticket.party.tickets.remove(ticket)
        if not ticket.party.tickets and ticket.party in self._line:
            self._line.remove(ticket.party)
        self._admit()

    def give(self, held_s: float | None = None) -> None:
        """One place back, after so many seconds."""
        if held_s is not None:
            self._holds.append(held_s)
        self.free += 1
        self._admit()

    def seat(self) -> Ticket:
        """A ticket for a place that is taken already."""
        ticket = Ticket(1, Party("", 1), asyncio.get_running_loop().create_future())
        ticket.turn.set_result(None)
        return ticket

    def seize(self) -> None:
        """A place for one that exists already, whether there is room or not."""
        self.free -= 1

    def queue(self, ticket: Ticket) -> Queue | None:
        """Where it stands; None once it has its place."""
        if not ticket.waiting:
            return None
        ahead = 0
        for party in self._line:
            if party is ticket.party:
                break
            ahead += party.size
        return Queue(position=ahead + 1, eta_s=self._eta(ahead + ticket.party.size))

    def close(self, error: SandboxError) -> None:
        """Nobody gets a place any more; those who wait get the error now."""
        self._closed = error
        line, self._line = self._line, []
        for ticket in [ticket for party in line for ticket in party.tickets]:
            if ticket.waiting:
                ticket.turn.set_exception(error)
                ticket.turn.exception()  # some of them nobody asks

    def _party(self, name: str, size: int) -> Party:
        if size > self.number:
            raise BadRequest(
                f"{size} sandboxes at once can never be: this server has {self.number} places "
                "(runtime.max_parallel_sandboxes)"
            )
        for party in self._line:
            if name and party.name == name and not party.complete:
                if party.size != size:
                    raise BadRequest(f"group {name[:40]!r} was announced with {party.size} members before")
                return party
        self._line.append(Party(name, size))
        return self._line[-1]

    def _admit(self) -> None:
        """In order; whoever is complete and does not fit holds up the rest."""
        for party in [party for party in self._line if party.complete]:
            if party.size > self.free:
                return
            self._line.remove(party)
            for ticket in party.tickets:
                self.free -= ticket.places
                if ticket.waiting:
                    ticket.turn.set_result(None)

    def _eta(self, needed: int) -> float | None:
        """All places are held: one comes back every hold time divided by their number."""
        if not self._holds:
            return None
        hold = sum(self._holds) / len(self._holds)
        return round(max(0, needed - max(0, self.free)) * hold / self.number, 1)

    def _too_late(self, timeout_s: float) -> Unavailable:
        return Unavailable(
            f"all {self.number} sandboxes of this server are in use, and none became free within "
            f"{timeout_s:g} s. Delete some, wait longer (queue_timeout_s), or raise "
            "runtime.max_parallel_sandboxes.",
            Code.QUEUE_TIMEOUT,
            queued=self.waiting,
        )
