"""The shared filesystem is full, read-only, late, or remembers an older life; clocks differ."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.contract import JobStatus, ReadyFlag

from .conftest import NewDrill

pytestmark = [pytest.mark.drill, pytest.mark.cluster, pytest.mark.container, pytest.mark.timeout(600)]
REMOUNT = "mount --bind {0} {0} && mount -o remount,bind,ro {0}"


def test_read_only(new_drill: NewDrill) -> None:
    drill = new_drill("the run directory turns read-only on the training node")
    run = drill.launch()
    drill.reach_step(2)
    node = next(job.nodes for job in drill.cluster.jobs() if job.id == drill.job("training"))
    drill.fault()
    # the job's processes share the node's mounts, so they see it at once
    drill.cluster.run(["sh", "-c", REMOUNT.format(run.root)], user=False, node=node, check=True)
    try:
        drill.over()
    finally:
        drill.cluster.run(["umount", "-l", run.root], user=False, node=node)
    drill.row("the training fails with the reason in its log; both jobs end")


def test_stale_flags(new_drill: NewDrill) -> None:
    drill = new_drill("flags, url and key of an older attempt")
    run = drill.launch()
    drill.wait(lambda: run.read(run.ready_flag, ReadyFlag), 60, "the runtime")
    drill.reach_step(2)
    flag, url = run.ready_flag.read_bytes(), run.runtime_url.read_bytes()
    drill.fault()
    drill.cluster.run(["scontrol", "requeue", drill.job("runtime")], check=True)
    drill.wait(lambda: run.latest_attempt("runtime") == 2, 60, "the second attempt")
    run.ready_flag.write_bytes(flag)  # what a client with an old cache would see
    run.runtime_url.write_bytes(url)
    drill.recovers()
    drill.ends("success")
    drill.row("the older attempt's words are not believed; the present server's are")


def test_clock_skew(new_drill: NewDrill) -> None:
    if not (library := next(iter_libraries(), "")):
        pytest.skip("libfaketime is not installed")
    drill = new_drill("the runtime node's clock is three hours ahead")
    lines = [f"export LD_PRELOAD={library} FAKETIME=+3h FAKETIME_DONT_FAKE_MONOTONIC=1"]
    drill.configure(runtime={"setup_commands": lines})
    run = drill.launch()
    drill.fault()
    drill.ends("success")
    status = run.read(run.status("runtime"), JobStatus)
    training = run.read(run.status("training"), JobStatus)
    assert status is not None and training is not None and status.at - training.at > 3600
    drill.row("nothing: no times of two hosts are compared")


def iter_libraries() -> Iterator[str]:
    return (str(path) for path in Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))


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
        drill.fault()
        drill.ends("success", timeout=400)
    finally:
        for node in nodes:
            drill.cluster.run(["fusermount", "-uz", runs], user=False, node=node)
    drill.row("the run ends with success; files that others wait for exist from the start")
