"""The client's part for what runs by itself in a sandbox: processes, sessions, and their output.

What it is
    `RunningCalls`, a base of `Client`: a method for each route; and what `BoundSandbox` hands out,
    `RemoteProcess` and `RemoteSession`. Output comes as an async iterator of `wire.OutputChunk`, which
    connects again, from where it was, when the connection drops.

What it does not do
    A session's command that may have arrived is not sent again, unless it is streamed: then it carries a key.
"""

from __future__ import annotations

import base64
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Literal

from runtime_server import wire
from runtime_server.client_calls import CALL_S, Calls, Dropped, Event, once, parse, pause
from runtime_server.client_lines import Answer
from runtime_server.errors import NotFound, SandboxError, Unavailable
from runtime_server.wire import Code

GRACE_S = 30.0  # an answer may come so much later than the command's own time limit
DEFAULT_COMMAND_S = 86_400.0  # no limit in the request: the server's holds, which we do not know
POLL_S = 30.0
Which = Literal["stdout", "stderr", "both"]


class RunningCalls(Calls):
    """Processes and sessions of a sandbox."""

    # --- processes ---

    async def start(self, sandbox: str, request: wire.StartProcess) -> wire.Process:
        """Returns once it runs; it goes on when nobody is connected."""
        got = await self._send("POST", _processes(sandbox), body=request, headers=once(), again=True)
        return parse(got, wire.Process)

    async def processes(self, sandbox: str) -> wire.ProcessList:
        return await self._get(_processes(sandbox), wire.ProcessList)

    async def process(self, sandbox: str, number: int, wait_s: float = 0) -> wire.Process:
        """Its record, at its end or when `wait_s` has passed."""
        path, params = f"{_processes(sandbox)}/{number}", {"wait_s": f"{wait_s:g}"}
        got = await self._send("GET", path, params=params, timeout_s=wait_s + CALL_S, again=True)
        return parse(got, wire.Process)

    def process_output(
        self, sandbox: str, number: int, offset: str = "0,0", stream: Which = "both", follow: bool = True
    ) -> AsyncGenerator[Event, None]:
        """Events from this offset on, as they come; the last one has the record."""
        params = {"stream": stream, "follow": str(follow).lower()}
        return self._followed(f"{_processes(sandbox)}/{number}/output", params, offset)

    async def write_stdin(self, sandbox: str, number: int, request: wire.Input) -> None:
        await self._once(f"{_processes(sandbox)}/{number}/stdin", request)

    async def signal(self, sandbox: str, number: int, signal: wire.Signal) -> None:
        await self._once(f"{_processes(sandbox)}/{number}/signal", signal)

    async def resize(self, sandbox: str, number: int, size: wire.Terminal) -> None:
        await self._once(f"{_processes(sandbox)}/{number}/resize", size)

    async def delete_process(self, sandbox: str, number: int) -> None:
        """End its whole tree, and forget it. One that is not there (any more) is no error."""
        await self._delete(f"{_processes(sandbox)}/{number}", Code.PROCESS_NOT_FOUND)

    # --- sessions ---

    async def open_session(self, sandbox: str, request: wire.OpenSession) -> wire.Session:
        got = await self._send("POST", _sessions(sandbox), body=request, headers=once(), again=True)
        return parse(got, wire.Session)

    async def sessions(self, sandbox: str) -> wire.SessionList:
        return await self._get(_sessions(sandbox), wire.SessionList)

    async def session(self, sandbox: str, name: str) -> wire.Session:
        return await self._get(f"{_sessions(sandbox)}/{name}", wire.Session)

    async def run(self, sandbox: str, name: str, request: wire.Run) -> wire.SessionResult:
        """Run a command of the session, once."""
        wait_s = (request.timeout_s or DEFAULT_COMMAND_S) + GRACE_S
        path = f"{_sessions(sandbox)}/{name}/run"
        return parse(await self._send("POST", path, body=request, timeout_s=wait_s), wire.SessionResult)

    async def run_streamed(self, sandbox: str, name: str, request: wire.Run) -> AsyncGenerator[Event, None]:
        """The same, with its output while it runs; the last event has the result."""
        base, command, at = f"{_sessions(sandbox)}/{name}", "", [0, 0]
        body, key = request.model_copy(update={"stream": True}), once()
        for tried in range(self._tries):
            try:
                async with aclosing(self._events("POST", f"{base}/run", body=body, headers=key)) as events:
                    async for event in events:
                        command = str(event.command) if isinstance(event, wire.OutputStarted) else command
                        yield _counted(event, at)
                return
            except Dropped:
                if command:
                    break
            except SandboxError as error:
                if error.code != Code.STREAMED:
                    raise
                break  # it arrived, and is the last command
            await pause(tried)
        params = {"follow": "true"} | ({"command": command} if command else {})
        async with aclosing(self._followed(f"{base}/output", params, f"{at[0]},{at[1]}")) as events:
            async for event in events:
                yield event

    async def rest(self, sandbox: str, name: str, timeout_s: float | None = None) -> wire.SessionResult:
        """Go on waiting for the command that was left running."""
        path, wait_s = f"{_sessions(sandbox)}/{name}/rest", (timeout_s or DEFAULT_COMMAND_S) + GRACE_S
        got = await self._send("POST", path, body=wire.Rest(timeout_s=timeout_s), timeout_s=wait_s)
        return parse(got, wire.SessionResult)

    async def interrupt(self, sandbox: str, name: str, grace_s: float = 2.0) -> wire.Interrupted:
        path, body = f"{_sessions(sandbox)}/{name}/interrupt", wire.Interrupt(grace_s=grace_s)
        return parse(await self._once(path, body, grace_s), wire.Interrupted)

    async def write_input(self, sandbox: str, name: str, request: wire.Input) -> None:
        await self._once(f"{_sessions(sandbox)}/{name}/input", request)

    async def resize_session(self, sandbox: str, name: str, size: wire.Terminal) -> None:
        await self._once(f"{_sessions(sandbox)}/{name}/resize", size)

    async def close_session(self, sandbox: str, name: str) -> None:
        """End the shell and all that was started in it. One that is not there (any more) is no error."""
        await self._delete(f"{_sessions(sandbox)}/{name}", Code.SESSION_NOT_FOUND)

    # --- how ---

    async def _once(self, path: str, body: wire.Request, extra_s: float = 0) -> Answer:
        return await self._send(
            "POST", path, body=body, headers=once(), timeout_s=CALL_S + extra_s, again=True
        )

    async def _delete(self, path: str, missing: Code) -> None:
        try:
            await self._send("DELETE", path, again=True)
        except NotFound as error:
            if error.code != missing:
                raise

    async def _followed(
        self, path: str, params: Mapping[str, str], offset: str
    ) -> AsyncGenerator[Event, None]:
        """Events from `offset` on; asked for again, from where they were, when the connection drops."""
        at, failed = [*(int(part) for part in offset.split(",")), 0][:2], 0
        while True:
            asked = {**params, "offset": f"{at[0]},{at[1]}"}
            try:
                async with aclosing(self._events("GET", path, params=asked)) as events:
                    async for event in events:
                        failed = 0
                        yield _counted(event, at)
                return
            except Dropped as error:
                failed += 1
                if failed >= self._tries:
                    raise Unavailable(str(error), Code.UNREACHABLE) from error
            await pause(failed)


def _counted(event: Event, at: list[int]) -> Event:
    if isinstance(event, wire.OutputChunk):
        at[event.stream == "stderr"] = event.offset + event.size
    return event


def _processes(sandbox: str) -> str:
    return f"/v1/sandboxes/{sandbox}/processes"


def _sessions(sandbox: str) -> str:
    return f"/v1/sandboxes/{sandbox}/sessions"


def said(data: str | bytes, close: bool) -> wire.Input:
    if isinstance(data, str):
        return wire.Input(data=data, close=close)
    return wire.Input(data=base64.b64encode(data).decode(), encoding="base64", close=close)


@dataclass
class RemoteProcess:
    """A process that was started. `record` is as it was last heard of."""

    calls: RunningCalls
    sandbox: str
    record: wire.Process

    @property
    def number(self) -> int:
        return self.record.number

    async def output(
        self, offset: str = "0,0", stream: Which = "both", follow: bool = True
    ) -> AsyncGenerator[wire.OutputChunk, None]:
        """As it comes, to its end (or, without `follow`, what there is); then `record` is up to date."""
        events = self.calls.process_output(self.sandbox, self.number, offset, stream, follow)
        async with aclosing(events):
            async for event in events:
                if isinstance(event, wire.OutputEnd) and event.process is not None:
                    self.record = event.process
                if isinstance(event, wire.OutputChunk):
                    yield event

    async def wait(self) -> wire.Process:
        """Its record, once it has ended."""
        while self.record.state == "running":
            self.record = await self.calls.process(self.sandbox, self.number, POLL_S)
        return self.record

    async def write(self, data: str | bytes, close: bool = False) -> None:
        await self.calls.write_stdin(self.sandbox, self.number, said(data, close))

    async def signal(self, signal: int | wire.SignalName) -> None:
        """To it and everything that descends from it."""
        await self.calls.signal(self.sandbox, self.number, wire.Signal(signal=signal))

    async def resize(self, columns: int, rows: int) -> None:
        await self.calls.resize(self.sandbox, self.number, wire.Terminal(columns=columns, rows=rows))

    async def delete(self) -> None:
        await self.calls.delete_process(self.sandbox, self.number)


@dataclass
class RemoteSession:
    """A shell that stays."""

    calls: RunningCalls
    sandbox: str
    record: wire.Session
    result: wire.SessionResult | None = None  # of the last command that was streamed

    @property
    def name(self) -> str:
        return self.record.name

    async def run(
        self,
        command: str,
        *,
        timeout_s: float | None = None,
        max_output: int | None = None,
        on_timeout: Literal["kill", "leave"] = "kill",
        stdin: bool = False,
    ) -> wire.SessionResult:
        request = wire.Run(
            command=command, timeout_s=timeout_s, max_output=max_output, on_timeout=on_timeout, stdin=stdin
        )
        return await self.calls.run(self.sandbox, self.name, request)

    async def stream(
        self, command: str, *, timeout_s: float | None = None, max_output: int | None = None
    ) -> AsyncIterator[wire.OutputChunk]:
        """The output while it runs; after that, `result`."""
        request = wire.Run(command=command, timeout_s=timeout_s, max_output=max_output)
        self.result = None
        async with aclosing(self.calls.run_streamed(self.sandbox, self.name, request)) as events:
            async for event in events:
                if isinstance(event, wire.OutputEnd):
                    self.result = event.result
                if isinstance(event, wire.OutputChunk):
                    yield event

    async def rest(self, timeout_s: float | None = None) -> wire.SessionResult:
        return await self.calls.rest(self.sandbox, self.name, timeout_s)

    async def interrupt(self, grace_s: float = 2.0) -> wire.SessionResult | None:
        return (await self.calls.interrupt(self.sandbox, self.name, grace_s)).result

    async def send(self, data: str | bytes, close: bool = False) -> None:
        await self.calls.write_input(self.sandbox, self.name, said(data, close))

    async def resize(self, columns: int, rows: int) -> None:
        size = wire.Terminal(columns=columns, rows=rows)
        await self.calls.resize_session(self.sandbox, self.name, size)

    async def close(self) -> None:
        await self.calls.close_session(self.sandbox, self.name)
