"""The run contract: attempts that fence, records that are whole or absent, waits that give up."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from orchestrator.contract import (
    ContractError,
    Heartbeat,
    JobStatus,
    Manifest,
    NotARun,
    PeerGone,
    Pulse,
    ReadyFlag,
    Result,
    Role,
    RunDirectory,
    ServerRecord,
    Superseded,
    WaitTimeout,
    wait_for,
)

FLAG = ReadyFlag(run_id="r", attempt=1, job_id="7", nonce="n", host="h", pid=1, url="http://h:1")


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path / "runs")


def test_a_new_run_is_private_and_every_awaited_file_is_empty(run: RunDirectory) -> None:
    assert stat.S_IMODE(run.root.stat().st_mode) == 0o700
    assert all(path.read_bytes() == b"" for path in run.awaited())
    assert stat.S_IMODE(run.runtime_api_key.stat().st_mode) == 0o600
    assert run.read(run.ready_flag, ReadyFlag) is None and run.read_text(run.runtime_url) == ""


def test_twenty_processes_take_twenty_attempts(run: RunDirectory) -> None:
    code = (
        "import sys; from orchestrator.contract import RunDirectory\n"
        "sys.stdin.read(1)\n"  # all wait for the same gun
        "print(RunDirectory(sys.argv[1]).take_attempt('training', sys.argv[2]))"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(run.root), f"token-{i}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(20)
    ]
    for process in started:
        assert process.stdin is not None
        process.stdin.write("x")
        process.stdin.flush()
    numbers = [int(process.communicate(timeout=60)[0]) for process in started]
    assert sorted(numbers) == list(range(1, 21))
    assert run.latest_attempt("training") == 20 and run.latest_attempt("runtime") == 0


def test_a_retried_attempt_gets_its_own_number_again(run: RunDirectory) -> None:
    """A crash between mkdir and token leaves an attempt that nobody owns; the next one goes on."""
    (run.attempts / "training-1").mkdir()
    assert run.take_attempt("training", "a") == 2


def test_an_earlier_attempt_must_stop(run: RunDirectory) -> None:
    first = run.take_attempt("runtime", "a")
    run.check_attempt("runtime", first)
    run.take_attempt("runtime", "b")
    with pytest.raises(Superseded, match="attempt 1 of runtime was superseded by attempt 2"):
        run.check_attempt("runtime", first)


@pytest.mark.parametrize("cut", [0, 1, 20, 60])
def test_a_half_written_record_is_none(run: RunDirectory, cut: int) -> None:
    run.ready_flag.write_text(FLAG.to_json()[:cut])
    assert run.read(run.ready_flag, ReadyFlag) is None


@pytest.mark.parametrize("text", ["[]", "null", "{}", '{"run_id": "r"}', "\x00\x00", "\xff"])
def test_what_is_no_record_is_none(run: RunDirectory, text: str) -> None:
    run.ready_flag.write_bytes(text.encode("latin-1"))
    assert run.read(run.ready_flag, ReadyFlag) is None


def test_a_record_of_a_later_version_is_read(run: RunDirectory) -> None:
    run.ready_flag.write_text(json.dumps({**json.loads(FLAG.to_json()), "schema": 2, "new": [1]}))
    found = run.read(run.ready_flag, ReadyFlag)
    assert found is not None and (found.url, found.schema) == ("http://h:1", 2)


def test_a_reader_that_loops_sees_whole_records_only(run: RunDirectory) -> None:
    stop, seen = threading.Event(), set()

    def read() -> None:
        while not stop.is_set():
            found = run.read(run.result, Result)
            seen.add(None if found is None else (found.attempt, found.reason))

    reader = threading.Thread(target=read)
    reader.start()
    for attempt in range(40):
        result = Result(
            run_id="r", attempt=attempt, job_id="1", outcome="failed", reason="x" * attempt, exit_code=1
        )
        run.publish(run.result, result)
    stop.set()
    reader.join()
    assert all(found is None or len(found[1]) == found[0] for found in seen)


def test_a_directory_without_manifest_is_no_run(tmp_path: Path, run: RunDirectory) -> None:
    with pytest.raises(NotARun, match="orchestrate list"):
        RunDirectory.open(tmp_path)
    run.publish(run.manifest, Manifest(run_id=run.run_id, scheduler="local"))
    assert RunDirectory.open(run.root).run_id == run.root.name


def test_the_job_id_of_a_role_is_its_last(run: RunDirectory) -> None:
    entries = [{"role": "training", "job_id": i} for i in ("", "4", "9", "")]
    manifest = Manifest(run_id="r", scheduler="local", submissions=entries)
    assert (manifest.job_id("training"), manifest.job_id("runtime")) == ("9", "")


def test_events_of_all_writers_in_order_of_time(run: RunDirectory) -> None:
    run.events_of(Role.RUNTIME).add("ready", url="u")
    run.events_of(Role.TRAINING).add("step", step=1)
    run.events_of(Role.LAUNCHER, "cancel-1").add("cancel")
    (run.events / "torn.jsonl").write_text('{"role": "x"')
    names = [event.what for event in run.timeline()]
    assert names == ["runtime.ready", "training.step", "launcher.cancel"]


def test_waiting_returns_what_appears() -> None:
    answers = iter([None, None, 0])
    assert wait_for(lambda: next(answers), "a number", 5, first_s=0.001) == 0


def test_waiting_ends_at_the_deadline() -> None:
    with pytest.raises(WaitTimeout, match=r"the flag did not appear within 0\.05 s"):
        wait_for(lambda: None, "the flag", 0.05, first_s=0.01)


def test_waiting_for_the_dead_ends_at_once() -> None:
    start = time.monotonic()
    with pytest.raises(PeerGone, match="for the flag, but the runtime job is over"):
        wait_for(lambda: None, "the flag", 60, lambda: "the runtime job is over", first_s=0.01)
    assert time.monotonic() - start < 1


def test_one_root_of_errors() -> None:
    assert {WaitTimeout, PeerGone, Superseded, NotARun} <= set(ContractError.__subclasses__())


def test_a_heart_beats_in_place(run: RunDirectory) -> None:
    path = run.heartbeat("runtime")
    with Heartbeat(path, every_s=0.01) as heart:
        pulse, first = Pulse(path), path.read_bytes()
        wait_for(lambda: path.read_bytes() != first or None, "a beat", 5, first_s=0.005)
        assert pulse.still_for() < 0.5
        assert len(path.read_bytes()) == len(first) == 33
        heart.every_s = 100
    pulse.still_for()  # sees the last beat
    still = pulse.still_for()
    assert pulse.still_for() >= still  # nobody beats: only the observer's own clock moves on


def test_a_heart_survives_a_filesystem_that_fails(tmp_path: Path) -> None:
    heart = Heartbeat(tmp_path / "gone" / "heartbeat")
    heart.beat()
    assert Pulse(heart.path).still_for() >= 0


def test_a_status_says_where_a_job_stands(run: RunDirectory) -> None:
    status = JobStatus(
        run_id="r", role="runtime", attempt=1, job_id="1", nonce="n", host="h", pid=2, phase="running"
    )
    run.publish(run.status("runtime"), status)
    assert run.read(run.status("runtime"), JobStatus) == status


def test_records_of_servers_are_read_as_far_as_they_are_of_this_run(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path)
    who = {"attempt": 1, "job_id": "", "nonce": "n", "host": "h", "pid": 1, "url": "http://h:1"}
    for name, run_id in (("b", run.run_id), ("a", run.run_id), ("c", "another")):
        run.publish(run.server(name), ServerRecord(name=name, run_id=run_id, **who))
    run.publish(run.server("d"), "")
    assert [record.name for record in run.read_servers()] == ["a", "b"]
