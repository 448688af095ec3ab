"""The control API: what OpenHands' clients and the SkyRL fork ask before and after they use a sandbox.

What it is
    One method a route; `routes` lists them. Every one needs the server's own key in `X-API-Key`, which
    `front.py` has checked. `/start` waits for readiness, but less long than its client does; a full server
    answers `pending`, never 429: the client's own patience is the queue.

What it does not do
    No image is built (`images.py` says what `/build` does instead), and no mount is ever made.
"""

from __future__ import annotations

import asyncio
import secrets
from typing import Annotated, Any

from pydantic import BaseModel, Field
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from runtime_server.dialects.common import Fault, answer, base_url, read
from runtime_server.dialects.images import PREFIX, Base, NotBuildable, base_of, dockerfile_of, full_name
from runtime_server.dialects.keys import digest
from runtime_server.dialects.records import Phase, record
from runtime_server.dialects.runtimes import Runtime, Runtimes
from runtime_server.dialects.start import Hold, Start, hold_of

BUILDS_KEPT = 1000
LOOK_S = 4.0  # the shortest limit of any client here is 10 s
PULL_S = 1700.0
_BORN = "2025-01-01T00:00:00Z"  # clients print when an image was made, and refuse its absence


class Named(BaseModel):
    """Body of /stop, /pause, /resume."""

    runtime_id: Annotated[str, Field(max_length=200)] | None = None


class Control:
    """See the module's docstring."""

    def __init__(self, runtimes: Runtimes, key: str) -> None:
        self.runtimes = runtimes
        self._key = digest(key)
        self._builds: dict[str, dict[str, Any]] = {}

    # --- runtimes ---

    async def start(self, request: Request) -> Response:
        body = await read(request, Start)
        runtime = self.runtimes.start(body, self._is_key)
        await runtime.hold(self._hold(runtime, request).start)
        return self._record(runtime, request)

    async def session(self, request: Request) -> Response:
        runtime = self.runtimes.of_session(request.path_params["session"])
        if runtime is None:
            raise Fault(404, "no runtime for this session")
        await runtime.hold(self._hold(runtime, request).look if runtime.phase == Phase.PENDING else 0)
        return self._record(runtime, request)

    async def batch(self, request: Request) -> Response:
        found = [self.runtimes.of_session(name) for name in request.query_params.getlist("ids")]
        return answer([self._view(runtime, request) for runtime in found if runtime])

    async def runtime(self, request: Request) -> Response:
        runtime = self.runtimes.get(request.path_params["runtime"])
        await runtime.hold(self._hold(runtime, request).look if runtime.phase == Phase.PENDING else 0)
        return self._record(runtime, request)

    async def listing(self, request: Request) -> Response:
        views = [self._view(runtime, request) for runtime in self.runtimes.all() if runtime.phase.lives]
        return answer({"total": len(views), "runtimes": views})

    async def stop(self, request: Request) -> Response:
        await self.runtimes.stop((await read(request, Named)).runtime_id)
        return answer({"status": "success"})

    async def pause(self, request: Request) -> Response:
        runtime = self._alive((await read(request, Named)).runtime_id)
        await self.runtimes.pause(runtime)
        return self._record(runtime, request)

    async def resume(self, request: Request) -> Response:
        runtime = self._alive((await read(request, Named)).runtime_id)
        await self.runtimes.resume(runtime)
        return self._record(runtime, request)

    def _alive(self, identity: str | None) -> Runtime:
        runtime = self.runtimes.get(identity or "")
        if not runtime.phase.lives:
            raise Fault(404, f"runtime {identity} is over: {runtime.end or 'it was stopped'}")
        return runtime

    def _is_key(self, value: str) -> bool:
        """Whether somebody is about to put the server's key into a sandbox."""
        return secrets.compare_digest(digest(value), self._key)

    def _hold(self, runtime: Runtime, request: Request) -> Hold:
        agent = request.headers.get("user-agent", "")
        return hold_of(runtime.told.dialect, agent, float(self.runtimes.sandboxes.config.start_hold))

    def _record(self, runtime: Runtime, request: Request) -> Response:
        return answer(self._view(runtime, request))

    def _view(self, runtime: Runtime, request: Request) -> dict[str, Any]:
        return record(self.runtimes.view(runtime, base_url(request)))

    # --- images ---

    async def prefix(self, _: Request) -> Response:
        return answer({"registry_prefix": PREFIX})

    async def image_exists(self, request: Request) -> Response:
        name = request.query_params.get("image", "")
        patient = _is_true(request, "pull_from_repo")
        there = name in self.runtimes.aliases or await self._is_here(name, patient)
        found = {"image": {"upload_time": _BORN, "image_size_bytes": 0}} if there else {}
        return answer({"exists": there, "url": base_url(request), **found})

    async def _is_here(self, name: str, patient: bool) -> bool:
        """What is still being fetched after a moment counts as there: `/start` waits for it."""
        if not name or name.startswith(f"{PREFIX}/"):
            return False
        looking = asyncio.ensure_future(self.runtimes.sandboxes.engine.image(full_name(name)))
        looking.add_done_callback(lambda task: task.cancelled() or task.exception())  # it may fail unwatched
        done, _ = await asyncio.wait({looking}, timeout=PULL_S if patient else LOOK_S)
        return not done or looking.exception() is None

    async def build(self, request: Request) -> Response:
        async with request.form(max_files=4, max_fields=100) as form:
            context, target = form.get("context"), form.get("target_image")
            if not isinstance(context, UploadFile) or not isinstance(target, str) or not target:
                raise Fault(422, "a build is a multipart form with `context` (a file) and `target_image`")
            tags = [tag for tag in form.getlist("tags") if isinstance(tag, str)]
            status = await self._built(context, [target, *tags])
        identity = f"b-{secrets.token_hex(6)}"
        self._builds[identity] = status
        if len(self._builds) > BUILDS_KEPT:
            self._builds.pop(next(iter(self._builds)))
        return answer({"build_id": identity, "url": base_url(request)})

    async def _built(self, context: UploadFile, names: list[str]) -> dict[str, Any]:
        """Which image the tags stand for from now on; in a thread, for the archive may be large."""

        def work() -> Base:
            found = base_of(dockerfile_of(context.file))
            self.runtimes.aliases.add(names, found)
            return found

        try:
            await asyncio.to_thread(work)
        except NotBuildable as error:
            return {"status": "FAILURE", "error": str(error)}
        return {"status": "SUCCESS", "image": names[0]}

    async def build_status(self, request: Request) -> Response:
        found = self._builds.get(request.query_params.get("build_id", ""))
        if found is None:
            found = {"status": "EXPIRED", "error": "this server knows no such build; post it again"}
        return answer(found)

    def routes(self) -> list[Route]:
        return [
            Route("/start", self.start, methods=["POST"]),
            Route("/sessions/batch", self.batch),  # before the next, which would take it for a session
            Route("/sessions/{session}", self.session),
            Route("/runtime/{runtime}", self.runtime),
            Route("/stop", self.stop, methods=["POST"]),
            Route("/pause", self.pause, methods=["POST"]),
            Route("/resume", self.resume, methods=["POST"]),
            Route("/list", self.listing),
            Route("/registry_prefix", self.prefix),
            Route("/image_exists", self.image_exists),
            Route("/build", self.build, methods=["POST"]),
            Route("/build_status", self.build_status),
        ]


def _is_true(request: Request, name: str) -> bool:
    return request.query_params.get(name, "").lower() in ("true", "1")
