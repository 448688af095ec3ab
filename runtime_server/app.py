"""The HTTP API: routes of one line each, over `Sandboxes`.

How to use it
    app = create_app(config, key=key, identity=Identity(run_id=...))   # an ASGI application
    `python -m runtime_server` runs it under uvicorn.

What it does not do
    It decides nothing: authentication and body limits are `gate.py`'s, all else is `sandboxes.py`'s. No
    signals, no files.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

from fastapi import FastAPI, Header, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from orchestrator.schema import Runtime
from runtime_server import wire
from runtime_server.agent.build import agent_binary
from runtime_server.dialects.common import base_url
from runtime_server.dialects.front import Front
from runtime_server.dialects.images import Aliases
from runtime_server.dialects.runtimes import Runtimes
from runtime_server.engines.choice import engine_of
from runtime_server.errors import BY_STATUS, BadRequest, Internal, SandboxError
from runtime_server.gate import Gate, read_body
from runtime_server.idempotency import Idempotency
from runtime_server.image_store import default_store
from runtime_server.openapi import document, methods_of
from runtime_server.quick import Quick
from runtime_server.routes import archives, lifecycle, processes, sessions
from runtime_server.routes.answers import answer, while_connected
from runtime_server.running import Running
from runtime_server.sandboxes import Sandboxes
from runtime_server.sessions import Shells

Key = Annotated[str | None, Header(alias=wire.IDEMPOTENCY_HEADER, min_length=1, max_length=wire.KEY_MAX)]
Path_ = Annotated[str, Query(alias="path", min_length=1, max_length=4096)]
Mode = Annotated[str, Query(pattern=r"^[0-7]{3,4}$")]


def package_version() -> str:
    try:
        return version("orchestrate-rl")
    except PackageNotFoundError:  # run from a checkout that was never installed
        return "0"


@dataclass(frozen=True)
class Identity:
    """Who answers: what `/health` says to those who have the key."""

    run_id: str = ""
    attempt: int = 0
    nonce: str = ""


class Api:
    """What the routes call. Every answer is a `Response`, so nothing is checked or copied twice."""

    def __init__(self, sandboxes: Sandboxes, identity: Identity, runtimes: Runtimes) -> None:
        self.sandboxes, self.identity, self.runtimes = sandboxes, identity, runtimes
        self.version, self.started = package_version(), time.monotonic()

    def health(self, known: bool) -> Response:
        who, boxes = self.identity, self.sandboxes
        if not known:
            return Response(f'{{"status":"{boxes.state}"}}', media_type="application/json")
        return answer(
            wire.Health(
                status=boxes.state,
                version=self.version,
                run_id=who.run_id,
                attempt=who.attempt,
                nonce=who.nonce,
                sandboxes=len(boxes.live),
                uptime_s=time.monotonic() - self.started,
            )
        )

    async def create(self, body: wire.CreateSandbox, key: str | None, base: str) -> wire.Sandbox:
        record = await self.sandboxes.create(body, key)
        if not body.session_key:
            return record
        given = self.runtimes.grant(self.sandboxes.get(record.id))
        url = f"{base}/sandbox/{record.id}/swerex"
        return record.model_copy(update={"session_key": given, "swerex_url": url})

    async def write(self, request: Request, identity: str, path: str, mode: str) -> Response:
        box = self.sandboxes.usable(identity)
        data = await read_body(request)
        return answer(await box.write_file(path, data, int(mode, 8)))

    async def read(self, identity: str, path: str) -> Response:
        data = await self.sandboxes.usable(identity).read_file(path)
        return Response(data, media_type="application/octet-stream")

    async def kill(self, identity: str) -> Response:
        await self.sandboxes.usable(identity).kill()
        return Response(status_code=204)

    async def delete(self, identity: str) -> Response:
        await self.sandboxes.delete(identity)
        return Response(status_code=204)


def create_app(
    config: Runtime, *, key: str, identity: Identity | None = None, sandboxes: Sandboxes | None = None
) -> FastAPI:
    """The application. Its lifespan starts the sandboxes when nobody has, and always stops them."""
    boxes = sandboxes if sandboxes is not None else default_sandboxes(config)
    runtimes = Runtimes(boxes, Aliases(aliases_of(config)))
    api = Api(boxes, identity or Identity(), runtimes)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await boxes.start()
        try:
            yield
        finally:
            await boxes.stop()

    app = FastAPI(
        title="Sandbox server", version=api.version, lifespan=lifespan, docs_url=None, redoc_url=None
    )
    app.add_middleware(Idempotency)  # behind the gate
    refused = Refusals(boxes)
    app.add_middleware(Quick, boxes=boxes, refused=refused)
    app.add_middleware(Gate, key=key)
    app.add_middleware(Front, runtimes=runtimes, key=key)  # outside of the gate: it has keys of its own
    _add_routes(app, api)
    lifecycle.add_routes(app, boxes)
    running = Running(boxes)
    for router in (
        processes.routes(running),
        sessions.routes(Shells(boxes), running),
        archives.routes(boxes),
    ):
        app.include_router(router)
    _add_errors(app, refused)
    app.openapi = lambda: document(app)  # type: ignore[method-assign]
    return app


def default_sandboxes(config: Runtime, claim: str = "") -> Sandboxes:
    """Of the engine that is configured, with the agent of this machine and the image store of this user.

    With a `claim` it takes over what a killed server of the same claim left on this node.
    """
    return Sandboxes(config, engine_of(config, agent_binary(), store_of(config), claim))


def store_of(config: Runtime) -> Path:
    return Path(config.image_store) if config.image_store else default_store()


def aliases_of(config: Runtime) -> Path | None:
    """Beside the images they stand for; None where there is no such place."""
    folder = store_of(config).parent
    return folder / "image_aliases.jsonl" if folder.is_dir() else None


def _add_routes(app: FastAPI, api: Api) -> None:
    boxes = api.sandboxes
    queue, serialise = (boxes.metrics.exec_phase[name] for name in ("queue", "serialise"))

    # what is not `quick.py`'s of it; first, for routes are tried in order
    @app.post("/v1/sandboxes/{identity}/exec")
    async def exec_(request: Request, identity: str, body: wire.Exec) -> Response:
        queue.observe(time.perf_counter() - request.scope["received"])
        key = request.headers.get(wire.IDEMPOTENCY_HEADER, "")
        return await while_connected(request, boxes.exec(identity, body, key), made=serialise.observe)

    @app.get("/health")
    async def health(request: Request) -> Response:
        return api.health(known=bool(request.scope.get("authorized")))

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(boxes.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/capabilities")
    async def capabilities() -> Response:
        return answer(await boxes.capabilities(api.version))

    @app.post("/v1/sandboxes")
    async def create(request: Request, body: wire.CreateSandbox, key: Key = None) -> Response:
        return await lifecycle.created(request, api.create(body, key, base_url(request)))

    @app.get("/v1/sandboxes")
    async def list_() -> Response:
        return answer(boxes.list())

    @app.get("/v1/sandboxes/{identity}")
    async def get(identity: str) -> Response:
        return answer(boxes.record(identity))

    @app.delete("/v1/sandboxes/{identity}")
    async def delete(identity: str) -> Response:
        return await api.delete(identity)

    @app.post("/v1/sandboxes/{identity}/renew")
    async def renew(identity: str, body: wire.Renew) -> Response:
        return answer(await boxes.renew(identity, body.ttl_s))

    @app.post("/v1/sandboxes/{identity}/kill")
    async def kill(identity: str) -> Response:
        return await api.kill(identity)

    @app.put("/v1/sandboxes/{identity}/files")
    async def write(request: Request, identity: str, path: Path_, mode: Mode = "644") -> Response:
        return await api.write(request, identity, path, mode)

    @app.get("/v1/sandboxes/{identity}/files")
    async def read(identity: str, path: Path_) -> Response:
        return await api.read(identity, path)


class Refusals:
    """Errors as answers, and counted."""

    def __init__(self, boxes: Sandboxes) -> None:
        self._errors = boxes.metrics.errors

    def __call__(self, error: SandboxError) -> Response:
        return self.of(error, {"Retry-After": "5"} if error.status == 503 else None)

    def of(self, error: SandboxError, headers: dict[str, str] | None = None) -> Response:
        self._errors.labels(error.code).inc()
        response = answer(wire.Failed(error=error.failure()), error.status)
        response.headers.update(headers or {})
        return response


def _add_errors(app: FastAPI, refused: Refusals) -> None:
    @app.exception_handler(SandboxError)
    async def known(_: Request, error: SandboxError) -> Response:
        return refused(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return refused.of(BadRequest(_complaints(error)))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        kind = BY_STATUS.get(error.status_code, BadRequest)
        raised = kind(f"{request.method} {request.url.path}: {error.detail}")
        raised.status = error.status_code
        allowed = methods_of(app, request.url.path) if error.status_code == 405 else set()
        return refused.of(raised, {"Allow": ", ".join(sorted(allowed))} if allowed else None)

    @app.exception_handler(Exception)
    async def unknown(_: Request, error: Exception) -> Response:  # uvicorn's log has the traceback
        return refused.of(Internal(f"the server made a mistake ({type(error).__name__}); its log says more"))


def _complaints(error: RequestValidationError) -> str:
    """Which field is wrong and why; the value itself is left out, for it may be a secret."""
    lines = [f"{'.'.join(str(part) for part in e['loc'][1:]) or 'body'}: {e['msg']}" for e in error.errors()]
    return "the request is not valid: " + "; ".join(lines[:5])
