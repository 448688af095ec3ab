"""SWE-ReX inside a sandbox: the routes that its `RemoteRuntime` calls below `/sandbox/{id}/swerex`.

What it is
    Each POST is done once for each `X-Request-ID`, and its answer kept, failures included. A failure is
    HTTP 511 with the name of an exception that the client raises. A client that leaves ends nothing.

What it does not do
    No shells (`swerex_session.py`), and none of the fixed waits of the real server.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from pydantic import BaseModel, Field
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from runtime_server.agent import AgentError, Finished
from runtime_server.box import SHELL, Box
from runtime_server.dialects import archive, door
from runtime_server.dialects.common import Fault, Once, answer, read
from runtime_server.dialects.inside import FOREVER_S, Inside, exit_status, started
from runtime_server.dialects.records import Phase, infra
from runtime_server.dialects.runtimes import Runtime, Runtimes
from runtime_server.dialects.swerex_session import Action, Close, Create, Raised, Sessions
from runtime_server.errors import NotFound, SandboxError

BASE = "/sandbox/{runtime}/swerex"
KEPT = 256


class Command(BaseModel):
    """As `subprocess.run` would take it."""

    command: str | list[str]
    timeout: Annotated[float, Field(gt=0)] | None = None
    shell: bool = False
    check: bool = False
    error_msg: str = ""
    env: dict[str, str] | None = None
    cwd: str | None = None
    merge_output_streams: bool = False

    def argv(self) -> list[str]:
        words = [self.command] if isinstance(self.command, str) else self.command
        argv = [SHELL, "-c", *words] if self.shell else [*words]
        if self.env is not None:  # it replaces the environment
            argv = ["/usr/bin/env", "-i", *(f"{name}={value}" for name, value in self.env.items()), *argv]
        return [SHELL, "-c", 'exec "$@" 2>&1', "sh", *argv] if self.merge_output_streams else argv


class ReadFile(BaseModel):
    path: str
    encoding: str | None = None
    errors: str | None = None


class WriteFile(BaseModel):
    path: str
    content: str


Reply = tuple[int, dict[str, Any]]


class SweRex:
    """See the module's docstring."""

    def __init__(self, runtimes: Runtimes) -> None:
        self.runtimes = runtimes

    # --- what answers at once ---

    async def root(self, request: Request) -> Response:
        door.swerex(self.runtimes, request)
        return answer({"message": "hello world"})

    async def is_alive(self, request: Request) -> Response:
        runtime = door.swerex(self.runtimes, request)
        end = runtime.end
        alive = runtime.phase == Phase.READY
        return answer({"is_alive": alive, "message": "" if alive else f"{end or runtime.phase.value}"})

    # --- what is done once ---

    async def create_session(self, request: Request) -> Response:
        runtime, body = self._open(request), await read(request, Create)
        return await self._once(request, runtime, lambda box: self._sessions(runtime, box).create(body))

    async def run_in_session(self, request: Request) -> Response:
        runtime, body = self._open(request), await read(request, Action)
        return await self._once(request, runtime, lambda box: self._sessions(runtime, box).run(body.root))

    async def close_session(self, request: Request) -> Response:
        runtime, body = self._open(request), await read(request, Close)
        return await self._once(request, runtime, lambda box: self._sessions(runtime, box).close(body))

    async def execute(self, request: Request) -> Response:
        runtime, body = self._open(request), await read(request, Command)
        return await self._once(request, runtime, lambda box: self._execute(box, body))

    async def read_file(self, request: Request) -> Response:
        runtime, body = self._open(request), await read(request, ReadFile)
        return await self._once(request, runtime, lambda box: self._read(box, body))

    async def write_file(self, request: Request) -> Response:
        runtime, body = self._open(request), await read(request, WriteFile)
        return await self._once(request, runtime, lambda box: self._write(box, body))

    async def close(self, request: Request) -> Response:
        runtime = self._open(request)
        return await self._once(request, runtime, lambda box: self._sessions(runtime, box).close_all())

    async def upload(self, request: Request) -> Response:
        runtime = self._open(request)
        async with request.form(max_files=1, max_fields=10) as form:
            file, target = form.get("file"), form.get("target_path")
            if not isinstance(file, UploadFile) or not isinstance(target, str):
                raise Fault(422, "an upload is a multipart form with `file` and `target_path`")
            unzip = str(form.get("unzip", "false")).lower() == "true"
            return await self._once(request, runtime, lambda box: self._upload(box, file, target, unzip))

    # --- doing it ---

    def _open(self, request: Request) -> Runtime:
        return door.swerex(self.runtimes, request)

    def _inside(self, box: Box) -> Inside:
        return Inside(box, self.runtimes.sandboxes.metrics)

    def _sessions(self, runtime: Runtime, box: Box) -> Sessions:
        return runtime.part(Sessions, lambda: Sessions(self._inside(box)))

    async def _once(
        self, request: Request, runtime: Runtime, work: Callable[[Box], Awaitable[dict[str, Any]]]
    ) -> Response:
        once: Once[Reply] = runtime.part(Once, lambda: Once[Reply](KEPT))
        key = request.headers.get("x-request-id") or secrets.token_hex(8)
        reply = await once.do(key, lambda: _reply(runtime, work), request)
        return answer(reply[1], reply[0]) if reply else Response(status_code=499)  # which nobody reads

    async def _execute(self, box: Box, command: Command) -> dict[str, Any]:
        inside, argv = self._inside(box), command.argv()
        if not argv or not argv[0]:
            raise Raised("builtins.ValueError", "the command is empty: name a program")
        try:
            done = await inside.run(argv, cwd=command.cwd, timeout_s=command.timeout or FOREVER_S)
        except NotFound as error:
            raise _missing(str(command.cwd)) from error
        if done.timed_out:
            raise Raised.swerex(
                "CommandTimeoutError", f"Timeout ({command.timeout}s) exceeded while running command"
            )
        if not started(done):
            raise _missing(argv[0])
        return _result(command, done)

    async def _read(self, box: Box, body: ReadFile) -> dict[str, Any]:
        data = await _file(body.path, self._inside(box).get(body.path))
        try:
            text = data.decode(body.encoding or "utf-8", body.errors or "strict")
        except LookupError as error:
            raise Raised("builtins.LookupError", str(error)) from None
        except UnicodeError as error:
            raise Raised("builtins.UnicodeError", str(error)) from None
        return {"content": text.replace("\r\n", "\n").replace("\r", "\n")}

    async def _write(self, box: Box, body: WriteFile) -> dict[str, Any]:
        await _file(
            body.path, self._inside(box).put(body.path, body.content.encode("utf-8", "backslashreplace"))
        )
        return {}

    async def _upload(self, box: Box, file: UploadFile, target: str, unzip: bool) -> dict[str, Any]:
        if unzip:
            await archive.unzip(box, file.file, target)
        else:
            await _file(target, self._inside(box).put(target, await file.read()))
        return {}

    def routes(self) -> list[Route]:
        posts = (
            self.create_session, self.run_in_session, self.close_session, self.execute, self.read_file,
            self.write_file, self.upload, self.close,
        )  # fmt: skip
        return [
            Route(f"{BASE}/", self.root),
            Route(f"{BASE}/is_alive", self.is_alive),
            *(Route(f"{BASE}/{post.__name__}", post, methods=["POST"]) for post in posts),
        ]


async def _reply(runtime: Runtime, work: Callable[[Box], Awaitable[dict[str, Any]]]) -> Reply:
    """What is sent, failures included, so that it can be sent again."""
    try:
        return 200, await work(_ready(runtime))
    except Raised as raised:
        return 511, raised.body
    except archive.Refused as error:
        return 511, Raised("builtins.ValueError", str(error)).body
    except AgentError as error:
        return 511, Raised("builtins.OSError", str(error)).body
    except SandboxError as error:
        extra = {"infra": infra(error.code), "code": str(error.code)}
        return 511, Raised("swerex.exceptions.SwerexException", str(error), extra).body


def _ready(runtime: Runtime) -> Box:
    try:
        return door.ready(runtime)
    except Fault as fault:
        end = runtime.end
        extra = {"infra": infra(end.code) if end else "server"}
        raise Raised("swerex.exceptions.SwerexException", fault.detail, extra) from None


async def _file(path: str, work: Awaitable[Any]) -> Any:
    """A file that cannot be used, as Python's own exceptions have it."""
    try:
        return await work
    except NotFound:
        raise _missing(path) from None
    except SandboxError as error:
        number = error.detail.get("errno")
        if number == 21:
            raise Raised("builtins.IsADirectoryError", f"[Errno 21] Is a directory: {path!r}") from None
        if number == 13:
            raise Raised("builtins.PermissionError", f"[Errno 13] Permission denied: {path!r}") from None
        raise


def _missing(path: str) -> Raised:
    return Raised("builtins.FileNotFoundError", f"[Errno 2] No such file or directory: {path!r}")


def _result(command: Command, done: Finished) -> dict[str, Any]:
    out, err = (kept.data.decode(errors="backslashreplace") for kept in (done.stdout, done.stderr))
    code = exit_status(done)
    if command.check and code:
        said = f"Command {command.command!r} failed with exit code {code}. Stdout:\n{out!r}\nStderr:\n{err!r}"
        message = f"{command.error_msg}: {said}" if command.error_msg else said
        raise Raised.swerex("NonZeroExitCodeError", message)
    return {"stdout": out, "stderr": err, "exit_code": code}
