"""Routes of archives: a tar in, a tar out, both streamed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect

from runtime_server import wire
from runtime_server.errors import BadRequest
from runtime_server.packing import ARCHIVE_MAX, begun, pack, unpack
from runtime_server.routes.answers import answer
from runtime_server.sandboxes import Sandboxes

Place = Annotated[str, Query(min_length=1, max_length=4096)]
Most = Annotated[int, Query(ge=0, le=ARCHIVE_MAX)]
PATH = "/v1/sandboxes/{identity}/archive"
TAR = "application/x-tar"
_BYTES = {TAR: {"schema": {"type": "string", "format": "binary"}}}
BODY: dict[str, Any] = {"requestBody": {"required": True, "content": _BYTES}}
FILE: dict[int | str, dict[str, Any]] = {200: {"content": _BYTES}}


def routes(sandboxes: Sandboxes) -> APIRouter:
    router = APIRouter(tags=["files"])

    @router.put(PATH, response_model=wire.Unpacked, openapi_extra=BODY)
    async def unpack_archive(request: Request, identity: str, path: Place) -> Response:
        return answer(await unpack(sandboxes.usable(identity), path, _body(request)))

    @router.get(PATH, response_class=StreamingResponse, responses=FILE)
    async def pack_archive(identity: str, path: Place, max_bytes: Most = ARCHIVE_MAX) -> Response:
        chunks = await begun(pack(sandboxes.usable(identity), path, max_bytes))
        return StreamingResponse(chunks, media_type=TAR)

    return router


async def _body(request: Request) -> AsyncIterator[bytes]:
    try:
        async for data in request.stream():
            yield data
    except ClientDisconnect:
        raise BadRequest("the body ended before it was complete") from None
