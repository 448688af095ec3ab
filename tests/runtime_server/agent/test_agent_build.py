"""The binary: static, rebuilt when its source changes, explained when it cannot be."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import filelock
import pytest

from runtime_server.agent import build
from runtime_server.agent.frames import AgentLost, Kind, frame, split


def readelf(binary: Path, *options: str) -> str:
    return subprocess.run(
        ["readelf", *options, binary],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "LC_ALL": "C"},
    ).stdout


def test_binary_is_static(binary: Path) -> None:
    headers = readelf(binary, "-lW")
    assert "INTERP" not in headers and "NEEDED" not in readelf(binary, "-dW")
    assert os.access(binary, os.X_OK)


@pytest.mark.slow
@pytest.mark.timeout(400)  # the first time, the compiler builds its libc for the other machine type
def test_both_machine_types() -> None:
    if importlib.util.find_spec("ziglang") is None:
        pytest.skip("cross-compiling needs the ziglang package")
    machines = {arch: readelf(build.agent_binary(arch), "-h") for arch in build.ARCHES}
    assert "X86-64" in machines["x86_64"] and "AArch64" in machines["aarch64"]


def run_build(package: Path, path: str) -> subprocess.CompletedProcess[str]:
    """In an interpreter that has filelock and nothing else, so that only what is on `path` can compile."""
    places = [str(package.parent), str(package)]
    script = f"import sys; sys.path[:0] = {places}; import build; print(build.agent_binary())"
    command = [sys.executable, "-I", "-S", "-c", script]
    return subprocess.run(
        command, capture_output=True, text=True, env={"PATH": path}, timeout=100, check=False
    )


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """The sources alone, without binaries; filelock beside them."""
    shutil.copytree(Path(filelock.__file__).parent, tmp_path / "filelock")
    ignored = shutil.ignore_patterns("bin", "__pycache__")
    return Path(shutil.copytree(build.SOURCE, tmp_path / "agent", ignore=ignored))


@pytest.mark.slow
def test_rebuilt_only_when_the_source_changed(package: Path) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("compiles with the system's gcc")
    made = package / "bin" / f"agent-{build.host_arch()}"
    assert run_build(package, os.environ["PATH"]).stdout == f"{made}\n"
    first = made.stat().st_mtime_ns
    assert run_build(package, path="").stdout == f"{made}\n"
    assert made.stat().st_mtime_ns == first
    header = package / "agent.h"
    header.write_text(header.read_text().replace("GRACE_MS 20", "GRACE_MS 21"))
    assert run_build(package, os.environ["PATH"]).returncode == 0
    assert made.stat().st_mtime_ns != first


def test_without_a_compiler_it_says_what_to_install(package: Path) -> None:
    failed = run_build(package, path="")
    assert failed.returncode == 1
    assert "BuildError" in failed.stderr and "ziglang" in failed.stderr and "gcc" in failed.stderr


def test_unknown_machine_type() -> None:
    with pytest.raises(build.BuildError, match="x86_64 and aarch64"):
        build.agent_binary("riscv64")


def test_frames_come_apart_wherever_they_are_cut() -> None:
    sent = [(Kind.DONE, 7, b"x" * 8), (Kind.OUTPUT, 1 << 31, b""), (Kind.PONG, 0, bytes(range(256)))]
    stream = b"".join(frame(*one) for one in sent)
    buffer, received = bytearray(), []
    for byte in stream:
        buffer.append(byte)
        received += split(buffer)
    assert received == sent and not buffer
    with pytest.raises(AgentLost, match="allowed"):
        split(bytearray(b"\xff\xff\xff\x7f"))
