"""Snapshots: the files of a sandbox as they were, for any number of others to begin with.

What it is
    The writable layer of a sandbox is copied once, while its processes stand still, and is then one more
    read-only layer of whatever begins with it: sandboxes, and snapshots of those. Its id is the digest of
    what is in it where that was cheap to know, so that the same preparation twice is one snapshot.
    It goes when nobody used it for its whole ttl_s or it is deleted; its files go when nobody stands on
    them any more.

What it does not do
    Processes, and what they hold in memory, are in no snapshot. The source lives on and is not changed.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from runtime_server.box import Box
from runtime_server.engines import Engine, Image
from runtime_server.engines.layers import LOWER_MAX, Frozen
from runtime_server.errors import BadRequest, NotFound
from runtime_server.wire import Code
from runtime_server.wire_lifecycle import Snapshot as Record


@dataclass(eq=False, kw_only=True)
class Snapshot:
    """One of them. `layers`: all of its root, its own on top."""

    id: str
    base: Image
    layers: tuple[str, ...]
    size: int
    parent: str
    env: Mapping[str, str]
    workdir: str
    cpus: float
    memory_mb: int
    pids: int
    ttl_s: float
    labels: dict[str, str] = field(default_factory=dict)
    created_at: float = field(default_factory=time.time)
    used: float = field(default_factory=time.monotonic)
    deleted: bool = False

    @property
    def path(self) -> Path:
        return Path(self.layers[0])

    @property
    def expires_in(self) -> float:
        return self.ttl_s - (time.monotonic() - self.used)


class Snapshots:
    """See the module's docstring."""

    def __init__(self, engine: Engine, default_ttl_s: float) -> None:
        self.engine, self.default_ttl_s = engine, default_ttl_s
        self._all: dict[str, Snapshot] = {}  # those that are deleted too, while somebody stands on them
        self._users: Counter[str] = Counter()  # sandboxes and snapshots
        self._boxes: Counter[str] = Counter()

    @property
    def live(self) -> list[Snapshot]:
        return [one for one in self._all.values() if not one.deleted]

    @property
    def kept(self) -> list[Snapshot]:
        """Those that are deleted and still stood on, too."""
        return [*self._all.values()]

    def get(self, identity: str) -> Snapshot:
        """NotFound for one that is not known (any more). To ask for it is to use it."""
        found = self._all.get(identity)
        if found is None or found.deleted:
            raise NotFound(
                f"there is no snapshot {identity!r}; GET /v1/snapshots lists them", Code.SNAPSHOT_NOT_FOUND
            )
        found.used = time.monotonic()
        return found

    def record(self, one: Snapshot) -> Record:
        return Record(
            id=one.id,
            image=one.base.name,
            parent=one.parent,
            bytes=one.size,
            sandboxes=self._boxes[one.id],
            labels=one.labels,
            created_at=one.created_at,
            expires_at=time.time() + max(0.0, one.expires_in),
        )

    async def take(self, box: Box, ttl_s: float | None, labels: Mapping[str, str]) -> Snapshot:
        """Of a sandbox that lives. BadRequest where this cannot be."""
        if box.container.layer is None or len(box.recipe.layers) >= LOWER_MAX - 1:
            raise BadRequest(
                "no snapshot can be taken of this sandbox: its node cannot stack layers, its image's user is "
                "not root, or there are too many layers already; GET /v1/capabilities says what works here"
            )
        async with box.still(self.engine):
            frozen = await self.engine.freeze(box.container, f"n-{secrets.token_hex(8)}")
        identity = _identity(box, frozen)
        if (known := self._all.get(identity)) is not None and not known.deleted:
            await self.engine.discard(frozen.path)
            known.used = time.monotonic()
            return known
        made = self._made(identity, box, frozen, ttl_s, labels)
        self.adopt(made)
        return made

    def _made(
        self, identity: str, box: Box, frozen: Frozen, ttl_s: float | None, labels: Mapping[str, str]
    ) -> Snapshot:
        if identity in self._all:  # of the same content, deleted, and still in use under this id
            identity = f"n-{secrets.token_hex(12)}"
        return Snapshot(
            id=identity,
            base=box.base,
            layers=(str(frozen.path), *box.recipe.layers),
            size=frozen.size,
            parent=box.snapshot,
            env=dict(box.recipe.env),
            workdir=box.workdir,
            cpus=box.recipe.cpus,
            memory_mb=box.recipe.memory_mb,
            pids=box.recipe.pids,
            ttl_s=ttl_s or self.default_ttl_s,
            labels=dict(labels),
        )

    def adopt(self, made: Snapshot) -> None:
        self._all[made.id] = made
        if made.parent:
            self._users[made.parent] += 1

    def hold(self, identity: str) -> None:
        """A sandbox begins with it."""
        if identity:
            self._users[identity] += 1
            self._boxes[identity] += 1

    async def release(self, identity: str) -> None:
        """That sandbox is gone, its mounts too."""
        if identity:
            self._users[identity] -= 1
            self._boxes[identity] -= 1
            if (one := self._all.get(identity)) is not None:
                one.used = time.monotonic()
                await self._let_go(one)

    async def delete(self, one: Snapshot) -> None:
        """Nobody can begin with it any more."""
        one.deleted = True
        await self._let_go(one)

    def expired(self) -> list[Snapshot]:
        return [one for one in self.live if one.expires_in <= 0 and not self._users[one.id]]

    async def _let_go(self, one: Snapshot) -> None:
        if not one.deleted or self._users[one.id] or self._all.pop(one.id, None) is None:
            return
        del self._users[one.id], self._boxes[one.id]
        await self.engine.discard(one.path)
        if (parent := self._all.get(one.parent)) is not None:
            self._users[parent.id] -= 1
            await self._let_go(parent)


def _identity(box: Box, frozen: Frozen) -> str:
    """By what it holds: the layers below, the one on top, and what its commands are given."""
    if not frozen.digest:
        return f"n-{secrets.token_hex(12)}"
    recipe = box.recipe
    told = [recipe.layers, box.base.id, frozen.digest, dict(recipe.env), box.workdir]
    limits = [recipe.cpus, recipe.memory_mb, recipe.pids]
    return "n-" + hashlib.sha256(json.dumps([told, limits], sort_keys=True).encode()).hexdigest()[:24]
