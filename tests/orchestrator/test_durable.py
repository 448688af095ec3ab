"""Atomic publish and tolerant reads, under concurrency and crashes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from orchestrator.contract import wait_for
from orchestrator.durable import append_line, publish_bytes, read_bytes, read_json_lines


def test_a_reader_never_sees_part_of_a_file(tmp_path: Path) -> None:
    path, stop = tmp_path / "record", threading.Event()
    contents = {bytes([65 + i]) * 100_000 for i in range(4)}
    seen: set[bytes] = set()

    def read() -> None:
        while not stop.is_set():
            seen.add(read_bytes(path))

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(15):
        for content in contents:
            publish_bytes(path, content)
    stop.set()
    reader.join()
    assert seen - {b""} and seen - {b""} <= contents
    assert [p.name for p in tmp_path.iterdir()] == ["record"]


def test_a_secret_is_born_private(tmp_path: Path) -> None:
    """Strict modes are watched from inside the write: by the time the name exists the mode is right."""
    before = os.umask(0)
    try:
        publish_bytes(tmp_path / "key", b"s3cret", 0o600)
        publish_bytes(tmp_path / "key", b"s3cret2", 0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600


def test_the_temporary_file_of_a_secret_is_never_world_readable(tmp_path: Path) -> None:
    modes: set[int] = set()
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            for entry in os.scandir(tmp_path):
                try:
                    modes.add(entry.stat().st_mode & 0o077)
                except FileNotFoundError:
                    continue

    watcher = threading.Thread(target=look)
    before = os.umask(0)
    watcher.start()
    try:
        for i in range(60):
            publish_bytes(tmp_path / "key", str(i).encode() * 1000, 0o600)
    finally:
        os.umask(before)
        stop.set()
        watcher.join()
    assert modes == {0}


def test_a_failed_publish_leaves_the_old_content_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    with pytest.raises(OSError):
        publish_bytes(path, b"x")  # a rename onto a directory fails
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_a_writer_killed_at_any_instant_leaves_whole_content(tmp_path: Path) -> None:
    path = tmp_path / "record"
    code = (
        "import sys; from pathlib import Path; from orchestrator.durable import publish_bytes\n"
        "for i in range(10**9): publish_bytes(Path(sys.argv[1]), bytes([65 + i % 26]) * 300_000)"
    )
    for turn in range(5):
        writer = subprocess.Popen([sys.executable, "-c", code, str(path)])
        for _ in range(3 + turn):  # let it get going, and into a different place each time
            _await_change(path, read_bytes(path))
        writer.kill()
        writer.wait(timeout=10)
        content = read_bytes(path)
        assert len(content) == 300_000 and len(set(content)) == 1


def _await_change(path: Path, seen: bytes) -> None:
    wait_for(lambda: None if read_bytes(path) == seen else True, "a write", 20, first_s=0.001)


def test_absent_empty_and_torn(tmp_path: Path) -> None:
    assert read_bytes(tmp_path / "none") == b""
    path = tmp_path / "rows.jsonl"
    append_line(path, '{"step": 1}')
    append_line(path, '{"step": 2}\n')
    with path.open("ab") as file:
        file.write(b'[1]\n\xff\n{"step": 3')
    assert read_json_lines(path) == [{"step": 1}, {"step": 2}]


def test_a_line_that_does_not_fit_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    """As on a filesystem with room for half of it; the limit on the size of a file cuts a write alike."""
    path = tmp_path / "rows.jsonl"
    program = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from orchestrator.durable import append_line\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "append_line(path := Path(sys.argv[1]), '{\"step\": 1}')\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20, resource.RLIM_INFINITY))\n"
        "try: append_line(path, '{\"step\": 2}')\n"
        "except OSError as error: print(error)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "append_line(path, '{\"step\": 3}')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, timeout=30, check=True
    )
    assert "No space left on device" in done.stdout and str(path) in done.stdout
    assert read_json_lines(path) == [{"step": 1}, {"step": 3}]
