"""The engines without a daemon: `process`, and `apptainer` on a stand-in that checks its command line."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ordinary import Ordinary
from serverkit import Server, refused, state_of, traces

from orchestrator.schema import Runtime
from runtime_server.agent.build import agent_binary
from runtime_server.engines import processes
from runtime_server.engines.apptainer import ApptainerEngine
from runtime_server.engines.choice import engine_of
from runtime_server.engines.podman import PodmanEngine
from runtime_server.errors import NotFound, SandboxError
from runtime_server.image_store import default_store
from runtime_server.images import ensure
from runtime_server.wire import Code, CreateSandbox, Limits, Network

root = pytest.mark.skipif(os.getuid() != 0, reason="needs root")


def test_nothing_less_is_taken_unasked(tmp_path: Path) -> None:
    assert Runtime().engine == "podman"
    assert isinstance(engine_of(Runtime(), tmp_path, tmp_path), PodmanEngine)


@pytest.fixture(scope="module")
def process() -> Iterator[Server]:
    server = Server.start("--engine", "process")
    folders = state_of(server.process.pid)
    yield server
    assert server.stop() == 0
    assert traces(folders) == []


async def test_process_says_what_it_is(process: Server) -> None:
    async with process.client() as client:
        told = await client.capabilities()
        assert told.engine == "process" and not told.enforced["network_isolation"]
        assert "UNCONFINED" in told.notes[0] and "fork" not in told.features


async def test_process_runs_commands_in_directories_of_their_own(process: Server) -> None:
    async with process.client() as client, client.sandbox() as one, client.sandbox() as two:
        await one.write_file("a", b"1")
        said = [(await box.exec("pwd; ls; echo $$; env | grep -c API_KEY")).stdout.text for box in (one, two)]
        assert said[0].split()[:2] == [said[1].split()[0], "a"] and said[1].split()[1] != "a"
        assert await one.read_file("a") == b"1"
        late = await one.exec("setsid sleep 300 & sleep 300", timeout_s=0.5)
        assert late.timed_out and (await one.exec("pgrep -fc '[s]leep 300'")).stdout.text == "0\n"


async def test_process_has_no_images_and_no_network_to_open(process: Server) -> None:
    async with process.client() as client:
        with pytest.raises(NotFound):
            await client.create(CreateSandbox(image="debian:12"))
        with pytest.raises(SandboxError, match="no network namespace"):
            await client.create(CreateSandbox(network=Network(mode="allowlist", allow=["pypi.org"])))


async def test_process_watches_memory(process: Server) -> None:
    async with process.client() as client, client.sandbox(CreateSandbox(limits=Limits(memory_mb=128))) as box:
        done = await box.exec([sys.executable, "-c", "x = bytearray(1 << 29); import time; time.sleep(30)"])
        assert done.oom


async def test_process_leaves_nothing_when_it_is_killed() -> None:
    server = Server.start("--engine", "process")
    folders = state_of(server.process.pid)
    async with server.client() as client:
        await client.create()
    server.stop(signal.SIGKILL)
    deadline = asyncio.get_running_loop().time() + 20
    token = folders[0].name.encode()
    while [pid for pid in processes.all_pids() if token in processes.command_line(pid)]:
        assert asyncio.get_running_loop().time() < deadline, "the agents outlive the server"
        await asyncio.sleep(0.05)
    assert refused("--sweep").returncode == 0
    assert not any(folder.exists() for folder in folders)


@root
async def test_process_of_an_ordinary_user(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("process")
    for above in [folder, *folder.parents][:3]:
        above.chmod(0o755)
    agent_binary()
    user = Ordinary.create(folder / "user", number=1, ids=False)
    try:
        server = Server.start("--engine", "process", user=user)
        async with server.client() as client, client.sandbox() as box:
            assert (await box.exec("id -u; echo x > a && cat a")).stdout.text == "0\nx\n"
            assert (await client.capabilities()).enforced["user_namespace"]
        assert server.stop() == 0 and user.processes() == {}
    finally:
        user.remove()


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PATH, in which `apptainer` is the stand-in."""
    folder = tmp_path_factory.mktemp("apptainer")
    script = Path(__file__).with_name("standin_apptainer.py")
    (folder / "apptainer").write_text(f'#!/bin/sh\nexec {sys.executable} {script} "$@"\n')
    (folder / "apptainer").chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def apptainer(program: Path) -> Iterator[tuple[Server, str]]:
    """A server, and the directory that is the image."""
    ensure(default_store())
    image = next(
        path for path in default_store().glob("overlay/*/diff") if (path / "usr/bin/python3").exists()
    )
    env = {"PATH": f"{program}:{os.environ['PATH']}", "SECRET_OF_THE_SERVER": "s3cret"}
    server = Server.start("--engine", "apptainer", "--image", str(image), env=env)
    folders = state_of(server.process.pid)
    yield server, str(image)
    assert server.stop() == 0
    assert traces(folders) == []


@root
@pytest.mark.container
async def test_apptainer_runs_the_agent_as_pid_1(apptainer: tuple[Server, str]) -> None:
    server, image = apptainer
    async with server.client() as client, client.sandbox(CreateSandbox(env={"A": "hidden"})) as box:
        done = await box.exec(
            "cat /proc/1/comm; echo $A; env; tail -n +3 /proc/net/dev | grep -vc lo:; touch /here"
        )
        assert done.stdout.text.startswith("agent\nhidden\n") and done.stdout.text.endswith("\n0\n")
        assert "s3cret" not in done.stdout.text and not Path(image, "here").exists()
        lines = b"".join(processes.command_line(pid) for pid in processes.all_pids())
        assert b"A=hidden" not in lines
        told = await client.capabilities()
        assert told.engine == told.oci_runtime == "apptainer" and told.enforced["network_isolation"]


@root
@pytest.mark.container
async def test_apptainer_ends_a_sandbox_that_fills_its_disk(apptainer: tuple[Server, str]) -> None:
    async with (
        apptainer[0].client() as client,
        client.sandbox(CreateSandbox(limits=Limits(disk_mb=32))) as box,
    ):
        with pytest.raises(SandboxError) as ended:
            await box.exec("dd if=/dev/zero of=/x bs=1M count=200; sleep 30", timeout_s=60)
        assert ended.value.code == Code.DISK_FULL


def _engine(config: Runtime, store: Path, program: Path) -> ApptainerEngine:
    engine = ApptainerEngine(config, agent_binary(), store / "images")
    engine.program, engine.runtime = str(program / "apptainer"), "apptainer"
    return engine


async def test_apptainer_pulls_once(program: Path, tmp_path: Path) -> None:
    engine = _engine(Runtime(), tmp_path, program)
    one, two = await asyncio.gather(engine.image("debian:12"), engine.image("debian:12"))
    assert one == two and Path(one.id).read_text() == "docker://debian:12"
    assert await engine.images() == [one.id]
    with pytest.raises(NotFound, match="manifest unknown"):
        await engine.image("missing:1")
    with pytest.raises(NotFound, match="no image at"):
        await engine.image("/nowhere.sif")


async def test_apptainer_that_is_not_there(tmp_path: Path) -> None:
    done = refused("--engine", "apptainer", "--image", "/x.sif", env={"PATH": str(tmp_path)})
    assert done.returncode == 69 and "neither apptainer nor singularity" in done.stderr


async def test_apptainer_without_a_network_of_its_own_is_refused(tmp_path: Path) -> None:
    """A site that refuses `--net` to users, on a node that lets them make no namespace either."""
    script = tmp_path / "apptainer"
    script.write_text("#!/bin/sh\necho 'FATAL: --net is for root here' >&2\nexit 255\n")
    script.chmod(0o755)
    unshare = tmp_path / "unshare"
    unshare.write_text("#!/bin/sh\necho 'unshare failed: Operation not permitted' >&2\nexit 1\n")
    unshare.chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = await asyncio.to_thread(refused, "--engine", "apptainer", "--image", str(tmp_path), env=env)
    assert done.returncode == 69 and "--net is for root" in done.stderr and "not permitted" in done.stderr
