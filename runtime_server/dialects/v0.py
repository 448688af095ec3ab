"""OpenHands V0 and the SkyRL fork inside a sandbox: the routes below `/sandbox/{id}`.

What it is
    What an `action_execution_server` in the image would answer. An action that comes again because its answer
    was lost is not done again; a client that leaves ends nothing.

What it does not do
    No MCP servers, no VS Code, no browser.
"""

from __future__ import annotations

import asyncio
import hashlib
import posixpath
import time
from collections.abc import AsyncIterator
from typing import IO
from urllib.parse import quote

from starlette.background import BackgroundTask
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from runtime_server.box import MAX_FILE, Box
from runtime_server.dialects import archive, door
from runtime_server.dialects.common import Fault, Once, answer, gone, read, read_json
from runtime_server.dialects.inside import Inside
from runtime_server.dialects.runtimes import Runtime, Runtimes
from runtime_server.dialects.v0_actions import Actions, Execute, Observation
from runtime_server.errors import SandboxError

BASE = "/sandbox/{runtime}"
REPLAY_S = 90.0
LOST_S = 60.0
CHUNK = 1 << 18
_LIST = 'cd "$1" 2>/dev/null || exit 0; for e in * .[!.]* ..?*; do [ -e "$e" ] || continue; '
_LIST += 'if [ -d "$e" ]; then printf "%s/\\n" "$e"; else printf "%s\\n" "$e"; fi; done'


class _Known(Once[Observation]):
    """Actions with an id: whoever asks again within the time gets the first answer."""


class _Unknown(Once[Observation]):
    """Actions without one: only what runs, or what nobody got, is the same action."""


class V0:
    """See the module's docstring."""

    def __init__(self, runtimes: Runtimes) -> None:
        self.runtimes = runtimes

    # --- anybody ---

    async def alive(self, request: Request) -> Response:
        door.ready(self._any(request))
        return answer({"status": "ok"})

    async def info(self, request: Request) -> Response:
        runtime = self._any(request)
        box, now = door.ready(runtime), time.monotonic()
        idle = 0.0 if box.busy else now - box.used
        return answer({"uptime": now - runtime.born, "idle_time": idle, "resources": {}})

    def _any(self, request: Request) -> Runtime:
        try:
            return self.runtimes.get(request.path_params["runtime"])
        except SandboxError:
            raise Fault(404, "there is no such runtime") from None

    # --- actions ---

    async def execute(self, request: Request) -> Response:
        runtime = door.v0(self.runtimes, request)
        actions = self._actions(runtime, door.ready(runtime))
        asked = (await read(request, Execute)).action
        digest = hashlib.sha256(await request.body()).hexdigest()
        known = asked.id is not None
        once: Once[Observation] = (
            runtime.part(_Known, lambda: _Known(256, REPLAY_S))
            if known
            else runtime.part(_Unknown, lambda: _Unknown(256, LOST_S, lost_only=True))
        )
        key = f"{asked.id}|{asked.timestamp}|{digest}" if known else digest
        try:
            made = await once.do(key, lambda: actions.act(asked), request)
        except SandboxError as error:
            raise gone(error) from None
        return answer(made) if made is not None else Response(status_code=499)  # which nobody reads

    def _actions(self, runtime: Runtime, box: Box) -> Actions:
        return runtime.part(Actions, lambda: Actions(self._inside(box), runtime.told))

    def _inside(self, box: Box) -> Inside:
        return Inside(box, self.runtimes.sandboxes.metrics)

    # --- files ---

    async def upload(self, request: Request) -> Response:
        box = door.ready(door.v0(self.runtimes, request))
        folder = request.query_params.get("destination", "/")
        recursive = request.query_params.get("recursive", "false").lower() == "true"
        if not folder.startswith("/") or "\0" in folder:
            raise Fault(400, "Destination must be an absolute path")
        async with request.form(max_files=1, max_fields=10) as form:
            file = form.get("file")
            if not isinstance(file, UploadFile):
                raise Fault(422, "an upload is a multipart form with `file`")
            name = posixpath.basename(file.filename or "")
            await self._upload(box, file, folder, name, recursive)
        return answer({"filename": name, "destination": folder, "recursive": recursive})

    async def _upload(self, box: Box, file: UploadFile, folder: str, name: str, recursive: bool) -> None:
        if recursive and not name.endswith(".zip"):
            raise Fault(400, "Recursive uploads must be zip files")
        if name in ("", ".", ".."):
            raise Fault(400, "the file has no name")
        if not name.endswith(".zip"):
            await self._inside(box).put(posixpath.join(folder, name), await file.read())
            return
        try:
            await archive.unzip(box, file.file, folder)
        except archive.Refused as error:
            raise Fault(400, str(error)) from None

    async def download(self, request: Request) -> Response:
        box = door.ready(door.v0(self.runtimes, request))
        path = request.query_params.get("path", "")
        if not path.startswith("/") or "\0" in path:
            raise Fault(400, "Path must be an absolute path")
        if not await self._inside(box).kind(path):
            raise Fault(404, "File not found")
        file = await archive.zipped(box, path, MAX_FILE * 4)
        name = posixpath.basename(path.rstrip("/")) or "root"
        headers = {"content-disposition": f"attachment; filename*=utf-8''{quote(name, safe='')}.zip"}
        return StreamingResponse(
            _chunks(file),
            headers=headers,
            media_type="application/zip",
            background=BackgroundTask(file.close),
        )

    async def list_files(self, request: Request) -> Response:
        runtime = door.v0(self.runtimes, request)
        box, body = door.ready(runtime), await read_json(request)
        asked = body.get("path") if isinstance(body, dict) else None
        folder = posixpath.join(runtime.told.workdir, asked if isinstance(asked, str) else "")
        done = await self._inside(box).shell(_LIST, folder)
        return answer(_listed(done.stdout.data.decode(errors="replace").split("\n")))

    # --- what there is none of ---

    async def token(self, request: Request) -> Response:
        door.ready(door.v0(self.runtimes, request))
        return answer({"token": None})

    async def mcp(self, request: Request) -> Response:
        door.ready(door.v0(self.runtimes, request))
        asked = await read_json(request)
        if not isinstance(asked, list):
            raise Fault(400, "Request must be a list of MCP tools to sync")
        problem = "stdio MCP servers do not run in these sandboxes" if asked else ""
        return answer({"detail": "MCP server updated successfully", "router_error_log": problem})

    def routes(self) -> list[Route]:
        return [
            Route(f"{BASE}/alive", self.alive),
            Route(f"{BASE}/server_info", self.info),
            Route(f"{BASE}/execute_action", self.execute, methods=["POST"]),
            Route(f"{BASE}/upload_file", self.upload, methods=["POST"]),
            Route(f"{BASE}/download_files", self.download),
            Route(f"{BASE}/list_files", self.list_files, methods=["POST"]),
            Route(f"{BASE}/vscode/connection_token", self.token),
            Route(f"{BASE}/update_mcp_server", self.mcp, methods=["POST"]),
        ]


def _listed(names: list[str]) -> list[str]:
    """Directories first; each kind in the order of a person's alphabet."""
    return sorted((name for name in names if name), key=lambda name: (not name.endswith("/"), name.lower()))


async def _chunks(file: IO[bytes]) -> AsyncIterator[bytes]:
    while chunk := await asyncio.to_thread(file.read, CHUNK):
        yield chunk
