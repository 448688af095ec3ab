"""OpenHands V1's `APIRemoteWorkspace`, unmodified."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import IMAGE, Proxy, Server

os.environ |= {"OPENHANDS_SUPPRESS_BANNER": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LOG_LEVEL": "ERROR"}

from openhands.workspace import APIRemoteWorkspace

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def make_all(server: Server) -> Iterator[Make]:
    made: list[Any] = []

    def workspace(url: str = server.url, **more: Any) -> Any:
        more = {"server_image": IMAGE, "startup_wait_timeout": 30, **more}
        one = APIRemoteWorkspace(runtime_api_url=url, runtime_api_key=server.key, **more)
        made.append(one)
        return one

    yield workspace
    for one in made:
        one.cleanup()


@pytest.fixture
def make(make_all: Make) -> Make:
    return make_all


@pytest.fixture(scope="module")
def workspace(make_all: Make) -> Any:
    return make_all()


def test_construct_with_a_url_that_has_no_path(workspace: Any, server: Server) -> None:
    assert workspace.host == server.url and workspace.api_key != server.key
    found = workspace.execute_command("echo out; echo err >&2; exit 3")
    assert (found.exit_code, found.stdout, found.stderr) == (3, "out\n", "err\n")
    assert not found.timeout_occurred


def test_commands_share_nothing_and_start_in_the_root(workspace: Any) -> None:
    workspace.execute_command("cd /tmp; export A=1")
    assert workspace.execute_command("pwd; echo $A").stdout == "/\n\n"
    assert workspace.execute_command("pwd", cwd="/usr").stdout == "/usr\n"
    missing = workspace.execute_command("true", cwd="/no/such")
    assert missing.exit_code == -1 and "No such file" in missing.stderr


def test_hundreds_of_events_and_not_one_twice(workspace: Any) -> None:
    command = "i=0; while [ $i -lt 260 ]; do echo line$i; i=$((i+1)); sleep 0.005; done"
    found = workspace.execute_command(command, timeout=60)
    assert found.exit_code == 0 and found.stdout == "".join(f"line{n}\n" for n in range(260))
    found = workspace.execute_command("seq 1 300000", timeout=60)
    assert found.stdout.count("\n") == 300000 and found.stdout.endswith("\n300000\n")


def test_a_time_out_of_the_server_is_told_as_one(workspace: Any) -> None:
    begun = time.monotonic()
    found = workspace.execute_command("echo begun; sleep 600", timeout=2)
    assert time.monotonic() - begun < 10
    assert found.timeout_occurred and found.exit_code == -1 and found.stdout == "begun\n"
    assert workspace.execute_command("pgrep -c '^sleep$'").stdout == "0\n"


def test_pause_and_resume_keep_the_key(workspace: Any) -> None:
    key = workspace.api_key
    workspace.pause()
    assert workspace.execute_command("true", timeout=5).exit_code == -1
    workspace.resume()
    assert workspace.api_key == key and workspace.execute_command("echo awake").stdout == "awake\n"


def test_the_same_session_attaches(make: Make) -> None:
    first = make(keep_alive=True)
    first.execute_command("touch /tmp/mine")
    second = make(session_id=first.session_id)
    assert second._runtime_id == first._runtime_id
    assert second.execute_command("ls /tmp/mine").exit_code == 0


def test_files_go_in_and_come_out(workspace: Any, tmp_path: Path) -> None:
    source, target = tmp_path / "a.bin", tmp_path / "b.bin"
    source.write_bytes(bytes(range(256)) * 1000)
    assert workspace.file_upload(source, "/tmp/up/a.bin").success
    assert workspace.file_download("/tmp/up/a.bin", target).success
    assert target.read_bytes() == source.read_bytes()
    assert not workspace.file_download("/none", target).success
    assert not workspace.file_upload(source, "/tmp").success


def test_git(workspace: Any) -> None:
    make = (
        "mkdir -p /repo && cd /repo && git init -q && git config user.email a@b && git config user.name a && "
        "echo 1 > a && git add . && git commit -qm x && echo 2 > a && echo n > b"
    )
    assert workspace.execute_command(make).exit_code == 0
    found = {str(change.path): change.status.value for change in workspace.git_changes("/repo")}
    assert found == {"a": "UPDATED", "b": "ADDED"}
    diff = workspace.git_diff("/repo/a")
    assert (diff.original, diff.modified) == ("1\n", "2\n")
    assert workspace.git_changes("/usr") == []


def test_an_image_that_is_missing_is_told(make: Make) -> None:
    with pytest.raises(ValueError, match=r"failed"):
        make(server_image="localhost/none:1")


def test_a_sandbox_that_ended_is_no_success(make: Make, server: Server) -> None:
    workspace = make()
    server.expire(server.sandbox_of(workspace._runtime_id))
    found = workspace.execute_command("true", timeout=5)
    assert found.exit_code == -1 and "Remote execution error" in found.stderr
    workspace._runtime_id = None


def test_a_full_proxy_sees_the_servers_key_only_on_the_control_api(
    make: Make, proxy: Proxy, server: Server
) -> None:
    workspace = make(proxy.url)
    assert workspace.host == proxy.url
    assert workspace.execute_command("env").stdout.count(server.key) == 0
    assert proxy.paths().count("/start") == 1
    # the health check is urllib's, without any header
    assert "/health" in proxy.paths()


def test_curl_like_access_without_a_key_is_refused(server: Server) -> None:
    done = subprocess.run(
        ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", f"{server.url}/api/bash/bash_events/search"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout in ("401", "")
