"""Where commands run: the unconfined environment, and how a server is found."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
from pathlib import Path

import pytest

from orchestrator.contract import Env, ReadyFlag, RunDirectory
from orchestrator.schema import Config
from trainer.environments import open_environment
from trainer.environments.address import find_server
from trainer.environments.local import LocalEnvironment, LocalWorkspace
from trainer.errors import Lost, Refused
from trainer.tasks import Setup, Task, Verify

TASK = Task("t", "$ ", Verify("sh check.sh", {"check.sh": 'test "$(cat answer.txt)" = 7'}), Setup({"a": "1"}))


async def test_the_hidden_test_is_not_there_before_the_last_turn() -> None:
    async with LocalEnvironment().open(TASK) as workspace:
        assert (await workspace.run("ls", 5, 100)).output == b"a\n"
        await workspace.run("echo 7 > answer.txt", 5, 100)
        assert (await workspace.verify()).reward == 1


@pytest.mark.parametrize(
    "sabotage", ["true", "mkdir check.sh", "mkfifo answer.txt", "ln -s /etc/passwd check.sh", "chmod 000 ."]
)
async def test_sabotage_earns_nothing_and_raises_nothing(sabotage: str) -> None:
    task = Task("t", "$ ", Verify(TASK.verify.command, TASK.verify.files, timeout_s=0.5))
    async with LocalEnvironment().open(task) as workspace:
        await workspace.run(sabotage, 5, 100)
        assert (await workspace.verify()).reward == 0


async def test_a_command_is_bounded_in_time_output_and_user() -> None:
    async with LocalEnvironment().open(TASK) as workspace:
        flood = await workspace.run("yes", 1, 1000)
        assert flood.output.startswith(b"y\n" * 500) and len(flood.output) < 1100
        late = await workspace.run("echo early; sleep 60 & sleep 60", 0.3, 1000)
        assert (late.output, late.exit_code, late.timed_out) == (b"early\n", 124, True)
        both = await workspace.run("echo out; echo err >&2; exit 3", 5, 1000)
        assert (both.output, both.exit_code) == (b"out\nerr\n", 3)
        assert (await workspace.run("kill -9 $$", 5, 100)).exit_code == 137
        if os.geteuid() == 0:
            assert (await workspace.run("id -un", 5, 100)).output == b"nobody\n"


async def test_background_processes_die_with_their_command() -> None:
    async with LocalEnvironment().open(TASK) as workspace:
        pid = int((await workspace.run("sleep 60 & echo $!", 5, 100)).output)
        with contextlib.suppress(ProcessLookupError):  # it is gone already
            ended = select.poll()
            ended.register(os.pidfd_open(pid))
            assert ended.poll(5000)


async def test_the_directory_goes_whatever_happens() -> None:
    async def forever() -> None:
        async with LocalEnvironment().open(TASK) as workspace:
            assert isinstance(workspace, LocalWorkspace)
            opened.set_result(workspace.folder)
            await workspace.run("sleep 60", 60, 100)

    opened: asyncio.Future[Path] = asyncio.get_running_loop().create_future()
    running = asyncio.create_task(forever())
    folder = await opened
    assert folder.is_dir()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert not folder.exists()


async def test_a_setup_that_fails_loses_the_workspace() -> None:
    task = Task("t", "$ ", TASK.verify, Setup(commands=["exit 3"]))
    with pytest.raises(Lost, match="'exit 3' gave 3"):
        async with LocalEnvironment().open(task):
            raise AssertionError


def test_environments_are_named() -> None:
    assert isinstance(open_environment("unconfined", Config()), LocalEnvironment)
    with pytest.raises(Refused, match="sandbox, unconfined"):
        open_environment("local", Config())


# --- finding the server ---


def flag(url: str) -> ReadyFlag:
    return ReadyFlag(run_id="r", attempt=1, job_id="1", nonce="n", host="h", pid=1, url=url)


def publish(run: RunDirectory, url: str, key: str, flagged: str) -> None:
    run.publish(run.runtime_url, url)
    run.publish(run.runtime_api_key, key, 0o600)
    run.publish(run.ready_flag, flag(flagged))


def test_a_server_is_found_in_the_run_directory(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path)
    with pytest.raises(Lost, match="no runtime server is ready"):
        find_server(run, {})
    publish(run, "http://a:1", "k1", "http://a:1")
    address = find_server(run, {})
    assert (address.url, address.key) == ("http://a:1", "k1")
    assert "k1" not in repr(address)


def test_a_server_that_is_just_coming_back_is_not_used_with_the_old_key(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path)
    publish(run, "http://b:2", "k1", "http://a:1")
    with pytest.raises(Lost):
        find_server(run, {})


def test_a_given_server_comes_first(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("secret\n")
    given = {Env.RUNTIME_URL: "http://c:3", Env.RUNTIME_API_KEY_FILE: str(key)}
    address = find_server(RunDirectory.create(tmp_path), given)
    assert (address.url, address.key) == ("http://c:3", "secret")
    with pytest.raises(Refused, match="no key"):
        find_server(None, {Env.RUNTIME_URL: "http://c:3"})
    with pytest.raises(Refused, match="no runtime server is known"):
        find_server(None, {})
