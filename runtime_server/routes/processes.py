"""Routes of processes: started, listed, followed, fed, signalled, ended."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Header, Path, Query, Request, Response

from runtime_server import wire
from runtime_server.output import follow as followed
from runtime_server.routes.answers import answer, nothing, streamed, while_connected
from runtime_server.running import Running

Number = Annotated[int, Path(ge=1, le=0xFFFF_FFFF)]
Which = Literal["stdout", "stderr", "both"]
Resume = Annotated[wire.Offset | None, Header(alias="Last-Event-ID")]
WaitS = Annotated[float, Query(ge=0, le=3600)]
BASE = "/v1/sandboxes/{identity}/processes"


def routes(running: Running) -> APIRouter:
    router = APIRouter(tags=["processes"])

    @router.post(BASE, status_code=201, response_model=wire.Process)
    async def start_process(request: Request, identity: str, body: wire.StartProcess) -> Response:
        return await while_connected(request, (await running.of(identity)).start(body), 201)

    @router.get(BASE, response_model=wire.ProcessList)
    async def list_processes(identity: str) -> Response:
        return answer((await running.of(identity)).list())

    @router.get(BASE + "/{number}", response_model=wire.Process)
    async def get_process(request: Request, identity: str, number: Number, wait_s: WaitS = 0) -> Response:
        return await while_connected(request, (await running.of(identity)).get(number).wait(wait_s))

    @router.get(BASE + "/{number}/output", response_model=wire.OutputEvent)
    async def read_process_output(
        request: Request,
        identity: str,
        number: Number,
        offset: wire.Offset = "0",
        stream: Which = "both",
        follow: bool = False,
        resume: Resume = None,
    ) -> Response:
        program, at = (await running.of(identity)).get(number), resume or offset
        events = program.output(at, stream, follow)
        return streamed(request, followed(program.box, events, running.stopping), at)

    @router.post(BASE + "/{number}/stdin", status_code=204)
    async def write_process_stdin(identity: str, number: Number, body: wire.Input) -> Response:
        await (await running.of(identity)).get(number).feed(body)
        return nothing()

    @router.post(BASE + "/{number}/signal", status_code=204)
    async def signal_process(identity: str, number: Number, body: wire.Signal) -> Response:
        await (await running.of(identity)).get(number).signal(body.signal)
        return nothing()

    @router.post(BASE + "/{number}/resize", status_code=204)
    async def resize_process(identity: str, number: Number, body: wire.Terminal) -> Response:
        await (await running.of(identity)).get(number).resize(body)
        return nothing()

    @router.delete(BASE + "/{number}", status_code=204)
    async def delete_process(identity: str, number: Number) -> Response:
        await (await running.of(identity)).delete(number)
        return nothing()

    return router
