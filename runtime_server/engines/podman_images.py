"""The images of one Podman service: looked up once at a time, pulled under a budget.

What it is
    `Images.image` answers what an image is; one look-up at a time for each name, believed for a while,
    so that a batch of sandboxes with one new image is one pull. What we pulled ourselves is removed again,
    the longest unused first, when all of it together passes the budget; what was here before never is.

What it does not do
    It makes no image, and reads no registry itself: Podman pulls, by its own configuration.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import Counter
from urllib.parse import quote

from runtime_server.engines import Image
from runtime_server.engines.layers import stack
from runtime_server.engines.podman_api import Api
from runtime_server.errors import NotFound, SandboxError
from runtime_server.wire import Code

KNOWN_S = 30.0  # how long an answer about an image is believed
KNOWN_MAX = 1000


class Images:
    """See the module's docstring. `budget`: bytes of what was pulled here; 0 is no limit."""

    def __init__(self, api: Api, budget: int, pull_s: float) -> None:
        self._api, self._budget, self._pull_s = api, budget, pull_s
        self._known: dict[str, tuple[float, asyncio.Task[Image]]] = {}
        self._pulled: dict[str, tuple[int, float]] = {}  # by id: bytes, when it was used last
        self._users: Counter[str] = Counter()

    async def names(self) -> list[str]:
        rows = await self._api.json("GET", "/images/json")
        names = {name for row in rows for name in row.get("Names") or row.get("RepoTags") or []}
        return sorted(name for name in names if "<none>" not in name)

    async def image(self, name: str) -> Image:
        """NotFound (image_missing) says what was tried."""
        known = self._known.get(name)
        if known is None or (known[0] < time.monotonic() and known[1].done()):
            known = (time.monotonic() + KNOWN_S, asyncio.create_task(self._look_up(name)))
            self._known[name] = known
            if len(self._known) > KNOWN_MAX:
                self._known.pop(next(iter(self._known)))
        try:
            image = await asyncio.shield(known[1])
        except NotFound:
            raise
        except SandboxError:  # that Podman did not answer is true of that moment only
            if self._known.get(name) is known:
                del self._known[name]
            raise
        if image.id in self._pulled:
            self._pulled[image.id] = (self._pulled[image.id][0], time.monotonic())
        return image

    def hold(self, image: str) -> None:
        """Somebody uses it: it stays whatever the budget says."""
        self._users[image] += 1

    def release(self, image: str) -> None:
        self._users[image] -= 1

    async def _look_up(self, name: str) -> Image:
        try:
            return await self._inspect(name)
        except NotFound:
            problem = await self._pull(name)
        try:
            image = await self._inspect(name)
        except NotFound:
            here = ", ".join(await self.names()) or "none"
            said = f"image {name!r} is not here{problem}. Images here: {here}"
            raise NotFound(said, Code.IMAGE_MISSING) from None
        await self._count(image.id)
        return image

    async def _inspect(self, name: str) -> Image:
        data = await self._api.json("GET", f"/images/{quote(name, safe='')}/json")
        wanted = data.get("Config") or {}
        user = str(wanted.get("User") or "0").split(":")[0]
        pairs = [entry.partition("=") for entry in wanted.get("Env") or []]
        return Image(
            data["Id"],
            name,
            wanted.get("WorkingDir") or "/",
            user in ("0", "root"),
            stack(data.get("GraphDriver") or {}),
            {name: value for name, _, value in pairs},
        )

    # --- pulling ---

    async def _pull(self, name: str) -> str:
        """Local images have no registry. Returns why it failed."""
        if name.startswith("localhost/"):
            return ""
        try:
            params = {"reference": name, "policy": "missing", "quiet": True}
            answer = await self._api.call("POST", "/images/pull", params=params, timeout_s=self._pull_s)
            problem = _pull_error(answer.text)
            return f", and it could not be pulled ({problem})" if problem else ""
        except SandboxError as error:
            return f", and it could not be pulled ({error})"

    async def _count(self, image: str) -> None:
        """One more that was pulled: make room for it at the cost of others."""
        with contextlib.suppress(SandboxError):
            data = await self._api.json("GET", f"/images/{image}/json")
            self._pulled[image] = (int(data.get("Size") or 0), time.monotonic())
        for victim in self.victims(image):
            await self._remove(victim)

    def victims(self, keep: str) -> list[str]:
        """Whom the budget costs its place, the longest unused first."""
        left = sum(size for size, _ in self._pulled.values()) - self._budget
        found: list[str] = []
        for image, (size, _) in sorted(self._pulled.items(), key=lambda item: item[1][1]):
            if not self._budget or left <= 0:
                break
            if image != keep and not self._users[image]:
                found.append(image)
                left -= size
        return found

    async def _remove(self, image: str) -> None:
        self._pulled.pop(image, None)
        self._known = {n: k for n, k in self._known.items() if not _is(k[1], image)}
        with contextlib.suppress(SandboxError):
            await self._api.call("DELETE", f"/images/{image}", params={"force": False})


def _is(task: asyncio.Task[Image], image: str) -> bool:
    return task.done() and not task.cancelled() and task.exception() is None and task.result().id == image


def _pull_error(text: str) -> str:
    """Podman says 200 and then how it went, one JSON object a line."""
    for line in text.splitlines():
        with contextlib.suppress(ValueError, AttributeError):
            if error := json.loads(line).get("error"):
                return str(error)[:300]
    return ""
