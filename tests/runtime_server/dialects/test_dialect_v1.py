"""OpenHands V1 inside a sandbox: commands as events, files, git. `tests/clients` has the real client."""

from __future__ import annotations

import time

import pytest
from dialectkit import V1, Control

pytestmark = pytest.mark.container


def test_streams_and_exit_code(v1: V1) -> None:
    assert v1.run("echo out; echo err >&2; exit 3") == (3, "out\n", "err\n")
    assert v1.run("kill -9 $$")[0] == -9
    assert v1.run("pwd; echo $0", cwd="/usr")[1] == "/usr\n/bin/sh\n"
    assert v1.run("pwd")[1] == "/\n"
    assert v1.run("cd /tmp; export A=1") == (0, "", "") and v1.run("pwd; echo $A")[1] == "/\n\n"


def test_output_comes_while_the_command_runs(v1: V1) -> None:
    identity = v1.begin("echo begun; sleep 20")
    params = {"kind__eq": "BashOutput", "command_id__eq": identity, "sort_order": "TIMESTAMP"}
    deadline = time.monotonic() + 10
    while not (items := v1.http.get("/api/bash/bash_events/search", params=params).json()["items"]):
        assert time.monotonic() < deadline
    assert items[0]["stdout"] == "begun\n" and items[0]["exit_code"] is None
    dashed = f"{identity[:8]}-{identity[8:12]}-{identity[12:16]}-{identity[16:20]}-{identity[20:]}"
    assert v1.http.post(f"/api/bash/bash_commands/{dashed}/stop").json() == {"success": True}
    assert v1.http.post("/api/bash/bash_commands/none/stop").status_code == 404
    while items[-1]["exit_code"] is None:
        items = v1.http.get("/api/bash/bash_events/search", params=params).json()["items"]
        assert time.monotonic() < deadline
    assert items[-1]["exit_code"] != 0
    latest = v1.http.get(
        "/api/bash/bash_events/search", params={**params, "sort_order": "TIMESTAMP_DESC", "limit": 1}
    )
    assert latest.json()["items"] == [items[-1]]
    assert v1.http.get(f"/api/bash/bash_events/{items[0]['id']}").json() == items[0]
    assert v1.http.get("/api/bash/bash_events/none").status_code == 404


def test_a_command_over_its_time_is_ended_with_all_it_started(v1: V1) -> None:
    code, out, err = v1.run(
        "echo begun; setsid sleep 1234 & trap '' TERM; while :; do sleep 0.1; done", timeout=1
    )
    assert (code, out) == (-1, "begun\n") and "Command timed out after 1 seconds" in err
    assert v1.run("pgrep -f 'sleep 123[4]' | wc -l")[1] == "0\n"


def test_what_is_left_in_the_background_does_not_hold_up_the_end(v1: V1) -> None:
    begun = time.monotonic()
    assert v1.run("sleep 15 & echo done", timeout=10)[:2] == (0, "done\n")
    assert time.monotonic() - begun < 5


def test_much_output_comes_in_pages_without_losing_a_character(v1: V1) -> None:
    code, out, _ = v1.run("i=0; while [ $i -lt 60000 ]; do echo €$i; i=$((i+1)); done", timeout=60)
    assert code == 0 and out == "".join(f"€{n}\n" for n in range(60000))


def test_a_directory_that_is_missing_is_an_event(v1: V1) -> None:
    code, out, err = v1.run("true", cwd="/no/such")
    assert code == -1 and not out and "No such file" in err


def test_execute_waits_and_events_can_be_cleared(v1: V1) -> None:
    got = v1.http.post("/api/bash/execute_bash_command", json={"command": "echo a; echo b >&2", "timeout": 0})
    event = got.json()
    assert (event["stdout"], event["stderr"], event["exit_code"]) == ("a\n", "b\n", 0)
    assert v1.http.delete("/api/bash/bash_events").json()["cleared_count"] >= 2
    assert v1.http.get("/api/bash/bash_events/search").json() == {"items": [], "next_page_id": None}


def test_files(v1: V1) -> None:
    data = bytes(range(256)) * 100
    got = v1.http.post("/api/file/upload", params={"path": "/tmp/up/a.bin"}, files={"file": ("x", data)})
    assert got.json() == {"success": True, "file_size": len(data)}
    assert v1.http.get("/api/file/download", params={"path": "/tmp/up/a.bin"}).content == data
    for path, code in (("relative", 400), ("/none", 404), ("/tmp", 400)):
        assert v1.http.get("/api/file/download", params={"path": path}).status_code == code
    for path in ("relative", "/tmp", "/tmp/up/a.bin/below"):
        got = v1.http.post("/api/file/upload", params={"path": path}, files={"file": ("x", b"")})
        assert got.status_code == 400 and "detail" in got.json()


def test_git(v1: V1) -> None:
    make = (
        "mkdir -p /repo && cd /repo && git init -q && git config user.email a@b && git config user.name a && "
        "echo 1 > kept && echo 1 > gone && echo 1 > moved && git add . && git commit -qm x && "
        "echo 2 > kept && rm gone && git mv moved there && echo n > 'new file'"
    )
    assert v1.run(make)[0] == 0
    changes = v1.http.get("/api/git/changes", params={"path": "/repo"}).json()
    added, deleted = ["new file", "there"], ["gone", "moved"]
    assert sorted(f"{c['status']} {c['path']}" for c in changes) == [
        *(f"ADDED {name}" for name in added),
        *(f"DELETED {name}" for name in deleted),
        "UPDATED kept",
    ]
    assert v1.http.get("/api/git/changes", params={"path": "/usr"}).json() == []
    diff = v1.http.get("/api/git/diff", params={"path": "/repo/kept"}).json()
    assert diff == {"modified": "2\n", "original": "1\n"}
    assert v1.http.get("/api/git/diff", params={"path": "/repo/gone"}).json() == {
        "modified": "",
        "original": "1\n",
    }
    for params in (
        {"path": "/repo/none"},
        {"path": "/repo/kept", "ref": "nope"},
        {"path": "/repo/kept", "ref": "--x"},
    ):
        assert v1.http.get("/api/git/diff", params=params).status_code == 400


def test_conversations_are_refused_with_a_reason(v1: V1) -> None:
    got = v1.http.post("/api/conversations", json={})
    assert got.status_code == 501 and "agent server" in got.json()["detail"]
    scoped = v1.http.post(
        "/api/conversations/29b583b7-11b0-4d2f-9b95-43079e39d855/bash/execute_bash_command",
        json={"command": "echo scoped"},
    )
    assert scoped.json()["stdout"] == "scoped\n"


def test_what_needs_no_key_and_what_does(v1: V1, control: Control) -> None:
    for path in ("/health", "/alive", "/ready", "/server_info"):
        assert control.http.get(path).status_code == 200
    assert v1.http.get("/health").status_code == 200
    got = v1.http.post(
        "/api/bash/start_bash_command", headers={"X-Session-API-Key": "no"}, json={"command": "true"}
    )
    assert got.status_code == 401 and "detail" in got.json()


def test_a_sandbox_that_ended_is_told_in_the_running_command(control: Control) -> None:
    with control.v1() as client:
        identity = client.begin("sleep 60")
        found = control.http.get("/v1/sandboxes").json()["sandboxes"]
        mine = next(
            one["id"] for one in found if one["labels"].get("dialect.id") == client.record["runtime_id"]
        )
        assert control.http.delete(f"/v1/sandboxes/{mine}").status_code == 204
        got = client.http.get("/api/bash/bash_events/search", params={"command_id__eq": identity})
        assert got.status_code in (401, 502) and "detail" in got.json()
