"""Routes of sessions: opened, listed, run in, typed to, interrupted, closed."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query, Request, Response

from runtime_server import wire
from runtime_server.output import follow as followed
from runtime_server.routes.answers import answer, nothing, streamed, while_connected
from runtime_server.routes.processes import Resume, Which
from runtime_server.running import Running
from runtime_server.sessions import Shells

Name = Annotated[wire.SessionName, Path()]
Command = Annotated[int | None, Query(ge=1)]
BASE = "/v1/sandboxes/{identity}/sessions"


def routes(shells: Shells, running: Running) -> APIRouter:
    router = APIRouter(tags=["sessions"])

    @router.post(BASE, status_code=201, response_model=wire.Session)
    async def open_session(request: Request, identity: str, body: wire.OpenSession) -> Response:
        return await while_connected(request, (await shells.of(identity)).open(body), 201)

    @router.get(BASE, response_model=wire.SessionList)
    async def list_sessions(identity: str) -> Response:
        return answer((await shells.of(identity)).list())

    @router.get(BASE + "/{name}", response_model=wire.Session)
    async def get_session(identity: str, name: Name) -> Response:
        return answer((await shells.of(identity)).get(name).record())

    @router.delete(BASE + "/{name}", status_code=204)
    async def close_session(identity: str, name: Name) -> Response:
        await (await shells.of(identity)).delete(name)
        return nothing()

    _add_commands(router, shells, running)
    return router


def _add_commands(router: APIRouter, shells: Shells, running: Running) -> None:
    @router.post(BASE + "/{name}/run", response_model=wire.SessionResult)
    async def run_in_session(request: Request, identity: str, name: Name, body: wire.Run) -> Response:
        session = (await shells.of(identity)).get(name)
        if not body.stream:
            return await while_connected(request, session.run(body))
        await session.ready()
        return streamed(request, followed(session.box, session.stream(body)))

    @router.post(BASE + "/{name}/rest", response_model=wire.SessionResult)
    async def wait_for_rest(request: Request, identity: str, name: Name, body: wire.Rest) -> Response:
        session = (await shells.of(identity)).get(name)
        return await while_connected(request, session.rest(body.timeout_s))

    @router.get(BASE + "/{name}/output", response_model=wire.OutputEvent)
    async def read_session_output(
        request: Request,
        identity: str,
        name: Name,
        command: Command = None,
        offset: wire.Offset = "0",
        stream: Which = "both",
        follow: bool = False,
        resume: Resume = None,
    ) -> Response:
        session, at = (await shells.of(identity)).get(name), resume or offset
        events = session.output(command, at, stream, follow)
        return streamed(request, followed(session.box, events, running.stopping), at)

    @router.post(BASE + "/{name}/interrupt", response_model=wire.Interrupted)
    async def interrupt_session(
        request: Request, identity: str, name: Name, body: wire.Interrupt
    ) -> Response:
        session = (await shells.of(identity)).get(name)
        return await while_connected(request, session.interrupt(body.grace_s))

    @router.post(BASE + "/{name}/input", status_code=204)
    async def write_session_input(identity: str, name: Name, body: wire.Input) -> Response:
        await (await shells.of(identity)).get(name).feed(body)
        return nothing()

    @router.post(BASE + "/{name}/resize", status_code=204)
    async def resize_session(identity: str, name: Name, body: wire.Terminal) -> Response:
        await (await shells.of(identity)).get(name).resize(body)
        return nothing()
