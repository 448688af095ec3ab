"""The agent's protocol: bytes to values and back, without any I/O.

What it is
    One stream socket, frames in both directions: u32le length of the rest, u8 kind, u32le id, payload.
    An id names one call until its last frame; many calls run at once. Numbers are little-endian, strings
    in requests end with a NUL.

    server → agent                                         agent → server
    WELCOME   u32 protocol                                 HELLO     u32 protocol, u32 max_commands,
    EXEC      u8 has_stdin, u32 timeout_ms,                          u32 n, u32 id of n running commands
              u32 max_output, u32 argc, u32 envc,          CREDIT    u32 stdin bytes taken; all ones: no more
              cwd, argv…, env…                             OUTPUT    u8 stream (1, 2), bytes that were kept
    DATA      stdin or file bytes; empty: the end          FINISHED  u32 exit, u8 signal, u8 flags, u64 µs,
    CANCEL    -                                                      2 × (u64 total, u32 head)
    WRITE     u32 mode, u8 parents, u64 size, path         CONTENT   bytes of a file
    READ      u64 max_bytes, path                          DONE      u64 bytes
    PING      up to 64 bytes                               FAILED    u32 errno, what was wrong
    KILL_ALL  -                                            PONG      the same bytes

    The last frame of a call is FINISHED, DONE, FAILED or PONG. At most WINDOW bytes of DATA may be ahead of
    the credit given.

What it does not do
    It keeps no state; `connection.py` knows which call an id belongs to. Whatever the agent sends is
    treated as written by an attacker: sizes and values are checked here, totals there.
"""

from __future__ import annotations

import errno
import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

PROTOCOL = 1
FRAME_MAX = 1 << 20  # bytes of a frame after its length word
WINDOW = 128 * 1024
CHUNK = 32 * 1024
STDIN_CLOSED = 0xFFFF_FFFF
STRINGS_MAX = 32768  # arguments, and environment entries, of one command
EXIT_TIMEOUT = 124

_HEADER = struct.Struct("<IBI")
_EXEC = struct.Struct("<BIIII")
_FINISHED = struct.Struct("<IBBQQIQI")


class Kind(IntEnum):
    """What a frame is; the numbers of agent.h."""

    WELCOME = 1
    EXEC = 2
    DATA = 3
    CANCEL = 4
    WRITE = 5
    READ = 6
    PING = 7
    KILL_ALL = 8
    HELLO = 65
    CREDIT = 66
    OUTPUT = 67
    FINISHED = 68
    CONTENT = 69
    DONE = 70
    FAILED = 71
    PONG = 72


class AgentError(Exception):
    """The agent could not do it: `errno` as the system calls have it, and a sentence that says what."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.errno = number


class AgentLost(Exception):
    """The connection is gone, or its other end broke the protocol: what ran in the sandbox is unknown."""


@dataclass(frozen=True)
class Kept:
    """One output stream. `data[:head]` came first; with `total > len(data)` there is a gap after it."""

    data: bytes
    total: int  # bytes the command wrote
    head: int  # bytes of `data` before the gap


@dataclass(frozen=True)
class Finished:
    """What a command did. A timeout is a result: exit code 124, and the output up to then."""

    exit_code: int  # 128 + signal when a signal ended it; 124 on timeout
    signal: int
    timed_out: bool
    stdout: Kept
    stderr: Kept
    duration_ms: float


@dataclass(frozen=True)
class Hello:
    """The agent's first frame. `running`: commands of an earlier connection that have not ended."""

    max_commands: int
    running: tuple[int, ...]


def frame(kind: Kind, number: int, payload: bytes = b"") -> bytes:
    return _HEADER.pack(len(payload) + 5, kind, number) + payload


def split(buffer: bytearray) -> list[tuple[int, int, bytes]]:
    """Takes the complete frames out of `buffer`: (kind, id, payload) each. AgentLost on a bad length."""
    frames: list[tuple[int, int, bytes]] = []
    at, end = 0, len(buffer)
    while end - at >= 4:
        size = int.from_bytes(buffer[at : at + 4], "little")
        if not 5 <= size <= FRAME_MAX:
            raise AgentLost(f"the agent sent a frame of {size} bytes; allowed are 5 to {FRAME_MAX}")
        if end - at - 4 < size:
            break
        _, kind, number = _HEADER.unpack_from(buffer, at)
        frames.append((kind, number, bytes(buffer[at + 9 : at + 4 + size])))
        at += 4 + size
    del buffer[:at]
    return frames


def _strings(values: Sequence[str], what: str) -> bytes:
    if any("\0" in value for value in values):
        raise AgentError(errno.EINVAL, f"{what} must not contain a NUL byte")
    return b"".join(os.fsencode(value) + b"\0" for value in values)


def _entries(env: Mapping[str, str]) -> list[str]:
    if wrong := [name for name in env if not name or "=" in name]:
        raise AgentError(errno.EINVAL, f"{wrong[0]!r} cannot name an environment variable: no '=', not empty")
    return [f"{name}={value}" for name, value in env.items()]


def _fits(payload: bytes, what: str) -> bytes:
    if len(payload) + 5 > FRAME_MAX:
        raise AgentError(
            errno.E2BIG,
            f"{what} take {len(payload)} bytes; allowed are {FRAME_MAX - 5}: send a file or stdin instead",
        )
    return payload


def exec_payload(
    argv: Sequence[str],
    cwd: str | None,
    env: Mapping[str, str],
    has_stdin: bool,
    timeout_s: float,
    max_output: int,
) -> bytes:
    """AgentError EINVAL or E2BIG for what cannot be said to any kernel either."""
    entries = _entries(env)
    if not argv:
        raise AgentError(errno.EINVAL, "argv is empty: name at least the program")
    if len(argv) > STRINGS_MAX or len(entries) > STRINGS_MAX:
        raise AgentError(errno.E2BIG, f"at most {STRINGS_MAX} arguments and as many environment entries")
    if not (timeout_s > 0 and math.isfinite(timeout_s)) or not 0 <= max_output < 1 << 31:
        raise AgentError(errno.EINVAL, "timeout_s must be positive and max_output from 0 to 2 GiB")
    timeout_ms = min(math.ceil(timeout_s * 1000), 0xFFFF_FFFF)
    head = _EXEC.pack(has_stdin, timeout_ms, max_output, len(argv), len(entries))
    strings = _strings([cwd or ""], "cwd") + _strings(argv, "argv") + _strings(entries, "env")
    return _fits(head + strings, "argv, cwd and env")


def write_payload(path: str, mode: int, parents: bool, size: int) -> bytes:
    return struct.pack("<IBQ", mode & 0o7777, parents, size) + _fits(_strings([path], "path"), "path")


def read_payload(path: str, max_bytes: int) -> bytes:
    return struct.pack("<Q", max_bytes) + _fits(_strings([path], "path"), "path")


def hello_from(payload: bytes) -> Hello:
    if len(payload) < 12 or len(payload) % 4:
        raise AgentLost("the agent's greeting is malformed")
    protocol, max_commands, count, *running = struct.unpack(f"<{len(payload) // 4}I", payload)
    if protocol != PROTOCOL:
        raise AgentLost(f"the agent speaks protocol {protocol}, this server {PROTOCOL}: rebuild the agent")
    if count != len(running) or not 1 <= max_commands <= 1 << 16:
        raise AgentLost("the agent's greeting is malformed")
    return Hello(max_commands, tuple(running))


def finished_from(payload: bytes, stdout: bytes, stderr: bytes) -> Finished:
    """`stdout` and `stderr` are the OUTPUT bytes received; the numbers must agree with them."""
    if len(payload) != _FINISHED.size:
        raise AgentLost("the agent's result is malformed")
    code, signal, flags, micros, *numbers = _FINISHED.unpack(payload)
    if code > 255 or signal > 64:
        raise AgentLost(f"the agent reports exit code {code}, signal {signal}: there are none such")
    kept = [Kept(data, total, head) for data, total, head in ((stdout, *numbers[:2]), (stderr, *numbers[2:]))]
    for one in kept:
        if one.total < len(one.data) or one.head > len(one.data):
            raise AgentLost("the agent's result contradicts the output it sent")
    return Finished(code, signal, bool(flags & 1), kept[0], kept[1], micros / 1000)


def failure_from(payload: bytes, subject: str) -> AgentError:
    if len(payload) < 4:
        raise AgentLost("the agent's failure is malformed")
    number = int.from_bytes(payload[:4], "little")
    what = payload[4:260].decode(errors="replace")
    reason = f": {os.strerror(number)}" if number < 4096 else ""
    return AgentError(number, f"{subject}: {what}{reason}")


def number_from(payload: bytes) -> int:
    if len(payload) != 8:
        raise AgentLost("the agent's answer is malformed")
    return int.from_bytes(payload, "little")
