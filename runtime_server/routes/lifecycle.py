"""Routes of snapshots, forks, pauses, prefetch and capacity: a line each, over `Sandboxes` and `Branching`.

What it does not do
    Making, finding and deleting a sandbox are `app.py`'s; what runs in one has routes of its own.
"""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

from fastapi import FastAPI, Request, Response

from runtime_server.branching import Branching
from runtime_server.routes.answers import answer, while_connected
from runtime_server.sandboxes import Sandboxes
from runtime_server.wire import Sandbox
from runtime_server.wire_lifecycle import Fork, Prefetch, TakeSnapshot


async def created(request: Request, work: Coroutine[Any, Any, Sandbox]) -> Response:
    """201; 202 for a sandbox that was promised and does not run yet."""
    made: list[Sandbox] = []

    async def remembered() -> Sandbox:
        made.append(await work)
        return made[0]

    response = await while_connected(request, remembered(), 201)
    if made and made[0].state in ("queued", "starting"):
        response.status_code = 202
    return response


def add_routes(app: FastAPI, boxes: Sandboxes) -> None:
    branching = Branching(boxes)

    @app.post("/v1/sandboxes/{identity}/snapshot", status_code=201)
    async def snapshot(request: Request, identity: str, body: TakeSnapshot | None = None) -> Response:
        return await while_connected(request, branching.snapshot(identity, body or TakeSnapshot()), 201)

    @app.post("/v1/sandboxes/{identity}/fork", status_code=201)
    async def fork(request: Request, identity: str, body: Fork | None = None) -> Response:
        return await while_connected(request, branching.fork(identity, body or Fork()), 201)

    @app.get("/v1/snapshots")
    async def snapshots() -> Response:
        return answer(branching.all())

    @app.get("/v1/snapshots/{identity}")
    async def one_snapshot(identity: str) -> Response:
        return answer(branching.get(identity))

    @app.delete("/v1/snapshots/{identity}", status_code=204)
    async def delete_snapshot(identity: str) -> Response:
        await branching.delete(identity)
        return Response(status_code=204)

    @app.post("/v1/sandboxes/{identity}/pause")
    async def pause(identity: str) -> Response:
        return answer(await boxes.pause(identity))

    @app.post("/v1/sandboxes/{identity}/resume")
    async def resume(identity: str) -> Response:
        return answer(await boxes.resume(identity))

    @app.post("/v1/prefetch")
    async def prefetch(body: Prefetch) -> Response:
        return answer(await branching.prefetch(body))

    @app.get("/v1/capacity")
    async def capacity() -> Response:
        return answer(await branching.capacity())
