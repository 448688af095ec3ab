"""Compiles the agent: a static binary per machine type, made when it is missing or its source has changed.

How to use it
    `agent_binary()` returns the binary for this machine; `python -m runtime_server.agent.build [ARCH …]`
    builds the named ones (`x86_64`, `aarch64`; default: this machine's).

Compilers, first that works: the one in the `ziglang` package (any ARCH, musl), `musl-gcc`, `gcc -static`,
`cc -static` (the last three only for this machine).

What it does not do
    It installs no compiler. Binaries that came in a wheel carry the hash of their sources, and are used as
    they are. The first compilation by zig takes half a minute (it makes its C library), later ones a second.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ARCHES = ("x86_64", "aarch64")
SOURCE = Path(__file__).parent
FLAGS = ("-std=gnu11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-Os", "-static", "-s")
BUILD_S = 300


class BuildError(RuntimeError):
    """No compiler could make the agent; the message lists what was tried and what to install."""


def host_arch() -> str:
    """This machine's name among ARCHES."""
    machine = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)


def _sources() -> list[Path]:
    return sorted(SOURCE.glob("*.c"))


def source_hash() -> str:
    """Of everything the binary is made of: sources, headers, flags."""
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for path in sorted([*_sources(), *SOURCE.glob("*.h")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _store() -> Path:
    """Beside the sources, or, where that cannot be written (a system-wide installation), the user's cache."""
    beside = SOURCE / "bin"
    if os.access(beside if beside.exists() else SOURCE, os.W_OK):
        return beside
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "orchestrate-rl" / "agent"


def compilers(arch: str) -> Iterator[list[str]]:
    """Command lines that may compile C for `arch` here, best first."""
    if importlib.util.find_spec("ziglang"):
        yield [sys.executable, "-m", "ziglang", "cc", "-target", f"{arch}-linux-musl"]
    if arch == host_arch():
        yield from ([found] for name in ("musl-gcc", "gcc", "cc") if (found := shutil.which(name)))


def _compile(command: list[str], output: Path) -> str:
    """Empty on success, else what the compiler said."""
    line = [*command, *FLAGS, "-o", os.fspath(output), *map(os.fspath, _sources())]
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=BUILD_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return "" if done.returncode == 0 else done.stderr[-2000:] or f"exit code {done.returncode}"


def build(arch: str, store: Path) -> Path:
    """Compiles for `arch` into `store`, replacing what is there in one step. BuildError when none can."""
    store.mkdir(parents=True, exist_ok=True)
    tried: list[str] = []
    with tempfile.TemporaryDirectory(dir=store) as scratch:
        output = Path(scratch, "agent")
        for command in compilers(arch):
            if not (said := _compile(command, output)):
                output.chmod(0o755)
                (store / f"agent-{arch}.sha256").write_text(source_hash() + "\n")
                return output.replace(store / f"agent-{arch}")
            tried.append(f"{' '.join(command)}: {said}")
    raise BuildError(
        f"cannot compile the sandbox agent for {arch}: install the Python package `ziglang`, "
        f"or gcc with static libc (Debian: gcc libc6-dev). Tried: {'; '.join(tried) or 'no compiler found'}"
    )


def current(arch: str, store: Path) -> Path | None:
    binary, stamp = store / f"agent-{arch}", store / f"agent-{arch}.sha256"
    if binary.is_file() and stamp.is_file() and stamp.read_text().strip() == source_hash():
        return binary
    return None


def agent_binary(arch: str | None = None) -> Path:
    """The agent for `arch` (default: this machine), built when missing or stale. BuildError when it cannot.

    Safe to call from many processes at once: the first one builds, under a lock on this node's disk.
    """
    arch = arch or host_arch()
    if arch not in ARCHES:
        raise BuildError(f"no sandbox agent for {arch}; there is one for {' and '.join(ARCHES)}")
    if ready := current(arch, SOURCE / "bin") or current(arch, _store()):
        return ready
    from filelock import FileLock  # late: the wheel's build environment has no need of it

    store = _store()
    store.mkdir(parents=True, exist_ok=True)
    with FileLock(store / ".lock", timeout=BUILD_S):
        return current(arch, store) or build(arch, store)


def main(arches: list[str]) -> int:
    for arch in arches or [host_arch()]:
        binary = agent_binary(arch)
        print(f"{binary} {binary.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
