"""What is known of processes that were ended for memory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from runtime_server.engines import Container
from runtime_server.kills import Kills


@pytest.mark.parametrize("name", ["memory.events", "memory.oom_control"])
def test_the_kernels_count_is_read_again_each_time(tmp_path: Path, name: str) -> None:
    file, kills = tmp_path / name, Kills()
    container = Container("c", os.getpid(), memory=tmp_path)
    for number in (0, 2):
        file.write_text(f"low 0\noom_kill {number}\noom_group_kill 0\n")
        assert kills.count(container) == number
    file.write_text("an old kernel's\n")
    assert kills.count(container) == 0


def test_what_cannot_be_known_is_none(tmp_path: Path) -> None:
    kills = Kills()
    assert kills.count(Container("c", 1)) == 0
    assert kills.count(Container("c", 1, memory=tmp_path / "gone")) == 0


def test_another_container_has_a_count_of_its_own(tmp_path: Path) -> None:
    kills, before = Kills(), len([*Path("/proc/self/fd").iterdir()])
    for number in (3, 1):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "memory.events").write_text(f"oom_kill {number}\n")
        assert kills.count(Container("c", 1, memory=folder)) == number
    kills.close()
    assert len([*Path("/proc/self/fd").iterdir()]) == before
