"""Bodies of what runs beside the request that started it: processes, sessions, their output; and archives.

What it is
    Imported through `runtime_server.wire`. Output comes as events, one JSON object each (`OutputEvent`), in
    lines (NDJSON) or as server-sent events. Every stream is addressed by its own offset in bytes, from 0.
"""

from __future__ import annotations

import base64
from typing import Annotated, Literal

from pydantic import Field

from runtime_server.wire_base import Environment, Failure, Message, Request
from runtime_server.wire_commands import ExecResult

StreamName = Literal["stdout", "stderr"]
Encoding = Literal["utf-8", "base64"]
SessionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,47}$", max_length=48)]
Offset = Annotated[str, Field(pattern=r"^[0-9]{1,18}(,[0-9]{1,18})?$", max_length=37)]
"""Where to go on: the offset in the one stream asked for, or `stdout,stderr`."""
Seconds = Annotated[float, Field(gt=0, le=86400)]
OutputBytes = Annotated[int, Field(ge=0, le=1 << 26)]
TEXT_MAX = 900_000  # characters of a session's command

SignalName = Literal[
    "SIGHUP",
    "SIGINT",
    "SIGQUIT",
    "SIGKILL",
    "SIGUSR1",
    "SIGUSR2",
    "SIGPIPE",
    "SIGALRM",
    "SIGTERM",
    "SIGCONT",
    "SIGSTOP",
    "SIGTSTP",
    "SIGWINCH",
]


class Terminal(Request):
    """The size of a terminal, in characters."""

    columns: Annotated[int, Field(ge=1, le=65535)] = 80
    rows: Annotated[int, Field(ge=1, le=65535)] = 24


class StartProcess(Request):
    """`POST /v1/sandboxes/{id}/processes`. A string runs under `/bin/sh -c`, a list runs as it is."""

    command: str | Annotated[list[str], Field(min_length=1)]
    cwd: str | None = None
    env: Environment = Field(default_factory=dict)
    stdin: bool = False  # keep its input open for POST …/stdin; otherwise it reads nothing
    pty: Terminal | None = None  # run it on a terminal, stdin included; stderr is then part of stdout
    timeout_s: Seconds | None = None  # default: none
    max_output: OutputBytes | None = None  # bytes kept per stream


class Process(Message):
    """A process that was started. It is remembered after its end, until it is deleted or newer ones push it
    out."""

    number: int
    command: str | list[str] = ""  # empty when another server had started it
    cwd: str = ""
    pty: bool = False
    state: Literal["running", "ended"]
    started_at: float = 0.0
    exit_code: int | None = None  # 128 + signal when a signal ended it; 124 on timeout
    signal: int = 0
    timed_out: bool = False
    oom: bool = False
    duration_ms: float = 0.0
    stdout_bytes: int = 0  # written until now
    stderr_bytes: int = 0


class ProcessList(Message):
    processes: list[Process]


class Input(Request):
    """`POST …/stdin` and `…/input`. Answered once the sandbox has taken all of it."""

    data: str = ""
    encoding: Encoding = "utf-8"
    close: bool = False  # and then the end of the input: on a terminal, what Ctrl-D says


class Signal(Request):
    """`POST …/signal`: to the process and everything that descends from it."""

    signal: Annotated[int, Field(ge=1, le=64)] | SignalName


class OpenSession(Request):
    """`POST /v1/sandboxes/{id}/sessions`: a shell that stays."""

    name: SessionName | None = None  # default: one that is free
    cwd: str | None = None
    env: Environment = Field(default_factory=dict)
    shell: Annotated[str, Field(min_length=1, max_length=4000)] | None = None  # default: bash, else sh
    pty: Terminal | None = None


class Session(Message):
    name: str
    state: Literal["idle", "running", "ended"]
    cwd: str = ""  # where it began
    pty: bool = False
    created_at: float = 0.0
    commands: int = 0  # that it was given
    exit_code: int | None = None  # of the shell, when it has ended


class SessionList(Message):
    sessions: list[Session]


class Run(Request):
    """`POST …/sessions/{name}/run`: one command at a time, in the state that the earlier ones left."""

    command: Annotated[str, Field(max_length=TEXT_MAX)]
    timeout_s: Seconds | None = None
    max_output: OutputBytes | None = None
    on_timeout: Literal["kill", "leave"] = "kill"
    """`leave`: it runs on, and `…/rest` goes on waiting for it."""
    stdin: bool = False  # it reads what …/input sends; otherwise nothing (a session with a pty always does)
    stream: bool = False  # answer with events while it runs, the last one has the result


class Rest(Request):
    """`POST …/sessions/{name}/rest`: go on waiting for the command that was left running."""

    timeout_s: Seconds | None = None


class Interrupt(Request):
    """`POST …/sessions/{name}/interrupt`: SIGINT, as a terminal sends it; SIGKILL after `grace_s`."""

    grace_s: Annotated[float, Field(gt=0, le=60)] = 2.0


class SessionResult(ExecResult):
    """What a command of a session did. A syntax error is a result like another."""

    command: int  # which one of the session, counted from 1
    running: bool = False  # the time is up and it was left: this is its output until now
    ended: bool = False  # the shell ended with it


class Interrupted(Message):
    result: SessionResult | None = None  # None: nothing was running


class Unpacked(Message):
    """Answer to `PUT …/archive`."""

    path: str
    entries: int


# --- output, as it comes ---


class OutputStarted(Message):
    """First event of a session's streamed command: its number, for `GET …/output?command=`."""

    type: Literal["started"] = "started"
    command: int


class OutputChunk(Message):
    """Bytes of one stream. Text never ends within a character; what is no text comes as base64."""

    type: Literal["output"] = "output"
    stream: StreamName
    offset: int  # of its first byte
    size: int  # in bytes; the next chunk of this stream begins at offset + size, unless it says `dropped`
    dropped: int = 0  # bytes between the chunk before and this one, which are not kept any more
    data: str
    encoding: Encoding = "utf-8"

    @property
    def raw(self) -> bytes:
        return self.data.encode() if self.encoding == "utf-8" else base64.b64decode(self.data)


class OutputAlive(Message):
    """Nothing has come for a while, and the server is still there."""

    type: Literal["alive"] = "alive"


class OutputEnd(Message):
    """The last event. What there is of it after its end, or, without `follow`, now."""

    type: Literal["end"] = "end"
    process: Process | None = None
    result: SessionResult | None = None


class OutputError(Message):
    """The last event when something went wrong after the answer had begun."""

    type: Literal["error"] = "error"
    status: int  # that the answer would have had
    error: Failure


OutputEvent = Annotated[
    OutputStarted | OutputChunk | OutputAlive | OutputEnd | OutputError, Field(discriminator="type")
]
