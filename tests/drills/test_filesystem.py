"""The shared filesystem is full, read-only, late, or remembers an older life; clocks differ."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from orchestrator.contract import JobStatus, ReadyFlag

from .conftest import NewDrill

pytestmark = [pytest.mark.drill, pytest.mark.cluster, pytest.mark.container, pytest.mark.timeout(600)]
SKEW = Path(__file__).with_name("skew.c")
# Not while a file there is open for writing, and one is every now and then.
REMOUNT = """mount --bind {0} {0} && for _ in $(seq 200); do
    mount -o remount,bind,ro {0} && exit; sleep 0.05; done; exit 1"""


def test_read_only(new_drill: NewDrill) -> None:
    drill = new_drill("the run directory turns read-only on the training node")
    run = drill.train(2)
    drill.wait((run.checkpoints / "latest").exists, 60, "a checkpoint")
    node = drill.node("training")
    drill.fault()
    # the job's processes share the node's mounts, so they see it at once
    remount = ["sh", "-c", REMOUNT.format(drill.root)]
    drill.cluster.run(remount, user=False, node=node, check=True)
    try:
        drill.over()
        assert "Read-only file system" in drill.orchestrate("why")
    finally:
        drill.cluster.run(["umount", "-l", drill.root], user=False, node=node)
    drill.resume()
    drill.recovers()
    drill.ends("success")
    drill.row(
        "the training fails, both jobs end, `orchestrate why` says so; once it can be written again, "
        "`orchestrate resume` goes on from the checkpoint"
    )


def test_full(new_drill: NewDrill) -> None:
    drill = new_drill("the filesystem of the run directory is full")
    filler = drill.on_small_disk(64) / "filler"
    drill.train()
    drill.fault()
    filled = drill.cluster.run(["dd", "if=/dev/zero", f"of={filler}", "bs=64k"])
    assert "No space left" in filled.stderr
    drill.over()
    assert "cannot be written: No space left on device" in drill.orchestrate("why")
    drill.cluster.run(["rm", filler], check=True)
    drill.resume()
    drill.recovers()
    drill.ends("success")
    drill.row(
        "the training fails, both jobs end, `orchestrate why` says that the disk is full; once there is "
        "room, `orchestrate resume` goes on from the checkpoint"
    )


def test_stale_flags(new_drill: NewDrill) -> None:
    drill = new_drill("flags, url and key of an older attempt")
    run = drill.train(2)
    assert run.read(run.ready_flag, ReadyFlag)
    flag, url = run.ready_flag.read_bytes(), run.runtime_url.read_bytes()
    drill.fault()
    drill.cluster.run(["scontrol", "requeue", drill.job("runtime")], check=True)
    drill.wait(lambda: run.latest_attempt("runtime") == 2, 60, "the second attempt")
    run.ready_flag.write_bytes(flag)  # what a client with an old cache would see
    run.runtime_url.write_bytes(url)
    drill.recovers("runtime")
    drill.ends("success")
    drill.row("the older attempt's words are not believed; the present server's are")


def test_clock_skew(new_drill: NewDrill) -> None:
    drill = new_drill("the runtime node's clock is three hours ahead")
    library = drill.cluster.shared / "skew.so"
    compiler = ["gcc", "-shared", "-fPIC", "-O1", "-DAHEAD=10800", "-o", library, SKEW]
    subprocess.run(compiler, check=True)
    drill.configure(runtime={"setup_commands": [f"export LD_PRELOAD={library}"]})
    run = drill.launch()
    drill.ends("success")
    status = run.read(run.status("runtime"), JobStatus)
    training = run.read(run.status("training"), JobStatus)
    assert status is not None and training is not None and status.at - training.at > 3600
    drill.row("nothing: the run succeeds; times of two hosts are never compared")


def test_directory_lag(new_drill: NewDrill) -> None:
    if not shutil.which("bindfs"):
        pytest.skip("bindfs is not installed")
    drill = new_drill("30 s of directory lag on each node (FUSE)")
    runs = drill.cluster.shared / "runs"
    runs.mkdir(exist_ok=True)
    options = "attr_timeout=30,entry_timeout=30,negative_timeout=30,allow_other"
    nodes = ("cpu1", "cpu2", "gpu1", "gpu2")
    for node in nodes:
        command = ["bindfs", "-o", options, runs, runs]
        drill.cluster.run(command, user=False, node=node, check=True)
    try:
        drill.launch()
        drill.ends("success", timeout=400)
    finally:
        for node in nodes:
            drill.cluster.run(["fusermount", "-uz", runs], user=False, node=node)
    drill.row("the run ends with success; files that others wait for exist from the start")
