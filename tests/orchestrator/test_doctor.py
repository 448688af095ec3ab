"""`orchestrate doctor`: judgements on recorded answers, then real probes as local jobs."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from memory_scheduler import MemoryScheduler

from orchestrator import checks_files, checks_node, checks_site, doctor, probe
from orchestrator.cli_commands import cli
from orchestrator.config import load
from orchestrator.launch import absolute
from orchestrator.probe import Folder
from orchestrator.schedulers import JobInfo, JobState
from orchestrator.schedulers.local import LocalScheduler
from orchestrator.schedulers.site import Site, gpus, partitions, read_site, settings
from orchestrator.schedulers.slurm_commands import LocalCommands

SINFO = """\
test*|up|4:00:00|1-infinite|2|16|64000|(null)|idle
test*|up|4:00:00|1-infinite|1|8|32000|(null)|down*
gpu_test|up|12:00:00|1-2|2|32|128000|gpu:a100:2(S:0-1)|mixed
gpu_old|inact|infinite|1-infinite|1|8|16000|gpu:2|idle
"""
CONFIG = """\
Configuration data as of 2026-11-21T15:00:00
AccountingStorageType   = accounting_storage/none
JobRequeue              = 0
KillWait                = 15 sec
ProctrackType           = proctrack/linuxproc
"""


def site(**changes: Any) -> Site:
    known = settings(CONFIG)
    found = Site(version="slurm 22.05.8", controllers=["Slurmctld(primary) at c is UP"], settings=known)
    found.partitions = partitions(SINFO.splitlines())
    for name, value in changes.items():
        setattr(found, name, value)
    return found


def judged(*assignments: str, **changes: Any) -> dict[str, list[str]]:
    config = load("base", ["training.partition=gpu_test", *assignments], {}).config
    found: dict[str, list[str]] = {}
    for check in checks_site.site(config, site(**changes)):
        found.setdefault(check.level, []).append(f"{check.name}: {check.text} → {check.remedy}")
    return found


def test_partitions_are_read_from_sinfo() -> None:
    found = partitions(SINFO.splitlines())
    test, gpu = found["test"], found["gpu_test"]
    assert (test.default, test.max_time, test.nodes, test.working, test.cpus) == (True, 14400, 3, 2, 16)
    assert (gpu.gpus, gpu.max_nodes, gpu.memory) == ({"a100": 2}, 2, 128000)
    assert not found["gpu_old"].up and found["gpu_old"].max_time is None and found["gpu_old"].gpus == {"": 2}


def test_gres() -> None:
    assert gpus("gpu:1g.10gb:7,gpu:a100:1,shard:8") == {"1g.10gb": 7, "a100": 1}
    assert gpus("(null)") == {} and gpus("gpu:tesla:2(IDX:0-1)") == {"tesla": 2}


def test_a_site_that_fits() -> None:
    found = judged("runtime.memory=32000", "training.cpus=8")
    assert "fail" not in found and any("gpu_test: 2 nodes of 32 CPUs" in text for text in found["ok"])
    assert len([text for text in found["warn"] if "scheduler.on_timeout=array" in text]) == 1
    assert any("15 s between TERM and KILL" in text for text in found["warn"])


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        (
            "training.partition=gpus",
            "there is no gpus → set training.partition to one of gpu_old, gpu_test, test",
        ),
        ("training.time_limit=13h", "jobs may last 12:00:00, not 13:00:00 → set training.time_limit=43200"),
        ("training.gpus_per_node=4", "a node has 2 GPUs, not 4"),
        ("training.gpu_type=h100", "no GPUs of type h100 → set training.gpu_type to one of: a100"),
        ("training.partition=test", "its nodes have no GPUs"),
        ("training.partition=gpu_old", "it is not up"),
        ("training.nodes=3", "a job may have 2 nodes, not 3"),
        ("runtime.cpus=64", "its largest node has 16 CPUs, not 64"),
        ("runtime.memory=256G", "MiB, not 262144"),
    ],
)
def test_what_does_not_fit_is_named_with_its_remedy(assignment: str, says: str) -> None:
    assert says in "\n".join(judged(assignment)["fail"])


def test_a_site_that_cannot_be_asked() -> None:
    silent = judged(problem="the controller does not answer: connect failure")
    assert "the controller does not answer" in silent["fail"][0] and len(silent["fail"]) == 1
    assert "scheduler.kind=local" in judged(version="", problem="sinfo is not on the PATH")["fail"][0]


def test_the_site_is_asked_through_the_commands_on_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sinfo.txt").write_text(SINFO)
    (tmp_path / "config.txt").write_text(CONFIG)
    programs = {
        "sinfo": f'[ "$1" = --version ] && echo slurm 23.11.4 || cat {tmp_path}/sinfo.txt',
        "scontrol": f'[ "$1" = ping ] && echo "Slurmctld(primary) at c1 is UP" || cat {tmp_path}/config.txt',
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = read_site(LocalCommands())
    assert (found.problem, found.version, len(found.partitions)) == ("", "slurm 23.11.4", 3)
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho 'Slurmctld(primary) at c1 is DOWN'; exit 1\n")
    assert "DOWN" in read_site(LocalCommands()).problem


# --- files and node ----------------------------------------------------------------------------------

MOUNTS = "/dev/vda / ext4 rw 0 0\nnas:/home /home nfs4 rw 0 0\nx@tcp:/l /home/big\\040disk lustre rw 0 0\n"


@pytest.mark.parametrize(
    ("path", "kind", "level"),
    [("/tmp/x", "ext4", "warn"), ("/home/me/runs", "nfs4", "ok"), ("/home/big disk/runs", "lustre", "ok")],
)
def test_the_filesystem_of_a_path(path: str, kind: str, level: str) -> None:
    assert checks_files.mount_of(Path(path), MOUNTS)[0] == kind
    assert checks_files.kind_of(Path(path), MOUNTS).level == level


def test_a_folder_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    checks = {check.name: check.level for check in checks_files.directory(tmp_path / "not" / "yet", "alone")}
    assert {checks[name] for name in ("rename", "O_EXCL", "modes", "filesystem")} == {"ok"}
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_a_failure() -> None:
    checks = [check for check in checks_files.directory(Path("/proc/self")) if check.level == "fail"]
    assert len(checks) == 1 and "run.runs_dir" in checks[0].remedy


def test_subordinate_ids() -> None:
    text = "root:1:10\nann:100000:65536\n1000:300000:5\nbroken\n"
    assert checks_node.subids(text, "ann", 1000) == 65541
    assert checks_node.subids("", "ann", 1000) == 0


@pytest.mark.parametrize("role", ["login", "runtime", "training"])
def test_a_node_says_something_about_everything(role: str) -> None:
    checks = list(checks_node.node(role))
    assert len({check.name for check in checks}) >= 4
    assert all(check.remedy for check in checks if check.level != "ok")


# --- between nodes -----------------------------------------------------------------------------------


def test_what_lies_between_is_judged() -> None:
    good = {
        "port": "n1:5",
        "trip_s": 0.001,
        "skew_s": 0.1,
        "lag_s": {"new": 0.2, "removed": 9.0, "replaced": None},
    }
    levels = {check.name: check.level for check in doctor.between(good)}
    assert levels == {
        "port": "ok",
        "clocks": "ok",
        "new file": "ok",
        "removed file": "warn",
        "replaced file": "fail",
    }
    (closed,) = doctor.between({"port": "", "problem": "n1 port 5: timed out"})
    assert closed.level == "fail" and "n1 port 5" in closed.text


def test_the_two_ends_measure_over_a_real_socket(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    server = threading.Thread(target=probe.serve, args=(folder, 20.0))
    server.start()
    found = probe.measure(folder, 10.0)
    server.join(10)
    assert not server.is_alive()
    assert set(found["lag_s"]) == {"new", "replaced", "removed"} and None not in found["lag_s"].values()
    assert abs(found["skew_s"]) < 1 and found["trip_s"] >= 0


def test_a_caller_without_the_token_changes_nothing(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    server = threading.Thread(target=probe.serve, args=(folder, 20.0))
    server.start()
    about = probe._wait(lambda: folder.read(folder.address), 10)
    folder.publish(folder.root / "stolen.json", {**about, "token": "wrong"})
    assert (folder.root / "stolen.json").stat().st_mode & 0o777 == 0o600
    liar = Folder(tmp_path)
    liar.address = folder.root / "stolen.json"
    assert probe.measure(liar, 5.0)["port"] == ""
    assert not list(tmp_path.glob("new-*"))
    assert probe.measure(folder, 5.0)["port"]
    server.join(10)


@pytest.mark.slow
def test_a_probe_by_local_jobs(runs_dir: Path) -> None:
    done = CliRunner().invoke(
        cli, ["doctor", "-c", "local", "--probe", "--timeout", "60", "--json", f"run.runs_dir={runs_dir}"]
    )
    groups = json.loads(done.stdout)["groups"]
    assert {check["level"] for check in groups["between them"]} == {"ok"}, groups
    assert len([name for name in groups if "node (" in name]) == 2
    assert [path.name for path in runs_dir.iterdir()] == [".local"]
    assert LocalScheduler(runs_dir / ".local").mine() == []


@pytest.mark.slow
def test_a_probe_without_its_interpreter_says_what_is_missing(runs_dir: Path) -> None:
    config = absolute(
        load("local", [f"run.runs_dir={runs_dir}", "training.python=/no/python"]).config, Path.cwd()
    )
    found = doctor.Probe(config, LocalScheduler(runs_dir / ".local")).run(4.0)
    (check,) = found["training node"]
    assert check.level == "fail" and "/no/python" in check.text


def test_a_probe_that_never_starts_explains_the_queue(runs_dir: Path) -> None:
    memory = MemoryScheduler()

    def stuck(_: int) -> None:
        for job_id, info in memory.jobs.items():
            if info.state == JobState.PENDING:  # until the probe takes it back
                memory.jobs[job_id] = JobInfo(job_id, JobState.PENDING, "PartitionNodeLimit")

    memory.script = stuck
    config = absolute(load("local", [f"run.runs_dir={runs_dir}"]).config, Path.cwd())
    found = doctor.Probe(config, memory).run(0.1)
    (check,) = found["runtime node"]
    assert check.level == "warn" and "more nodes than the partition" in check.text
