"""OpenHands V0's `RemoteRuntime`, and the SkyRL fork's, unmodified."""

from __future__ import annotations

import asyncio
import atexit
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import IMAGE, OPENHANDS, Proxy, Server

os.environ |= {"LOG_LEVEL": "ERROR", "LOG_TO_FILE": "false"}
sys.path.insert(0, OPENHANDS)

import stubs

stubs.install()

import httpx  # noqa: E402
import tenacity  # noqa: E402
from openhands.core import config as configs  # type: ignore[import-not-found]  # noqa: E402
from openhands.core import exceptions  # type: ignore[import-not-found]  # noqa: E402
from openhands.events import action as actions  # type: ignore[import-not-found]  # noqa: E402
from openhands.events import observation as observations  # type: ignore[import-not-found]  # noqa: E402
from openhands.runtime.impl.remote.remote_runtime import RemoteRuntime  # type: ignore[import-not-found]  # noqa: E402
from openhands.runtime.plugins import AgentSkillsRequirement, JupyterRequirement  # type: ignore[import-not-found]  # noqa: E402

Config = getattr(configs, "OpenHandsConfig", None) or configs.AppConfig
NEW = hasattr(configs, "OpenHandsConfig") and hasattr(configs, "MCPConfig")
SKYRL = "88888888" in (Path(OPENHANDS) / "openhands/runtime/impl/remote/remote_runtime.py").read_text()
Run = actions.CmdRunAction


class Events:
    """The event stream, of which a runtime only asks to be told."""

    def subscribe(self, *_: Any) -> None: ...

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


Make = Callable[..., Any]


@pytest.fixture
def make(server: Server) -> Iterator[Make]:
    made: list[Any] = []

    def runtime(
        url: str = server.url, sid: str = "", plugins: bool = False, connect: bool = True, **sandbox: Any
    ) -> Any:
        config = Config()
        sandbox = {"runtime_container_image": IMAGE, "remote_runtime_init_timeout": 30, **sandbox}
        for name, value in {"api_key": server.key, "remote_runtime_api_url": url, **sandbox}.items():
            setattr(config.sandbox, name, value)
        names = {"sid": sid or f"sid-{uuid.uuid4()}"}
        if plugins:
            names["plugins"] = [AgentSkillsRequirement(), JupyterRequirement()]  # type: ignore[assignment]
        first = (config, None, None) if NEW else (config, Events())
        one = RemoteRuntime(*first, **names)
        made.append(one)
        if connect:
            asyncio.run(one.connect())
        return one

    yield runtime
    for one in made:
        one.close()
        atexit.unregister(one.close)


@pytest.fixture
def runtime(make: Make) -> Any:
    return make()


def run(runtime: Any, command: str, timeout: float = 30, **more: Any) -> Any:
    return runtime.run_action(_timed(Run(command=command, **more), timeout))


def test_connect_and_run(runtime: Any) -> None:
    found = run(runtime, "cd /tmp && echo hello && false")
    assert isinstance(found, observations.CmdOutputObservation)
    assert (found.content, found.exit_code) == ("hello", 1)
    assert found.metadata.working_dir == "/tmp"
    assert run(runtime, "pwd").content == "/tmp"


def test_connect_with_jupyter_takes_three_requests_at_most(make: Make, proxy: Proxy) -> None:
    runtime = make(proxy.url, plugins=True, runtime_startup_env_vars={"MINE": "a b"})
    setup = [path for path in proxy.paths() if path.endswith("/execute_action")]
    assert len(setup) <= 6  # ours, each variable's, git's
    assert run(runtime, "echo $MINE").content == "a b"
    cell = actions.IPythonRunCellAction(code="import os; print(os.environ['MINE']); 6 * 7")
    found = runtime.run_action(cell)
    assert isinstance(found, observations.IPythonRunCellObservation)
    assert "a b" in found.content and "42" in found.content and "Jupyter Python interpreter" in found.content


def test_connect_without_a_plugin(make: Make, proxy: Proxy) -> None:
    make(proxy.url)
    assert sum(path.endswith("/execute_action") for path in proxy.paths()) <= 3
    assert proxy.paths()[0].startswith("/sessions/")
    assert next(body for method, path, body in proxy.seen if path == "/start").count(b"88888888") == SKYRL


@pytest.mark.skipif(not SKYRL, reason="only the fork waits for `running`")
def test_the_fork_does_not_know_ready(make: Make, proxy: Proxy) -> None:
    proxy.say = {b'"pod_status":"running"': b'"pod_status":"ready"'}
    begun = time.monotonic()
    with pytest.raises(Exception, match=r".*"):
        make(proxy.url, remote_runtime_init_timeout=3)
    assert time.monotonic() - begun >= 2


@pytest.mark.skipif(SKYRL, reason="upstream waits for `ready`")
def test_upstream_does_not_take_running_for_ready(make: Make, proxy: Proxy) -> None:
    proxy.say = {b'"pod_status":"ready"': b'"pod_status":"running"'}
    with pytest.raises(Exception, match=r".*"):
        make(proxy.url, remote_runtime_init_timeout=3)


def test_the_same_session_attaches(make: Make) -> None:
    sid = f"sid-{uuid.uuid4()}"
    first = make(sid=sid)
    run(first, "touch /tmp/mine")
    second = make(sid=sid)
    assert second.runtime_id == first.runtime_id
    assert run(second, "ls /tmp/mine").exit_code == 0


def test_a_start_that_fails_is_stopped_with_null_and_its_error_is_told(make: Make, proxy: Proxy) -> None:
    proxy.answers = {"/start": 500}
    with pytest.raises(exceptions.AgentRuntimeUnavailableError if NEW or SKYRL else Exception):
        make(proxy.url)
    stops = [body for _, path, body in proxy.seen if path == "/stop"]
    assert all(b"null" in body for body in stops)
    proxy.answers = {}
    make(proxy.url)


def test_a_start_slower_than_the_client_is_found_again_by_its_session(make: Make, proxy: Proxy) -> None:
    sid, proxy.slow = f"sid-{uuid.uuid4()}", {"/start": 4.0}
    with pytest.raises((exceptions.AgentRuntimeError, httpx.HTTPError, OSError)):
        make(proxy.url, sid=sid, remote_runtime_api_timeout=2)
    stops = [body for _, path, body in proxy.seen if path == "/stop"]
    assert all(b"null" in body for body in stops)
    proxy.slow = {}
    again = make(proxy.url, sid=sid)
    assert run(again, "echo there").content == "there"
    assert proxy.paths().count("/start") == 1


def test_an_image_that_is_missing(make: Make) -> None:
    with pytest.raises(Exception, match=r"(?i)unavailable|failed|runtime"):
        make(runtime_container_image="localhost/none:1")


def test_a_hidden_error_and_several_commands(runtime: Any) -> None:
    found = run(runtime, "echo a\necho b")
    assert (
        isinstance(found, observations.ErrorObservation)
        and "Cannot execute multiple commands" in found.content
    )
    found = run(runtime, "echo a\necho b", hidden=True)
    assert isinstance(found, observations.CmdOutputObservation) and found.exit_code != 0


def test_a_lost_reply_and_the_command_is_run_once(make: Make, proxy: Proxy) -> None:
    runtime = make(proxy.url)
    proxy.lose = ["/execute_action"]
    action = Run(command="echo x >> /tmp/count; cat /tmp/count")
    _timed(action)
    action._id, action._timestamp = 7, "2025-11-21T10:00:00"
    assert runtime.run_action(action).content == "x"
    assert sum(b"/tmp/count" in body for _, _, body in proxy.seen) == 2
    assert run(runtime, "wc -l < /tmp/count").content == "1"


@pytest.mark.parametrize("status", [404, 502])
def test_what_means_gone_is_a_disconnect(make: Make, proxy: Proxy, status: int) -> None:
    runtime = make(proxy.url)
    proxy.answers = {"/execute_action": status}
    with pytest.raises(exceptions.AgentRuntimeDisconnectedError):
        run(runtime, "true")
    proxy.answers = {}


def test_too_many_requests_would_end_in_a_retry_error(make: Make, proxy: Proxy) -> None:
    """Why the server never answers 429."""
    runtime = make(proxy.url)
    proxy.answers = {"/execute_action": 429}
    with pytest.raises((tenacity.RetryError, exceptions.AgentRuntimeError, Exception)):
        run(runtime, "true")
    proxy.answers = {}


def test_a_sandbox_that_died_is_a_disconnect(make: Make, server: Server) -> None:
    runtime = make()
    server.expire(server.sandbox_of(runtime.runtime_id))
    with pytest.raises(exceptions.AgentRuntimeDisconnectedError):
        run(runtime, "true")


def test_pause_and_resume_keep_the_key(make: Make, server: Server) -> None:
    sid = f"sid-{uuid.uuid4()}"
    first = make(sid=sid, keep_runtime_alive=True)
    if not hasattr(first.config.sandbox, "pause_closed_runtimes"):
        first.config.sandbox.keep_runtime_alive = False
        pytest.skip("this version does not pause")
    run(first, "touch /tmp/mine")
    first.config.sandbox.pause_closed_runtimes = True
    key = first.session.headers["X-Session-API-Key"]
    first.close()
    second = make(sid=sid)
    assert second.runtime_id == first.runtime_id and run(second, "ls /tmp/mine").exit_code == 0
    assert second.session.headers["X-Session-API-Key"] == key


def test_a_paused_runtime_is_resumed_in_the_middle(make: Make, proxy: Proxy, server: Server) -> None:
    runtime = make(proxy.url, keep_runtime_alive=True)
    runtime.config.sandbox.keep_runtime_alive = True
    runtime._send_runtime_api_request("POST", f"{server.url}/pause", json={"runtime_id": runtime.runtime_id})
    # not by an action: the client holds a semaphore then, and setting up after the resume waits for it
    assert isinstance(runtime.list_files("/"), list)
    assert "/resume" in proxy.paths()
    assert run(runtime, "echo awake").content == "awake"
    runtime.config.sandbox.keep_runtime_alive = False


def test_silent_commands_poll_and_interrupt(make: Make) -> None:
    runtime = make(runtime_startup_env_vars={"NO_CHANGE_TIMEOUT_SECONDS": "1"})
    found = run(runtime, "echo begun; sleep 60")
    assert (
        found.content == "begun"
        and found.exit_code == -1
        and "no new output after 1 seconds" in found.metadata.suffix
    )
    assert "is NOT executed" in run(runtime, "ls").metadata.suffix
    ended = run(runtime, "C-c", is_input=True)
    assert ended.exit_code == 130 and "CTRL+C was sent" in ended.metadata.suffix


@pytest.mark.skipif(not NEW, reason="the texts of 0.62")
def test_the_texts_are_those_of_the_package(make: Make) -> None:
    source = (Path(OPENHANDS) / "openhands/runtime/utils/bash.py").read_text()
    constants = (Path(OPENHANDS) / "openhands/runtime/utils/bash_constants.py").read_text()
    joined = "".join(part.strip().strip("\"'") for part in constants.split("(", 1)[1].split("\n"))
    runtime = make(runtime_startup_env_vars={"NO_CHANGE_TIMEOUT_SECONDS": "1"})
    suffix = run(runtime, "sleep 60").metadata.suffix
    assert suffix.removeprefix("\n[The command has no new output after 1 seconds. ").rstrip(
        "]"
    ) in joined.replace("')", "")
    assert "The command has no new output after {self.NO_CHANGE_TIMEOUT_SECONDS} seconds. " in source
    for text in (run(runtime, "").metadata.prefix, "[The command completed with exit code "):
        assert text.strip() in source.replace("\\n", "\n")
    run(runtime, "C-c", is_input=True)
    for command, more in (("", {}), ("x", {"is_input": True})):
        assert run(runtime, command, **more).content in source


def test_files_are_read_written_edited_and_copied(runtime: Any, tmp_path: Path) -> None:
    path = "/workspace/a.py"
    assert isinstance(
        runtime.write(_timed(actions.FileWriteAction(path=path, content="a = 1"))),
        observations.FileWriteObservation,
    )
    found = runtime.read(_timed(actions.FileReadAction(path=path)))
    assert found.content == "a = 1\n" and found.path == path
    edit = actions.FileEditAction(path=path, command="str_replace", old_str="a = 1", new_str="a = 2")
    found = runtime.edit(_timed(edit))
    assert isinstance(found, observations.FileEditObservation) and "has been edited" in found.content
    assert isinstance(
        runtime.read(_timed(actions.FileReadAction(path="/none"))), observations.ErrorObservation
    )
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "b.txt").write_text("b")
    runtime.copy_to(str(tmp_path / "d"), "/workspace", recursive=True)
    runtime.copy_to(str(tmp_path / "d" / "b.txt"), "/workspace/single")
    assert run(runtime, "cat /workspace/d/b.txt /workspace/single/b.txt").content == "bb"
    assert {"d/", "single/", "a.py"} <= set(runtime.list_files("/workspace"))
    packed = runtime.copy_from("/workspace")
    import zipfile

    assert "a.py" in zipfile.ZipFile(packed).namelist()


def _timed(action: Any, timeout: float = 30) -> Any:
    action.set_hard_timeout(timeout, blocking=False)
    return action


def test_a_base_image_is_enough(make: Make, proxy: Proxy) -> None:
    folder = Path(OPENHANDS) / "microagents"  # the wheel lacks it, and the client copies it
    folder.mkdir(exist_ok=True)
    for name in ("pyproject.toml", "poetry.lock"):
        (Path(OPENHANDS) / name).touch()
    begun = time.monotonic()
    runtime = make(
        proxy.url,
        runtime_container_image=None,
        base_container_image=IMAGE,
        runtime_extra_deps="echo 1 > /extra",
    )
    assert time.monotonic() - begun < 30
    assert proxy.paths().count("/build") <= 1  # another run may have built it
    assert run(runtime, "cat /extra").content == "1"
