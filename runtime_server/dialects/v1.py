"""OpenHands V1 inside a sandbox: what `APIRemoteWorkspace` calls below `/api`.

What it is
    Its client refuses a url with a path, so every sandbox is at the server's own address, and the session
    key, which each call carries, says which one is meant.

What it does not do
    No conversations: they run an agent inside the sandbox, which needs the real agent server there.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Mount, Route

from runtime_server.dialects import door, v1_git
from runtime_server.dialects.common import Fault, answer, read
from runtime_server.dialects.inside import Inside
from runtime_server.dialects.runtimes import Runtimes
from runtime_server.dialects.v1_bash import Ask, Bash, Running
from runtime_server.errors import NotFound, SandboxError

LIMIT_MAX = 100
HELD_S = 0.5


class V1:
    """See the module's docstring."""

    def __init__(self, runtimes: Runtimes) -> None:
        self.runtimes, self.started = runtimes, time.monotonic()

    # --- anybody ---

    async def alive(self, _: Request) -> Response:
        return answer({"status": "ok"})

    async def info(self, _: Request) -> Response:
        uptime = time.monotonic() - self.started
        return answer({"uptime": uptime, "idle_time": 0.0, "title": "Sandbox server", "version": "1.0.0"})

    # --- commands ---

    def _bash(self, request: Request) -> Bash:
        runtime = door.v1(self.runtimes, request)
        box = door.ready(runtime)
        return runtime.part(Bash, lambda: Bash(box))

    def _inside(self, request: Request) -> Inside:
        return Inside(door.ready(door.v1(self.runtimes, request)), self.runtimes.sandboxes.metrics)

    async def start(self, request: Request) -> Response:
        bash = self._bash(request)
        return answer(bash.start(await read(request, Ask)).command())

    async def execute(self, request: Request) -> Response:
        """To its end, all of its output in one event."""
        bash = self._bash(request)
        made = bash.start(await read(request, Ask))
        assert made.task is not None
        await asyncio.shield(made.task)
        joined = {s: "".join(e[s] or "" for e in made.events) or None for s in ("stdout", "stderr")}
        return answer({**made.events[-1], **joined})

    async def search(self, request: Request) -> Response:
        bash, query = self._bash(request), request.query_params
        made = bash.commands.get(_hex(query.get("command_id__eq", "")))
        if made is not None and query.get("sort_order") != "TIMESTAMP_DESC":
            await _news(made, _number(query.get("order__gt"), -1))
        return answer(_page(_events(bash, made, query), query))

    async def event(self, request: Request) -> Response:
        found = self._bash(request).event(_hex(request.path_params["event"]))
        if found is None:
            raise Fault(404, "there is no such event")
        return answer(found)

    async def clear(self, request: Request) -> Response:
        return answer({"cleared_count": self._bash(request).clear()})

    async def stop(self, request: Request) -> Response:
        if not await self._bash(request).stop(_hex(request.path_params["command"])):
            raise Fault(404, "there is no such command")
        return answer({"success": True})

    # --- files ---

    async def upload(self, request: Request) -> Response:
        inside, path = self._inside(request), _absolute(request.query_params.get("path", ""))
        async with request.form(max_files=1, max_fields=10) as form:
            file = form.get("file")
            if not isinstance(file, UploadFile):
                raise Fault(422, "an upload is a multipart form with `file`")
            data = await file.read()
        try:
            await inside.put(path, data)
        except SandboxError as error:
            raise _file_fault(error) from None
        return answer({"success": True, "file_size": len(data)})

    async def download(self, request: Request) -> Response:
        inside, path = self._inside(request), _absolute(request.query_params.get("path", ""))
        try:
            data = await inside.get(path)
        except SandboxError as error:
            raise _file_fault(error) from None
        return Response(data, media_type="application/octet-stream")

    # --- git ---

    async def changes(self, request: Request) -> Response:
        inside, query = self._inside(request), request.query_params
        return answer(await v1_git.changes(inside, _path(request), query.get("ref")))

    async def diff(self, request: Request) -> Response:
        inside, query = self._inside(request), request.query_params
        return answer(await v1_git.diff(inside, _path(request), query.get("ref"), query.get("commit")))

    async def refuse(self, request: Request) -> Response:
        door.ready(door.v1(self.runtimes, request))
        raise Fault(501, "conversations run an agent server inside the sandbox, which this image has none of")

    def routes(self) -> list[BaseRoute]:
        work: list[BaseRoute] = [
            Route("/bash/start_bash_command", self.start, methods=["POST"]),
            Route("/bash/execute_bash_command", self.execute, methods=["POST"]),
            Route("/bash/bash_events/search", self.search),
            Route("/bash/bash_events/{event}", self.event),
            Route("/bash/bash_events", self.clear, methods=["DELETE"]),
            Route("/bash/bash_commands/{command}/stop", self.stop, methods=["POST"]),
            Route("/file/upload", self.upload, methods=["POST"]),
            Route("/file/upload/{path:path}", self.upload, methods=["POST"]),
            Route("/file/download", self.download),
            Route("/file/download/{path:path}", self.download),
            Route("/git/changes", self.changes),
            Route("/git/changes/{path:path}", self.changes),
            Route("/git/diff", self.diff),
            Route("/git/diff/{path:path}", self.diff),
        ]
        return [
            Route("/alive", self.alive),
            Route("/ready", self.alive),
            Route("/server_info", self.info),
            Mount("/api/conversations/{conversation}", routes=[*work, Route("/{rest:path}", self.refuse)]),
            Mount("/api", routes=[*work, Route("/{rest:path}", self.refuse, methods=["GET", "POST"])]),
        ]


async def _news(made: Running, after: int) -> None:
    """A poll waits a little for what it has not seen; the client's own pause is then the only one."""
    made.flush()
    if made.over or len(made.events) > after + 1:
        return
    made.changed.clear()
    try:
        async with asyncio.timeout(min(HELD_S, made.ask.timeout_s / 4)):
            await made.changed.wait()
    except TimeoutError:
        pass


def _events(bash: Bash, made: Running | None, query: Any) -> list[dict[str, Any]]:
    if "command_id__eq" in query:
        found = [made.command(), *made.events] if made else []
    else:
        found = [e for one in bash.commands.values() for e in (one.command(), *one.events)]
    if kind := query.get("kind__eq"):
        found = [e for e in found if e["kind"] == kind]
    if "order__gt" in query:
        after = _number(query["order__gt"], -1)
        found = [e for e in found if e.get("order", 0) > after]
    if since := query.get("timestamp__gte"):
        found = [e for e in found if e["timestamp"] >= since]
    if before := query.get("timestamp__lt"):
        found = [e for e in found if e["timestamp"] < before]
    return found


def _page(found: list[dict[str, Any]], query: Any) -> dict[str, Any]:
    if query.get("sort_order") == "TIMESTAMP_DESC":
        found = found[::-1]
    at = next((n for n, e in enumerate(found) if e["id"] == query.get("page_id")), 0)
    limit = min(max(_number(query.get("limit"), LIMIT_MAX), 1), LIMIT_MAX)
    rest = found[at + limit :]
    return {"items": found[at : at + limit], "next_page_id": rest[0]["id"] if rest else None}


def _number(text: str | None, default: int) -> int:
    try:
        return int(text) if text else default
    except ValueError:
        raise Fault(422, f"{text!r} is no number") from None


def _hex(identity: str) -> str:
    return identity.replace("-", "").lower()


def _path(request: Request) -> str:
    return request.query_params.get("path") or request.path_params.get("path", "") or "."


def _absolute(path: str) -> str:
    if not path.startswith("/") or "\0" in path:
        raise Fault(400, "Path must be absolute")
    return path


def _file_fault(error: SandboxError) -> Exception:
    if isinstance(error, NotFound):
        return Fault(404, "File not found")
    if error.status == 400:
        number = error.detail.get("errno")
        return Fault(400, "Path is a directory" if number == 21 else str(error))
    return error
