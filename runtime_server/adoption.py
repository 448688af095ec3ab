"""What a server promised, written down; and what a server that was killed left, taken over.

What it is
    `Ledger` writes each promise into the journal before it is made: sandboxes, their time to live, labels
    and keys, creates that wait for a place, snapshots. A server that is started again with the same claim
    (the same job on the same node) reads it: containers outlive a killed server, and their agents come
    back to the socket for a minute. Those that come are sandboxes again, under their ids; of the others
    their records say `evicted`; containers that nobody knows are removed, warm ones among them.

What it does not do
    Without a claim (a server that stands alone, without --state-dir) nothing is written, and nothing found.
    Time that passed while no server lived counts as use.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime_server import wire
from runtime_server.agent import AgentConnection, AgentListener, AgentLost
from runtime_server.agent.calls import Wire
from runtime_server.agent.frames import Hello
from runtime_server.births import Birth
from runtime_server.box import Box
from runtime_server.engines import SOCKET, Container, Image, Recipe
from runtime_server.errors import SandboxError
from runtime_server.journal import Entry, Journal
from runtime_server.snapshots import Snapshot
from runtime_server.wire import Code

if TYPE_CHECKING:
    from runtime_server.sandboxes import Sandboxes

log = logging.getLogger(__name__)
COME_S = 20.0  # an agent tries again every few seconds at most
UNASKED_S = 180.0  # so long one that was taken over waits for its first use, whatever its ttl_s


class Ledger:
    """See the module's docstring. Lives in one event loop."""

    def __init__(self, sandboxes: Sandboxes) -> None:
        self.boxes = sandboxes
        self._journal: Journal | None = None
        self._said: dict[str, Entry] = {}

    # --- writing ---

    async def born(self, box: Box) -> None:
        await self.changed(box)

    async def changed(self, box: Box) -> None:
        """Whatever is different about it by now."""
        if self._journal is not None and self._said.get(box.id) != (entry := box_entry(box)):
            await self._write(entry)
            self._said[box.id] = entry

    async def over(self, identity: str) -> None:
        """Nobody has to know it any more."""
        self._said.pop(identity, None)
        await self._write({"over": identity})

    async def promised(self, birth: Birth) -> None:
        if birth.promised:
            return
        self.boxes.births.promise(birth)
        await self._write(birth_entry(birth))

    async def snapshot(self, one: Snapshot) -> None:
        await self._write(snapshot_entry(one))

    async def snapshot_over(self, one: Snapshot) -> None:
        await self._write({"snapshot_over": one.id})
        await self.boxes.snapshots.delete(one)

    async def look(self) -> None:
        """Labels may be changed by whoever has the box: seen here at the latest."""
        if self._journal is not None:
            for box in self.boxes.live:
                if (said := self._said.get(box.id)) is None or said["box"]["labels"] != box.labels:
                    await self.changed(box)

    def close(self) -> None:
        journal, self._journal = self._journal, None
        if journal is not None:
            journal.close()

    async def _write(self, *entries: Entry) -> None:
        if self._journal is not None:
            await self._journal.add(*entries)

    def _current(self) -> Iterator[Entry]:
        boxes = self.boxes
        yield from (snapshot_entry(one) for one in boxes.snapshots.kept)
        yield from (box_entry(box) for box in boxes.boxes.values())
        yield from (birth_entry(birth) for birth in boxes.births.promised)

    # --- taking over ---

    async def take_over(self) -> None:
        """Everything that the journal promises and that still is; then go on writing it."""
        path = self.boxes.engine.journal
        if path is None:
            return
        found = Told(Journal.read(path))
        for entry in found.snapshots.values():
            self._restore_snapshot(entry)
        await asyncio.gather(*(self._restore(entry) for entry in found.boxes.values()))
        known = {box.container.id for box in self.boxes.live}
        # also where nothing was promised yet: it may have been killed in the middle of its first creates
        await self.boxes.engine.remove_others(known, {one.path for one in self.boxes.snapshots.kept})
        if found.boxes:
            log.info("took over %d of %d sandboxes", len(known), len(found.boxes))
        for entry in found.births.values():
            await self._restore_birth(entry)
        self._journal = Journal(path, self._current)
        self._said = {box.id: box_entry(box) for box in self.boxes.boxes.values()}

    async def _restore(self, entry: Entry) -> None:
        """One sandbox; of one that is no more, the record that says so."""
        boxes = self.boxes
        box = await self._revived(entry)
        boxes.boxes[box.id] = box
        self._remember_key(entry, box)
        if box.reason:
            return
        # its users may have given it up with the server: it has to be asked for soon
        box.used = time.monotonic() - max(0.0, box.ttl_s - UNASKED_S)
        boxes.places.seize()
        boxes.snapshots.hold(box.snapshot)
        boxes.background(boxes.watch(box))

    async def _revived(self, entry: Entry) -> Box:
        box = box_from(entry, self.boxes.config.sandbox)
        if box.reason:
            return box
        listener = AgentListener(box.io / SOCKET)
        try:
            await listener.start()
            told = entry["container"]
            box.container = await self.boxes.engine.adopt(Container(**{**told, "layer": box.container.layer}))
            box.agent = await listener.accept(box.container.pid, COME_S)
            box.agent.environment = entry["environment"]
            await box.open_network()
            if box.paused:
                box.paused = False
                await box.pause(self.boxes.engine)
        except (SandboxError, AgentLost, OSError) as error:
            log.warning("sandbox %s could not be taken over: %s", box.id, error)
            box.reason, box.finished = Code.EVICTED, True
        finally:
            await listener.close()
        return box

    def _remember_key(self, entry: Entry, box: Box) -> None:
        if box.key and entry.get("request") and not box.reason:
            request = wire.CreateSandbox.model_validate(entry["request"])
            birth = Birth(request, box.image, self.boxes.places.seat(), box.key, box.id)
            birth.task = asyncio.get_running_loop().create_future()
            birth.task.set_result(box)
            self.boxes.births.remember(birth)

    def _restore_snapshot(self, entry: Entry) -> None:
        told = {**entry["snapshot"]}
        told["base"] = Image(**{**told["base"], "layers": tuple(told["base"]["layers"])})
        one = Snapshot(**{**told, "layers": tuple(told["layers"])})
        if one.path.is_dir():
            self.boxes.snapshots.adopt(one)

    async def _restore_birth(self, entry: Entry) -> None:
        """One that waits for its place goes on waiting."""
        request = wire.CreateSandbox.model_validate(entry["birth"]["request"])
        try:
            birth = await self.boxes.conceive(request, entry["birth"]["key"], identity=entry["birth"]["id"])
            self.boxes.births.promise(birth)
        except SandboxError as error:
            log.warning("the create of %s cannot go on: %s", entry["birth"]["id"], error)


class Told:
    """The journal's lines, with what is over left out."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self.boxes: dict[str, Entry] = {}
        self.births: dict[str, Entry] = {}
        self.snapshots: dict[str, Entry] = {}
        for entry in entries:
            with contextlib.suppress(KeyError, TypeError):
                self._take(entry)

    def _take(self, entry: Entry) -> None:
        if "box" in entry:
            self.boxes[entry["box"]["id"]] = entry
            self.births.pop(entry["box"]["id"], None)
        elif "birth" in entry:
            if entry["birth"]["id"] not in self.boxes:  # the promise was written while it was kept
                self.births[entry["birth"]["id"]] = entry
        elif "snapshot" in entry:
            self.snapshots[entry["snapshot"]["id"]] = entry
        elif "over" in entry:
            self.boxes.pop(entry["over"], None)
            self.births.pop(entry["over"], None)
        elif "snapshot_over" in entry:
            self.snapshots.pop(entry["snapshot_over"], None)


_BOX = ("id", "image", "workdir", "labels", "ttl_s", "snapshot", "max_lifetime_s", "key", "created_at")


def box_entry(box: Box) -> Entry:
    told: dict[str, Any] = {name: getattr(box, name) for name in _BOX}
    told |= {"labels": dict(box.labels), "io": str(box.io), "paused": box.paused, "reason": str(box.reason)}
    container = box.container
    return {
        "box": told,
        "container": {
            "id": container.id,
            "pid": container.pid,
            "layer": str(container.layer or ""),
            "memory_mb": container.memory_mb,
            "disk_mb": container.disk_mb,
            "pids": container.pids,
            "image": container.image,
        },
        "recipe": {**asdict(box.recipe), "io": ""},
        "base": asdict(box.base),
        "environment": dict(box.agent.environment),
        "request": _request_of(box),
    }


def _request_of(box: Box) -> Entry | None:
    """Only a create that had a key can be repeated."""
    return box.request.model_dump(mode="json", exclude_none=True) if box.key and box.request else None


def box_from(entry: Entry, defaults: Any) -> Box:
    """As it was, but for its container and its agent, which have to show that they are still there."""
    told, recipe = {**entry["box"]}, entry["recipe"]
    layer = entry["container"]["layer"]
    paused, reason = told.pop("paused"), told.pop("reason")
    box = Box(
        **{**told, "io": Path(told["io"])},
        container=Container(entry["container"]["id"], 0, layer=Path(layer) if layer else None),
        agent=_nobody(),
        defaults=defaults,
        recipe=Recipe(**{**recipe, "io": Path(), "layers": tuple(recipe["layers"])}),
        base=Image(**{**entry["base"], "layers": tuple(entry["base"]["layers"])}),
    )
    box.begun = time.monotonic() - max(0.0, time.time() - box.created_at)
    box.paused, box.reason = paused, reason
    box.finished = bool(reason)
    return box


def _nobody() -> AgentConnection:
    """Of a sandbox whose agent has not come back yet, or never will."""
    wire = Wire()
    wire.lose("the agent has not come back")
    return AgentConnection(wire, 0, Hello(1, {}))


def birth_entry(birth: Birth) -> Entry:
    request = birth.request.model_dump(mode="json", exclude_none=True)
    return {"birth": {"id": birth.id, "key": birth.key, "request": request}}


def snapshot_entry(one: Snapshot) -> Entry:
    told = asdict(one)
    told.pop("used")
    return {"snapshot": told}
