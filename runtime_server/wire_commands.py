"""Bodies of commands that are waited for, and of files. Imported through `runtime_server.wire`."""

from __future__ import annotations

import base64
from typing import Annotated, Literal, Self

from pydantic import Field

from runtime_server.wire_base import Environment, Message, Request


class Exec(Request):
    """`POST /v1/sandboxes/{id}/exec`. A string runs under `/bin/sh -c`, a list runs as it is."""

    command: str | list[str]
    cwd: str | None = None
    env: Environment = Field(default_factory=dict)
    stdin: str | None = None
    stdin_encoding: Literal["utf-8", "base64"] = "utf-8"
    timeout_s: Annotated[float, Field(gt=0, le=86400)] | None = None
    max_output: Annotated[int, Field(ge=0, le=1 << 28)] | None = None  # bytes kept per stream


class Stream(Message):
    """One output stream: text where it is valid UTF-8, else base64; head and tail when it was too long."""

    data: str = ""
    encoding: Literal["utf-8", "base64"] = "utf-8"
    total: int = 0  # bytes the command wrote
    dropped: int = 0  # bytes left out between head and tail
    head: int = 0  # bytes of `data` before the gap; meaningful when dropped > 0

    @property
    def raw(self) -> bytes:
        """The bytes kept, exactly as they were written (the gap closed up)."""
        return self.data.encode() if self.encoding == "utf-8" else base64.b64decode(self.data)

    @property
    def text(self) -> str:
        """For reading: undecodable bytes replaced, the gap marked."""
        raw = self.raw
        if not self.dropped:
            return raw.decode(errors="replace")
        mark = f"\n[... {self.dropped} bytes left out ...]\n"
        return raw[: self.head].decode(errors="replace") + mark + raw[self.head :].decode(errors="replace")

    @classmethod
    def of(cls, kept: bytes, total: int | None = None, head: int | None = None) -> Self:
        size = len(kept) if total is None else total
        numbers = {"total": size, "dropped": size - len(kept), "head": len(kept) if head is None else head}
        try:
            return cls(data=kept.decode(), encoding="utf-8", **numbers)
        except UnicodeDecodeError:
            return cls(data=base64.b64encode(kept).decode(), encoding="base64", **numbers)


class ExecResult(Message):
    """What a command did. A timeout is a result, not an error: the partial output is kept."""

    exit_code: int  # 128 + signal when a signal ended it; 124 on timeout
    signal: int = 0
    stdout: Stream = Field(default_factory=Stream)
    stderr: Stream = Field(default_factory=Stream)
    timed_out: bool = False
    oom: bool = False
    duration_ms: float = 0.0

    @property
    def ok(self) -> bool:
        return self.exit_code == 0


class FileInfo(Message):
    """Answer to a file write."""

    path: str
    size: int
    mode: int = 0o644
