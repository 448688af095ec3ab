"""The server as a process: how it starts, how it refuses to, and what it leaves behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import stat
import subprocess
from pathlib import Path

import pytest
import yaml
from serverkit import Server, refused, spawn, state_of, traces, until

from orchestrator.contract import Exit, ReadyFlag, RunDirectory
from orchestrator.schema import Config
from runtime_server.client import Client
from runtime_server.engines.processes import command_line, naming
from runtime_server.errors import SandboxError
from runtime_server.wire import Code, CreateSandbox, Exec

pytestmark = pytest.mark.container


async def test_sigterm_leaves_nothing() -> None:
    server = Server.start()
    folders = state_of(server.process.pid)
    assert folders and all(stat.S_IMODE(p.stat().st_mode) == 0o700 for p in folders)
    async with server.client() as client:
        made = [await client.create() for _ in range(3)]
        background = asyncio.create_task(client.exec(made[0].id, Exec(command="sleep 300")))
        await client.exec(made[1].id, Exec(command="setsid sleep 300 & disown; touch /root/x; echo"))
        server.process.send_signal(signal.SIGTERM)
        while (await client.health()).status != "draining":
            assert not background.done()
        server.process.send_signal(signal.SIGTERM)  # the second cuts the running command short
        with pytest.raises(SandboxError) as failed:
            await background
    assert failed.value.code in (Code.SERVER_DRAINING, Code.UNREACHABLE)
    assert server.stop() == 0
    assert traces(folders) == [] and not server.key_file.exists()


async def test_after_sigkill_the_next_server_cleans_up() -> None:
    first = Server.start()
    folders = state_of(first.process.pid)
    async with first.client() as client:
        await client.create()
    assert first.stop(signal.SIGKILL) == -signal.SIGKILL
    assert traces(folders)
    second = Server.start()
    try:
        assert traces(folders) == []
        assert state_of(second.process.pid)
    finally:
        assert second.stop() == 0
    assert not first.key_file.exists()


async def test_runc_serves_where_there_is_no_crun(tmp_path: Path) -> None:
    for name in ("podman", "runc", "conmon", "unshare", "setpriv", "sh", "umount"):
        if found := shutil.which(name):
            (tmp_path / name).symlink_to(found)
    server = Server.start(env={"PATH": str(tmp_path)})
    async with server.client() as client:
        assert (await client.capabilities()).oci_runtime == "runc"
        async with client.sandbox() as sandbox:
            result = await sandbox.exec("grep Seccomp: /proc/self/status")
            assert result.stdout.text == "Seccomp:\t2\n"
    assert server.stop() == 0


async def test_two_servers_do_not_disturb_each_other() -> None:
    one, two = Server.start(), Server.start()
    async with one.client() as first, two.client() as second:
        a, b = await first.create(), await second.create()
        assert one.stop() == 0
        assert (await second.exec(b.id, Exec(command="echo fine"))).stdout.text == "fine\n"
        assert a.id not in {box.id for box in (await second.list()).sandboxes}
        with pytest.raises(SandboxError):
            async with Client(two.url, one.key) as stranger:
                await stranger.list()
    assert two.stop() == 0


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = refused("--port", str(taken.getsockname()[1]))
    assert done.returncode == Exit.USAGE and "cannot listen" in done.stderr and "--port" in done.stderr


def test_a_port_that_cannot_be() -> None:
    done = refused("--port", "70000")
    assert done.returncode == Exit.USAGE and done.stderr.startswith("error: wrong option: port")


def test_an_image_that_is_missing() -> None:
    done = refused("--image", "localhost/no/such:1")
    assert done.returncode == Exit.NO_INPUT and "localhost/no/such:1" in done.stderr
    assert "ensure" in done.stderr


def test_no_podman(tmp_path: Path) -> None:
    done = refused(env={"PATH": str(tmp_path)})
    assert done.returncode == Exit.PEER_GONE and "podman is not installed" in done.stderr


def test_a_state_directory_with_a_long_path(tmp_path: Path) -> None:
    run = _run_directory(tmp_path, state_dir=str(tmp_path / ("long" * 12)))
    done = refused("--run-dir", str(run.root))
    assert done.returncode == Exit.PEER_GONE and "runtime.state_dir" in done.stderr


def test_no_run_and_a_wrong_configuration(tmp_path: Path) -> None:
    assert refused("--run-dir", str(tmp_path / "none")).returncode == Exit.NO_INPUT
    run = _run_directory(tmp_path)
    run.config.write_text("runtime: {prot: 1}")
    done = refused("--run-dir", str(run.root))
    assert done.returncode == Exit.USAGE and "prot" in done.stderr


def _run_directory(base: Path, **runtime: object) -> RunDirectory:
    run = RunDirectory.create(base / "runs", "t")
    config = Config.model_validate({"runtime": {"host": "127.0.0.1", **runtime}})
    run.config.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return run


async def test_a_run_learns_where_its_server_is(tmp_path: Path) -> None:
    run = _run_directory(tmp_path)
    process = spawn(
        "--run-dir", str(run.root), env={"ORCHESTRATE_NONCE": "n" * 32, "ORCHESTRATE_ATTEMPT": "4"}
    )
    await until(lambda: run.read(run.ready_flag, ReadyFlag) is not None or process.poll() is not None, 60)
    flag = run.read(run.ready_flag, ReadyFlag)
    assert flag is not None
    assert (flag.run_id, flag.attempt, flag.nonce, flag.pid) == (run.run_id, 4, "n" * 32, process.pid)
    assert run.read_text(run.runtime_url) == flag.url
    assert stat.S_IMODE(run.runtime_api_key.stat().st_mode) == 0o600
    async with Client(flag.url, run.read_text(run.runtime_api_key)) as client:
        health = await client.health()
        assert (health.run_id, health.attempt, health.nonce) == (run.run_id, 4, "n" * 32)
    process.terminate()
    assert process.wait(30) == 0
    assert process.stdout is not None
    process.stdout.close()
    assert [e.what for e in run.timeline()] == ["runtime.server_ready", "runtime.server_stopped"]


def test_the_curl_line_works_and_shows_no_key() -> None:
    server = Server.start()
    assert server.key not in server.curl
    done = subprocess.run(server.curl, shell=True, capture_output=True, text=True, timeout=30, check=True)  # noqa: S602 - that is what people do
    assert '"state":"running"' in done.stdout
    assert server.key not in Path(f"/proc/{server.process.pid}/cmdline").read_text()
    assert server.stop() == 0


async def test_the_podman_service_may_die(tmp_path: Path) -> None:
    server = Server.start()
    folders = state_of(server.process.pid)
    async with server.client() as client:
        before = await client.create()
        services = [pid for folder in folders for pid in _services(folder.name)]
        assert services
        for pid in services:
            with contextlib.suppress(ProcessLookupError):  # state and storage have one name
                os.kill(pid, signal.SIGKILL)
        after = await client.create(CreateSandbox())
        assert (await client.exec(before.id, Exec(command="echo a"))).stdout.text == "a\n"
        assert (await client.exec(after.id, Exec(command="echo b"))).stdout.text == "b\n"
    assert server.stop() == 0
    assert traces(folders) == []


def _services(token: str) -> list[int]:
    return [pid for pid in naming(token) if b"system\0service" in command_line(pid)]
