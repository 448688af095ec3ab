"""Which dialect a `/start` speaks, what it asks for, and the record that answers it."""

from __future__ import annotations

import pytest

from runtime_server.dialects.records import Phase, View, infra, pod_status, record, status
from runtime_server.dialects.start import Dialect, Start, hold_of, told
from runtime_server.wire import Code

V0_COMMAND = [
    "/openhands/micromamba/bin/micromamba", "run", "-n", "openhands", "poetry", "run", "python", "-u", "-m",
    "openhands.runtime.action_execution_server", "60000", "--working-dir", "/work space", "--plugins",
    "agent_skills", "jupyter", "--username", "root", "--user-id", "0",
]  # fmt: skip
V1_COMMAND = "/usr/local/bin/openhands-agent-server --port 60000"


def start(command: list[str] | str, **more: object) -> Start:
    return Start.model_validate({"image": "i", "session_id": "s", "command": command, **more})


@pytest.mark.parametrize(
    ("command", "more", "dialect"),
    [
        (V0_COMMAND, {}, Dialect.V0),
        (" ".join(V0_COMMAND), {}, Dialect.V0),
        ("python -m runtime.client.client 60000", {}, Dialect.V0),
        ([w if w != "60000" else "88888888" for w in V0_COMMAND], {}, Dialect.SKYRL),
        (V1_COMMAND, {}, Dialect.V1),
        ("/agent-server/.venv/bin/python -m openhands.agent_server --port 60000", {}, Dialect.V1),
        (V1_COMMAND.split(), {"run_as_group": 10001}, Dialect.APP),
        ("unbalanced ' quote", {}, Dialect.V0),
    ],
)
def test_the_command_tells_the_dialect(
    command: list[str] | str, more: dict[str, object], dialect: str
) -> None:
    assert told(start(command, **more)).dialect == dialect


def test_the_options_of_the_server_that_is_never_run_are_read() -> None:
    found = told(
        start(V0_COMMAND, environment={"NO_CHANGE_TIMEOUT_SECONDS": "30"}, working_dir="/openhands/code/")
    )
    assert (found.workdir, found.username, found.plugins) == (
        "/work space",
        "root",
        ("agent_skills", "jupyter"),
    )
    assert found.jupyter and found.no_change_s == 30


def test_without_options_there_are_defaults() -> None:
    found = told(start("action_execution_server", environment={"NO_CHANGE_TIMEOUT_SECONDS": "soon"}))
    assert (found.workdir, found.plugins, found.no_change_s) == ("/workspace", (), 10)
    assert told(start(V1_COMMAND, working_dir="/")).workdir == "/"
    assert told(start(V1_COMMAND, working_dir="relative")).workdir == "/"


def test_a_body_may_hold_what_nobody_knows() -> None:
    body = start(
        "x", runtime_mounts=[{"host_path": "/"}], environment={"N": 3, "none": None}, resource_factor=1e9
    )
    assert body.environment == {"N": "3"} and body.resource_factor == 64
    for wrong in ({"session_id": None}, {"session_id": ""}, {"image": ""}):
        with pytest.raises(ValueError, match=r"session_id|image"):
            start("x", **wrong)


def test_no_hold_is_longer_than_its_client_waits() -> None:
    assert hold_of(Dialect.V0).start < 10 and hold_of(Dialect.SKYRL).look < 10
    assert hold_of(Dialect.V0, start_s=60).start == 60
    assert hold_of(Dialect.V0, "python-requests/2.32", start_s=60).start < 10
    assert hold_of(Dialect.V1).start < 300 and hold_of(Dialect.V1).look < 60
    assert hold_of(Dialect.APP).start < 15


def test_ready_is_said_as_each_client_wants_to_hear_it() -> None:
    assert pod_status(Dialect.V0, Phase.READY) == pod_status(Dialect.V1, Phase.READY) == "ready"
    assert pod_status(Dialect.SKYRL, Phase.READY) == "running"
    for dialect in (Dialect.V0, Dialect.SKYRL, Dialect.V1):
        assert pod_status(dialect, Phase.PENDING) == "pending" and status(dialect, Phase.PENDING) == "running"
        assert pod_status(dialect, Phase.STOPPED) == "failed" and status(dialect, Phase.STOPPED) == "stopped"
        assert pod_status(dialect, Phase.OOM) == "crashloopbackoff"
    assert status(Dialect.APP, Phase.PENDING) == "starting" and status(Dialect.APP, Phase.FAILED) == "error"


@pytest.mark.parametrize("phase", list(Phase))
@pytest.mark.parametrize("dialect", list(Dialect))
def test_a_record_has_no_null(dialect: Dialect, phase: Phase) -> None:
    made = record(View("r-1", "s", dialect, phase, "i", "http://h"))
    assert None not in made.values() and "session_api_key" not in made
    assert made["restart_count"] == 0 and made["pod_status"] == made["pod_status"].lower()


def test_every_code_has_a_word_of_the_infrastructure() -> None:
    words = {"oom", "disk", "died", "evicted", "timeout", "server"}
    assert {infra(code) for code in Code} <= words
    assert (infra(Code.OOM), infra(Code.EXPIRED), infra(Code.INTERNAL)) == ("oom", "evicted", "server")
    assert infra("disk_full") == "disk"
