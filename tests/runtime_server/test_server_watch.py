"""What an ordinary user's server reads by itself: id maps, process trees, memory without a process."""

from __future__ import annotations

import os
import subprocess
import sys

from runtime_server.engines.userns import triples
from runtime_server.engines.watch import Table, proportional, unmapped

_TREE = """
import os, subprocess, sys
kept = os.memfd_create("kept")
os.write(kept, bytes(1 << 20))
code = "import os, sys; print(os.getpid(), flush=True); sys.stdin.read()"
child = subprocess.Popen([sys.executable, "-c", code])
child.wait()
"""


def test_root_inside_is_this_user() -> None:
    assert triples(1000, [(5000, 10), (7000, 5)]) == ["0", "1000", "1", "1", "5000", "10", "11", "7000", "5"]
    assert triples(1000, []) == ["0", "1000", "1"]


def test_a_tree_is_found_with_all_its_memory() -> None:
    command = [sys.executable, "-c", _TREE]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as top:
        assert top.stdout is not None and top.stdin is not None
        child = int(top.stdout.readline())
        table = Table.read([os.getpid(), top.pid, child])
        assert table.below(os.getpid()) == [top.pid, child] and table.below(child) == []
        assert proportional(child) > 0 and table.resident[child] > 0
        assert list(unmapped([top.pid]).values()) == [1 << 20] and unmapped([child]) == {}
        top.stdin.close()
        assert top.wait(20) == 0
    assert Table.read([child]).resident == {} and proportional(child) == 0
