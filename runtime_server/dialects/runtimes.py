"""Runtimes: sandboxes as the foreign clients know them, with a session, a key and a dialect.

What it is
    `Runtimes.start` makes one, or finds the one that the same session has; it is ready, failed or still
    waiting for a place when the hold is over, and the client asks again. One that waits and that nobody
    has asked for in a while is given up. What a restarted server needs to know of a runtime is in the
    labels of its sandbox.

What it does not do
    No HTTP, and no commands: the dialects' own modules run those, on `Runtime.box`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from runtime_server import wire
from runtime_server.births import Birth
from runtime_server.box import DELETED, Box
from runtime_server.dialects.images import Aliases, full_name
from runtime_server.dialects.keys import Keys, digest
from runtime_server.dialects.records import Phase, View, infra
from runtime_server.dialects.start import Dialect, Start, Told, told
from runtime_server.errors import Gone, NotFound, SandboxError
from runtime_server.sandboxes import Sandboxes
from runtime_server.wire import Code

log = logging.getLogger("runtime_server")
T = TypeVar("T")

ABANDONED_S = 60.0  # a runtime that waits for a place, and that nobody has asked for in so long, is given up
QUEUE_S = 3600.0  # the longest any client waits for one to be ready
LOOK_S = 2.0
SETUP_S = 600.0
DEAD_KEPT = 1000
_LABEL = "dialect."  # of sandboxes: what a restarted server needs to know


@dataclass(eq=False)
class Runtime:
    """One. `box` is None until it is ready. `parts` holds what the dialects keep of it: shells, events."""

    id: str
    session_id: str
    told: Told
    image: str
    box: Box | None = None
    birth: Birth | None = None
    failure: SandboxError | None = None
    stopped: bool = False
    refused: bool = False  # paused, where the engine cannot make its processes stand still
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    touched: float = field(default_factory=time.monotonic)
    holders: int = 0
    parts: dict[type, Any] = field(default_factory=dict)
    born: float = field(default_factory=time.monotonic)

    @property
    def phase(self) -> Phase:
        if self.stopped:
            return Phase.STOPPED
        if self.failure is not None:
            return Phase.OOM if self.failure.code == Code.OOM else Phase.FAILED
        if self.box is None:
            return Phase.PENDING
        if self.box.reason:
            return Phase.STOPPED if self.box.reason == DELETED else Phase.FAILED
        return Phase.PAUSED if self.refused or self.box.paused else Phase.READY

    @property
    def end(self) -> SandboxError | None:
        """Why it is over, None while it is not."""
        if self.failure is not None:
            return self.failure
        return self.box.gone() if self.box is not None and self.box.reason else None

    def part(self, kind: type[T], make: Callable[[], T]) -> T:
        found = self.parts.get(kind)
        if found is None:
            found = self.parts[kind] = make()
        return found

    def touch(self) -> None:
        self.touched = time.monotonic()

    @property
    def abandoned(self) -> bool:
        return not self.holders and time.monotonic() - self.touched > ABANDONED_S

    async def hold(self, seconds: float) -> None:
        """Wait until it is known what becomes of it, but no longer than that."""
        self.holders += 1
        try:
            async with asyncio.timeout(seconds):
                await self.settled.wait()
        except TimeoutError:
            pass
        finally:
            self.holders -= 1
            self.touch()


class Runtimes:
    """See the module's docstring. Lives in the server's event loop."""

    def __init__(self, sandboxes: Sandboxes, aliases: Aliases | None = None) -> None:
        self.sandboxes = sandboxes
        self.aliases = aliases or Aliases()
        self._known: dict[str, Runtime] = {}
        self._sessions: dict[str, Runtime] = {}
        self._making: dict[str, asyncio.Task[None]] = {}

    @cached_property
    def keys(self) -> Keys:
        """Once the engine has started: where a later server finds them again is beside its journal."""
        journal = self.sandboxes.engine.journal
        return Keys(journal.with_name("session_secret") if journal else None)

    # --- finding ---

    def get(self, identity: str) -> Runtime:
        if identity not in self._known:
            self._adopt()
        try:
            found = self._known[identity]
        except KeyError:
            raise NotFound(f"there is no runtime {identity!r}", Code.SANDBOX_NOT_FOUND) from None
        found.touch()
        return found

    def of_session(self, session: str) -> Runtime | None:
        if session not in self._sessions:
            self._adopt()
        found = self._sessions.get(session)
        if found is not None:
            found.touch()
        return found

    def of_key(self, key: str | None) -> Runtime | None:
        if not (owner := self.keys.owner(key)):
            self._adopt()
            owner = self.keys.owner(key)
        found = self._known.get(owner)
        if found is not None and found.box is not None and found.box.reason == DELETED:
            self.keys.forget(found.id)  # its sandbox was deleted through the server's own API
            return None
        return found

    def all(self) -> list[Runtime]:
        self._adopt()
        return list(self._known.values())

    def view(self, runtime: Runtime, base: str) -> View:
        end, phase = runtime.end, runtime.phase
        url = f"{base}/sandbox/{runtime.id}" if runtime.told.dialect.by_path else base
        return View(
            id=runtime.id,
            session_id=runtime.session_id,
            dialect=runtime.told.dialect,
            phase=phase,
            image=runtime.image,
            url=url,
            key=self.keys.make(runtime.id) if phase.lives else "",
            queue=self._queue(runtime),
            reason=infra(end.code) if end else "",
            problem=str(end) if end else "",
        )

    def _queue(self, runtime: Runtime) -> tuple[int, float]:
        """Its place in the line and for how long, in seconds; zeros when it does not wait."""
        if runtime.birth is None or runtime.birth.task.done():
            return 0, 0.0
        found = self.sandboxes.places.queue(runtime.birth.ticket)
        return (found.position, found.eta_s or 0.0) if found else (0, 0.0)

    # --- starting ---

    def start(self, start: Start, secret: Callable[[str], bool]) -> Runtime:
        """The live runtime of that session, else a new one. `secret` knows the server's key."""
        found = self.of_session(start.session_id)
        if found is not None and found.phase.lives:
            return found
        image, setup = self.aliases.resolve(start.image)
        runtime = Runtime(f"r-{secrets.token_hex(4)}", start.session_id, told(start), full_name(image))
        env = {name: value for name, value in start.environment.items() if not secret(value)}
        self._remember(runtime)
        request = self._request(runtime, start, env)
        here_only = start.image_pull_policy == "Never"
        self._begin(runtime, self._make(runtime, self._conceive(runtime, request, here_only), setup))
        return runtime

    def _begin(self, runtime: Runtime, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._making[runtime.id] = task
        task.add_done_callback(lambda _: self._making.pop(runtime.id, None))

    def _remember(self, runtime: Runtime) -> None:
        self._known[runtime.id] = self._sessions[runtime.session_id] = runtime
        self.keys.make(runtime.id)
        dead = [r for r in self._known.values() if not r.phase.lives]
        for old in dead[: max(0, len(dead) - DEAD_KEPT)]:
            self._forget(old)

    def _forget(self, runtime: Runtime) -> None:
        self.keys.forget(runtime.id)
        self._known.pop(runtime.id, None)
        if self._sessions.get(runtime.session_id) is runtime:
            del self._sessions[runtime.session_id]

    def _request(self, runtime: Runtime, start: Start, env: dict[str, str]) -> wire.CreateSandbox:
        return wire.CreateSandbox(
            image=runtime.image,
            env=env,
            workdir=runtime.told.workdir,
            limits=self._limits(start.resource_factor),
            labels=self._labels(runtime),
            queue_timeout_s=QUEUE_S,
        )

    def _limits(self, factor: float) -> wire.Limits:
        """The defaults times the factor, at most what this node has."""
        if factor == 1:
            return wire.Limits()
        defaults = self.sandboxes.config.sandbox
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
        return wire.Limits(
            cpus=min(defaults.cpus * factor, float(os.cpu_count() or 1)),
            memory_mb=max(16, min(round(defaults.memory * factor), memory)),
        )

    async def _conceive(self, runtime: Runtime, request: wire.CreateSandbox, here_only: bool) -> Birth:
        """Its sandbox has its name. Promised, so that a server that comes after this one goes on with it."""
        boxes = self.sandboxes
        boxes.check_open()
        if here_only and runtime.image not in await boxes.engine.images():
            said = f"image {runtime.image!r} is not here, and image_pull_policy is Never"
            raise NotFound(said, Code.IMAGE_MISSING)
        birth = await boxes.conceive(request, identity=runtime.id)
        await boxes.ledger.promised(birth)
        return birth

    async def _make(self, runtime: Runtime, conceived: Awaitable[Birth], setup: list[str]) -> None:
        try:
            runtime.birth = await conceived
            box = await self._born(runtime, runtime.birth)
            await self._prepare(runtime, box, setup)
            runtime.box = box
        except SandboxError as error:
            runtime.failure = error
        except Exception as error:  # a mistake of ours: the client must be told, or it waits for an hour
            log.exception("runtime %s could not be made", runtime.id)
            runtime.failure = Gone(f"the server made a mistake: {type(error).__name__}", Code.INTERNAL)
        finally:
            runtime.settled.set()
            if runtime.box is None:
                await asyncio.shield(self._drop(runtime.id))

    async def _born(self, runtime: Runtime, birth: Birth) -> Box:
        """Wait for its place, for as long as anybody asks for it."""
        while not (await asyncio.wait({birth.task}, timeout=LOOK_S))[0]:
            if runtime.abandoned:
                raise Gone("nobody asked for it while it waited for a place", Code.QUEUE_TIMEOUT)
        if birth.task.cancelled():
            raise self.sandboxes.refusal()
        return birth.task.result()

    async def _prepare(self, runtime: Runtime, box: Box, setup: list[str]) -> None:
        """A home that can be written, and what the user's own build would have installed."""
        if runtime.told.dialect.by_path:
            await box.exec(wire.Exec(command='mkdir -p "${HOME:-/root}"', timeout_s=30))
        for command in setup:
            done = await box.exec(wire.Exec(command=command, timeout_s=SETUP_S))
            if not done.ok:
                said = (done.stderr.text or done.stdout.text).strip()[-2000:]
                raise Gone(f"runtime_extra_deps failed with {done.exit_code}: {said}", Code.CREATE_FAILED)

    # --- for the server's own API ---

    def grant(self, box: Box) -> str:
        """A session key for a sandbox that the server's own API made."""
        if box.id not in self._known:
            runtime = Runtime(box.id, box.id, Told(Dialect.OWN, box.workdir), box.image, box)
            runtime.settled.set()
            self._remember(runtime)
            box.labels.update(self._labels(runtime))
        return self.keys.make(box.id)

    # --- pausing, stopping ---

    async def pause(self, runtime: Runtime) -> None:
        """Its key is refused until it is resumed, but not forgotten."""
        if runtime.phase != Phase.READY:
            return
        runtime.refused = True
        with contextlib.suppress(SandboxError):  # where nothing can be frozen, it only looks so
            await self.sandboxes.pause(runtime.id)

    async def resume(self, runtime: Runtime) -> None:
        """Its time to live begins anew."""
        if runtime.phase == Phase.PAUSED and runtime.box is not None:
            await self.sandboxes.resume(runtime.id)
            runtime.refused, runtime.box.used = False, time.monotonic()

    async def stop(self, identity: str | None) -> None:
        """The key goes first. Nothing happens for one that is unknown or over."""
        runtime = self._known.get(identity or "")
        if runtime is None or runtime.stopped:
            return
        self.keys.forget(runtime.id)
        runtime.stopped = True
        runtime.settled.set()
        if (making := self._making.get(runtime.id)) is not None:
            making.cancel()
            await asyncio.gather(making, return_exceptions=True)
        if runtime.box is not None and not runtime.box.reason:
            await self._drop(runtime.box.id)

    async def _drop(self, sandbox: str) -> None:
        with contextlib.suppress(SandboxError):
            await self.sandboxes.delete(sandbox)

    # --- across a restart of the server ---

    def _labels(self, runtime: Runtime) -> dict[str, str]:
        facts = {"id": runtime.id, "session": runtime.session_id, "told": json.dumps(asdict(runtime.told))}
        facts["key_sha256"] = digest(self.keys.make(runtime.id)).hex()
        return {_LABEL + name: value for name, value in facts.items()}

    def _adopt(self) -> None:
        """The runtimes of the sandboxes that a killed server left to this one, those that wait included."""
        for box in self.sandboxes.live:
            if box.id not in self._known and (found := self._restored(box.id, box.image, box.labels)):
                found.box = box
                found.settled.set()
        for birth in self.sandboxes.births.promised:
            labels = birth.request.labels
            if birth.id not in self._known and (found := self._restored(birth.id, birth.image, labels)):
                self._begin(found, self._make(found, _known(birth), []))

    def _restored(self, identity: str, image: str, labels: dict[str, str]) -> Runtime | None:
        """From the labels of its sandbox; None when it is nobody's runtime."""
        if labels.get(_LABEL + "id") != identity:
            return None
        try:
            facts = json.loads(labels[_LABEL + "told"])
            facts |= {"dialect": Dialect(facts["dialect"]), "plugins": tuple(facts["plugins"])}
            runtime = Runtime(identity, labels[_LABEL + "session"], Told(**facts), image)
            self.keys.keep(identity, bytes.fromhex(labels[_LABEL + "key_sha256"]))
        except (ValueError, KeyError, TypeError):
            log.warning("sandbox %s has labels of a runtime that make no sense", identity)
            return None
        self._known[identity] = self._sessions[runtime.session_id] = runtime
        return runtime


async def _known(birth: Birth) -> Birth:
    return birth
