"""The agent's protocol: bytes to values and back, without any I/O.

What it is
    One stream socket, frames in both directions: u32le length of the rest, u8 kind, u32le id, payload.
    An id names one call until its last frame; many calls run at once. Numbers are little-endian, strings
    in requests end with a NUL.

    server → agent                                         agent → server
    WELCOME   u32 protocol                                 HELLO     u32 protocol, u32 max_commands,
    EXEC      u8 flags, u32 timeout_ms, u32 max_output,              u32 n, n × (u32 id, u32 id of its
              u32 columns, u32 rows, u32 argc,                       session, u8 what, u8 ended, tag)
              u32 envc, cwd, tag, argv…, env…              CREDIT    u32 stdin bytes taken; all ones: no more
    OPEN      the same: a session; argv: shells to try     STARTED   u32 pid, u8 takes stdin
    RUN       u32 session, u8 flags, u32 timeout_ms,       OUTPUT    u8 stream (1, 2), bytes that were kept
              u32 max_output, tag, text                    CHUNK     u8 stream, u64 offset, bytes
    DATA      stdin or file bytes; empty: the end          FINISHED  u32 exit, u8 signal, u8 flags, u64 µs,
    SIGNAL    u32 number, u32 ms until it is a kill                  2 × (u64 total, u32 head)
    RESIZE    u32 columns, u32 rows                        CONTENT   bytes of a file or an archive
    CANCEL    -                                            DONE      u64 bytes, or entries
    ATTACH    -                                            FAILED    u32 errno, what was wrong
    RELEASE   -                                            PONG      the same bytes
    WRITE     u32 mode, u8 parents, u64 size, path
    READ      u64 max_bytes, path
    PACK      u64 max_bytes, path
    UNPACK    u64 max_bytes, u64 max_entries, path
    ACK       u32 bytes of an archive taken; id 0: of CHUNKs
    PING      up to 64 bytes
    KILL_ALL  -

    The last frame of a call is FINISHED, DONE, FAILED or PONG. At most WINDOW bytes of DATA may be ahead of
    the credit given; at most PUSH_WINDOW bytes of CHUNKs, and of each archive, ahead of what was ACKed.
    With the flag PUSH output comes as CHUNKs while the command runs; what does not fit into `max_output`
    while the server is slow is left out, which the offsets show. A command with a tag, and one that ended
    while nobody was connected, is kept after its last frame until it is RELEASEd or newer ones take its
    place; ATTACH asks for it (again), from its beginning.

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
from dataclasses import dataclass, replace
from enum import IntEnum, IntFlag
from typing import Literal

PROTOCOL = 2
FRAME_MAX = 1 << 20  # bytes of a frame after its length word
WINDOW = 128 * 1024
PUSH_WINDOW = 256 * 1024
TAG_MAX = 64  # bytes
CHUNK = 32 * 1024
STDIN_CLOSED = 0xFFFF_FFFF
STRINGS_MAX = 32768  # arguments, and environment entries, of one command
EXIT_TIMEOUT = 124

_HEADER = struct.Struct("<IBI")
_EXEC = struct.Struct("<BIIIIII")
_RUN = struct.Struct("<IBII")
_LISTED = struct.Struct("<IIBB")
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
    OPEN = 9
    RUN = 10
    SIGNAL = 11
    RESIZE = 12
    ATTACH = 13
    RELEASE = 14
    PACK = 15
    UNPACK = 16
    ACK = 17
    HELLO = 65
    CREDIT = 66
    OUTPUT = 67
    FINISHED = 68
    CONTENT = 69
    DONE = 70
    FAILED = 71
    PONG = 72
    CHUNK = 73
    STARTED = 74


class Flag(IntFlag):
    """How a command is started."""

    STDIN = 1
    PUSH = 2
    PTY = 4


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
    killed: bool = False  # by cancelling, closing, or after an interrupt that it ignored
    ended: bool = False  # the session's shell ended with it, or in its stead


@dataclass(frozen=True)
class Running:
    """What an agent knows of an earlier connection. `ended`: its result is kept."""

    number: int
    kind: Literal["exec", "process", "session", "run"]
    ended: bool
    tag: str
    session: int  # of a run: the number of its session; else 0


@dataclass(frozen=True)
class Hello:
    """The agent's first frame. `running`: what is there of an earlier connection, by number."""

    max_commands: int
    running: Mapping[int, Running]


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


def _tag(tag: str) -> bytes:
    encoded = _strings([tag], "tag")
    if len(encoded) > TAG_MAX + 1:
        raise AgentError(errno.E2BIG, f"a tag has at most {TAG_MAX} bytes")
    return encoded


def _limits(timeout_s: float | None, max_output: int) -> tuple[int, int]:
    """Milliseconds (0: no limit), bytes."""
    if timeout_s is not None and not (timeout_s > 0 and math.isfinite(timeout_s)):
        raise AgentError(errno.EINVAL, "timeout_s must be positive")
    if not 0 <= max_output < 1 << 31:
        raise AgentError(errno.EINVAL, "max_output must be from 0 to 2 GiB")
    return min(math.ceil((timeout_s or 0) * 1000), 0xFFFF_FFFF), max_output


def _size(pty: tuple[int, int] | None) -> tuple[int, int]:
    columns, rows = pty or (0, 0)
    if not (0 <= columns < 1 << 16 and 0 <= rows < 1 << 16):
        raise AgentError(errno.EINVAL, "a terminal has 0 to 65535 columns and rows")
    return columns, rows


def exec_payload(
    argv: Sequence[str],
    cwd: str | None,
    env: Mapping[str, str],
    flags: int,
    timeout_s: float | None,
    max_output: int,
    pty: tuple[int, int] | None = None,
    tag: str = "",
) -> bytes:
    """AgentError EINVAL or E2BIG for what cannot be said to any kernel either."""
    entries = _entries(env)
    if not argv:
        raise AgentError(errno.EINVAL, "argv is empty: name at least the program")
    if len(argv) > STRINGS_MAX or len(entries) > STRINGS_MAX:
        raise AgentError(errno.E2BIG, f"at most {STRINGS_MAX} arguments and as many environment entries")
    flags |= Flag.PTY if pty else 0
    head = _EXEC.pack(flags, *_limits(timeout_s, max_output), *_size(pty), len(argv), len(entries))
    strings = _strings([cwd or ""], "cwd") + _tag(tag) + _strings(argv, "argv") + _strings(entries, "env")
    return _fits(head + strings, "argv, cwd and env")


def run_payload(
    session: int, text: str, flags: int, timeout_s: float | None, max_output: int, tag: str
) -> bytes:
    if "\0" in text:
        raise AgentError(errno.EINVAL, "a command must not contain a NUL byte")
    head = _RUN.pack(session, flags, *_limits(timeout_s, max_output))
    return _fits(head + _tag(tag) + os.fsencode(text) + b"\n", "the command's text")


def resize_payload(columns: int, rows: int) -> bytes:
    return struct.pack("<II", *_size((columns, rows)))


def signal_payload(number: int, grace_s: float = 0) -> bytes:
    if not 1 <= number <= 64:
        raise AgentError(errno.EINVAL, f"there is no signal {number}; allowed are 1 to 64")
    return struct.pack("<II", number, min(math.ceil(grace_s * 1000), 0xFFFF_FFFF))


def pack_payload(path: str, max_bytes: int) -> bytes:
    return read_payload(path, max_bytes)


def unpack_payload(path: str, max_bytes: int, max_entries: int) -> bytes:
    return struct.pack("<QQ", max_bytes, max_entries) + _fits(_strings([path], "path"), "path")


def write_payload(path: str, mode: int, parents: bool, size: int) -> bytes:
    return struct.pack("<IBQ", mode & 0o7777, parents, size) + _fits(_strings([path], "path"), "path")


def read_payload(path: str, max_bytes: int) -> bytes:
    return struct.pack("<Q", max_bytes) + _fits(_strings([path], "path"), "path")


_KINDS: tuple[Literal["exec", "process", "session", "run"], ...] = ("exec", "process", "session", "run")


def _running_from(payload: bytes, at: int) -> tuple[Running, int]:
    number, session, kind, ended = _LISTED.unpack_from(payload, at)
    at += _LISTED.size
    end = payload.index(0, at, at + TAG_MAX + 1)
    tag = payload[at:end].decode(errors="replace")
    return Running(number, _KINDS[kind - 1 if kind else len(_KINDS)], bool(ended), tag, session), end + 1


def hello_from(payload: bytes) -> Hello:
    if len(payload) < 12:
        raise AgentLost("the agent's greeting is malformed")
    protocol, max_commands, count = struct.unpack_from("<III", payload)
    if protocol != PROTOCOL:
        raise AgentLost(f"the agent speaks protocol {protocol}, this server {PROTOCOL}: rebuild the agent")
    running: dict[int, Running] = {}
    at = 12
    try:
        for _ in range(min(count, 1 << 16)):
            one, at = _running_from(payload, at)
            running[one.number] = one
    except (struct.error, ValueError, IndexError) as error:
        raise AgentLost("the agent's greeting is malformed") from error
    if at != len(payload) or count != len(running) or not 1 <= max_commands <= 1 << 16:
        raise AgentLost("the agent's greeting is malformed")
    return Hello(max_commands, running)


def chunk_from(payload: bytes) -> tuple[int, int, bytes]:
    """Stream (1 or 2), offset, bytes."""
    if len(payload) < 10 or payload[0] not in (1, 2):
        raise AgentLost("the agent's output is malformed")
    return payload[0], int.from_bytes(payload[1:9], "little"), payload[9:]


def started_from(payload: bytes) -> bool:
    """Whether it takes stdin."""
    if len(payload) != 5:
        raise AgentLost("the agent's report of a start is malformed")
    return bool(payload[4])


def finished_from(payload: bytes, stdout: bytes, stderr: bytes) -> Finished:
    """`stdout` and `stderr` are the OUTPUT bytes received; the numbers must agree with them."""
    _, _, _, _, total, head, errors, errors_head = _checked(payload)
    for data, whole, before in ((stdout, total, head), (stderr, errors, errors_head)):
        if whole < len(data) or before > len(data):
            raise AgentLost("the agent's result contradicts the output it sent")
    return _finished(payload, Kept(stdout, total, head), Kept(stderr, errors, errors_head))


def pushed_from(payload: bytes, stdout: Kept, stderr: Kept) -> Finished:
    """For a command whose output came as CHUNKs: `stdout` and `stderr` are what was made of them."""
    _, _, _, _, total, _, errors, _ = _checked(payload)
    if stdout.total > total or stderr.total > errors:
        raise AgentLost("the agent's result contradicts the output it sent")
    return _finished(payload, replace(stdout, total=total), replace(stderr, total=errors))


def _checked(payload: bytes) -> tuple[int, int, int, int, int, int, int, int]:
    """Exit code, signal, flags, microseconds, and of each stream: total, head."""
    if len(payload) != _FINISHED.size:
        raise AgentLost("the agent's result is malformed")
    code, signal, flags, micros, total, head, errors, errors_head = _FINISHED.unpack(payload)
    if code > 255 or signal > 64:
        raise AgentLost(f"the agent reports exit code {code}, signal {signal}: there are none such")
    return code, signal, flags, micros, total, head, errors, errors_head


def _finished(payload: bytes, stdout: Kept, stderr: Kept) -> Finished:
    code, signal, flags, micros = _FINISHED.unpack(payload)[:4]
    killed, ended = bool(flags & 2), bool(flags & 4)
    return Finished(code, signal, bool(flags & 1), stdout, stderr, micros / 1000, killed, ended)


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
