"""Fuzzes the sandbox agent with libFuzzer and sanitizers: its frames, and its reader of archives.

How to use it
    make fuzz [FUZZ_S=600]      or: PYTHONPATH=tests python -m fuzz SECONDS [agent|tar [FILE_OF_A_CRASH …]]

    Four fifths of the time go to the frames. No crash is the only good result; exit code 0 says so.

    Needs clang with its fuzzer runtime (Debian: clang-14 libclang-rt-14-dev). What it learns it keeps in
    .setup/fuzz, so that the next run goes on from there. With files it runs these alone, as a test would.

What it does not do
    It starts no process and sends no signal: the part of the agent that does is left out (fuzz_agent.c).
"""

from __future__ import annotations

import io
import shutil
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

from runtime_server.agent import frames
from runtime_server.agent.frames import Flag, Kind

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PLACE = ROOT / ".setup" / "fuzz"
AGENT = ROOT / "runtime_server" / "agent"
FLAGS = ["-std=gnu11", "-D_GNU_SOURCE", "-g", "-O1", "-fsanitize=fuzzer,address,undefined"]
STRICT = ["-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-Wall", "-Wno-unused-function"]


def compiler() -> str | None:
    names = ["clang", *(f"clang-{version}" for version in range(22, 12, -1))]
    return next((found for name in names if (found := shutil.which(name))), None)


def build(name: str) -> Path:
    """The program that fuzzes `name`. SystemExit says what to install."""
    clang = compiler()
    if clang is None:
        sys.exit("fuzz: no clang here; on Debian: apt-get install clang-14 libclang-rt-14-dev")
    PLACE.mkdir(parents=True, exist_ok=True)
    program = PLACE / f"fuzz_{name}"
    line = [clang, *FLAGS, *STRICT, f"-I{AGENT}", str(HERE / f"fuzz_{name}.c"), "-o", str(program)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"fuzz: {clang} cannot build it (is its fuzzer runtime installed?):\n{done.stderr[-3000:]}")
    return program


def frame_step(kind: Kind, number: int, payload: bytes) -> bytes:
    kinds = [k for k in Kind if Kind.EXEC <= k <= Kind.ACK]
    return bytes([1, 0, kinds.index(kind), number, len(payload) >> 8, len(payload) & 255]) + payload


def seeds() -> dict[str, bytes]:
    """Lives of commands, as `step` of fuzz_agent.c reads them."""
    plain = frames.exec_payload(["sh", "-c", "x"], "/", {"A": "2"}, Flag.STDIN, 2, 4096, None, "t")
    pushed = frames.exec_payload(["sh"], None, {}, Flag.PUSH | Flag.STDIN, None, 512, (80, 24), "")
    opened = frames.exec_payload(["bash", "sh"], None, {}, 0, None, 0, None, "s")
    run = frames.run_payload(2, "echo", Flag.PUSH, 3, 256, "")
    ends, speaks, passes, reads = b"\x04\x00\x09", b"\x05\x00\x7f", b"\x06\xff", b"\x07\x00"
    again, status = b"\x08\x00", b"\x05\x00\x80\x00\x00"
    data = frame_step(Kind.DATA, 1, b"input" * 40)
    return {
        "exec": frame_step(Kind.EXEC, 1, plain) + data + speaks + ends + reads + again,
        "push": frame_step(Kind.EXEC, 1, pushed) + speaks * 9 + frame_step(Kind.ACK, 0, b"\0\1\0\0") + ends,
        "session": frame_step(Kind.OPEN, 2, opened) + status + frame_step(Kind.RUN, 3, run) + speaks
        + frame_step(Kind.SIGNAL, 3, struct.pack("<II", 2, 50)) + passes + b"\x05\x00\x80\x82\x01" + reads,
        "adopt": frame_step(Kind.EXEC, 1, plain) + again + frame_step(Kind.ATTACH, 1, b"") + ends + again
        + frame_step(Kind.ATTACH, 1, b"") + reads + frame_step(Kind.RELEASE, 1, b""),
        "files": frame_step(Kind.PACK, 4, frames.pack_payload("/x", 99)) + speaks * 20 + ends
        + frame_step(Kind.UNPACK, 5, frames.unpack_payload("/x", 99, 9)) + data
        + frame_step(Kind.WRITE, 6, frames.write_payload("/x", 0o644, True, 9)) + passes * 9,
        "kill": frame_step(Kind.EXEC, 1, plain) + frame_step(Kind.CANCEL, 1, b"") + passes * 4
        + frame_step(Kind.KILL_ALL, 7, b""),
    }  # fmt: skip


def archives() -> dict[str, bytes]:
    found = {}
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=form, bufsize=512) as archive:
            for name, kind, link in (("d", tarfile.DIRTYPE, ""), ("d/f", tarfile.REGTYPE, ""),
                                     ("s", tarfile.SYMTYPE, "d"), ("h", tarfile.LNKTYPE, "d/f"),
                                     ("n" * 99 + "/" + "m" * 60, tarfile.REGTYPE, "")):  # fmt: skip
                info = tarfile.TarInfo(name)
                info.type, info.linkname, info.size = kind, link, 9 if kind == tarfile.REGTYPE else 0
                archive.addfile(info, io.BytesIO(b"z" * 9))
        found[str(form)] = buffer.getvalue()[:8192]
    return found


def fuzz(name: str, seconds: int, given: dict[str, bytes]) -> int:
    program, corpus, seeded = build(name), PLACE / f"corpus-{name}", PLACE / f"seeds-{name}"
    for directory in (corpus, seeded):
        directory.mkdir(exist_ok=True)
    for title, data in given.items():
        (seeded / title).write_bytes(data)
    limits = [f"-max_total_time={seconds}", "-max_len=8192", "-timeout=20", "-rss_limit_mb=2048"]
    more = ["-print_final_stats=1", f"-artifact_prefix={PLACE}/{name}-"]
    return subprocess.run([program, *limits, *more, corpus, seeded], check=False).returncode


def main(arguments: list[str]) -> int:
    seconds = int(arguments[0]) if arguments else 600
    if arguments[2:]:
        return subprocess.run([build(arguments[1]), *arguments[2:]], check=False).returncode
    shares = {"agent": max(seconds * 4 // 5, 1), "tar": max(seconds // 5, 1)}
    given = {"agent": seeds(), "tar": archives()}
    names = arguments[1:] or list(shares)
    codes = [fuzz(name, seconds if arguments[1:] else shares[name], given[name]) for name in names]
    return int(any(codes))  # a signal's is negative


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
