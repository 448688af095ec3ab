"""The real client of SWE-ReX 1.4 against this server, and the same cases against SWE-ReX's own server.

The second half proves that the first asks for what the real server does.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pexpect
import pytest
from serverkit import Server
from swerex.exceptions import (
    BashIncorrectSyntaxError,
    CommandTimeoutError,
    NonZeroExitCodeError,
    SessionDoesNotExistError,
    SessionExistsError,
    SwerexException,
)
from swerex.runtime.abstract import (
    BashAction,
    BashInterruptAction,
    CloseBashSessionRequest,
    Command,
    CreateBashSessionRequest,
    ReadFileRequest,
    UploadRequest,
    WriteFileRequest,
)
from swerex.runtime.remote import RemoteRuntime

from runtime_server.client import Client
from runtime_server.wire import CreateSandbox

pytestmark = pytest.mark.container


def free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as bound:
        return int(bound.getsockname()[1])


@pytest.fixture(scope="module")
def original() -> Iterator[tuple[str, str]]:
    """SWE-ReX's own server, on this machine: its commands touch nothing but their own directories."""
    port, token = free_port(), secrets.token_hex(16)
    program = Path(sys.executable).with_name("swerex-remote")
    server = subprocess.Popen(
        [program, "--host", "127.0.0.1", "--port", str(port), "--auth-token", token],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    yield f"http://127.0.0.1:{port}", token
    server.terminate()
    server.wait(timeout=20)


@pytest.fixture
async def ours(client: Client) -> AsyncIterator[RemoteRuntime]:
    made = await client.create(CreateSandbox(session_key=True))
    yield RemoteRuntime(host=made.swerex_url, auth_token=made.session_key)
    await client.delete(made.id)


@pytest.fixture(params=["ours", "theirs"])
async def rex(request: pytest.FixtureRequest, server: Server) -> AsyncIterator[RemoteRuntime]:
    if request.param == "theirs":
        url, token = request.getfixturevalue("original")
        runtime = RemoteRuntime(host=url, auth_token=token)
        await runtime.wait_until_alive(timeout=30)
        yield runtime
        await runtime.close()
        return
    async with server.client() as client:
        made = await client.create(CreateSandbox(session_key=True))
        yield RemoteRuntime(host=made.swerex_url, auth_token=made.session_key)
        await client.delete(made.id)


@pytest.fixture
async def shell(rex: RemoteRuntime) -> AsyncIterator[tuple[RemoteRuntime, str]]:
    name = f"s-{secrets.token_hex(4)}"
    await rex.create_session(CreateBashSessionRequest(session=name))
    yield rex, name


Shell = tuple[RemoteRuntime, str]
SH: dict[str, Any] = {"shell": True}


async def run(shell: Shell, command: str, **more: Any) -> Any:
    runtime, name = shell
    return await runtime.run_in_session(BashAction(command=command, session=name, timeout=20, **more))


# --- execute -------------------------------------------------------------------------------------------


async def test_execute_runs_lists_and_shell_lines(rex: RemoteRuntime) -> None:
    done = await rex.execute(Command(command=["sh", "-c", "echo out; echo err >&2; exit 4"]))
    assert (done.stdout, done.stderr, done.exit_code) == ("out\n", "err\n", 4)
    done = await rex.execute(Command(command="echo $((1 + 2)); echo x >&2", **SH, merge_output_streams=True))
    assert (done.stdout, done.stderr) == ("3\nx\n", "")
    assert (await rex.execute(Command(command="true"))).exit_code == 0
    assert (await rex.execute(Command(command="kill -9 $$", **SH))).exit_code == -9


async def test_execute_takes_directory_and_a_whole_environment(rex: RemoteRuntime) -> None:
    done = await rex.execute(
        Command(command="pwd; env | grep -c . ; echo $A", **SH, cwd="/usr", env={"A": "b c"})
    )
    where, variables, value = done.stdout.splitlines()
    assert (where, value) == ("/usr", "b c") and int(variables) <= 4


async def test_execute_raises_what_subprocess_would(rex: RemoteRuntime) -> None:
    with pytest.raises(NonZeroExitCodeError, match="say why"):
        await rex.execute(Command(command=["false"], check=True, error_msg="say why"))
    with pytest.raises(CommandTimeoutError, match=r"0\.3"):
        await rex.execute(Command(command=["sleep", "30"], timeout=0.3))
    with pytest.raises(FileNotFoundError, match="Errno 2"):
        await rex.execute(Command(command="no-such-program"))
    with pytest.raises(FileNotFoundError, match="Errno 2"):
        await rex.execute(Command(command="true", cwd="/no/such"))


# --- files ---------------------------------------------------------------------------------------------


@pytest.fixture
async def folder(rex: RemoteRuntime) -> AsyncIterator[str]:
    name = f"/tmp/rex-{secrets.token_hex(6)}"
    await rex.execute(Command(command=["mkdir", name]))
    yield name
    await rex.execute(Command(command=["rm", "-r", name]))


async def test_files_are_read_and_written_as_text(rex: RemoteRuntime, folder: str) -> None:
    path = f"{folder}/deep/er/x.txt"
    await rex.write_file(WriteFileRequest(path=path, content="ä\nb\n"))
    assert (await rex.read_file(ReadFileRequest(path=path))).content == "ä\nb\n"
    await rex.execute(
        Command(
            command=f"printf 'a\\r\\nb' > {folder}/crlf; chmod 755 {path}; printf '\\344' > {folder}/l1",
            **SH,
        )
    )
    assert (await rex.read_file(ReadFileRequest(path=f"{folder}/crlf"))).content == "a\nb"
    assert (await rex.read_file(ReadFileRequest(path=f"{folder}/l1", encoding="latin-1"))).content == "ä"
    assert (await rex.read_file(ReadFileRequest(path=f"{folder}/l1", errors="replace"))).content == "\ufffd"
    await rex.write_file(WriteFileRequest(path=path, content="new"))
    done = await rex.execute(Command(command=["stat", "-c", "%a", path]))
    assert done.stdout == "755\n"  # a file keeps its mode


async def test_files_that_cannot_be_used(rex: RemoteRuntime, folder: str) -> None:
    with pytest.raises(FileNotFoundError):
        await rex.read_file(ReadFileRequest(path=f"{folder}/none"))
    for attempt in (
        rex.read_file(ReadFileRequest(path=folder)),
        rex.write_file(WriteFileRequest(path=folder, content="")),
    ):
        with pytest.raises(IsADirectoryError):
            await attempt


async def test_uploads_of_a_file_and_of_a_folder(rex: RemoteRuntime, folder: str, tmp_path: Path) -> None:
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "in" / "sub" / "b.bin").write_bytes(bytes(range(256)) * 999)
    (tmp_path / "in" / "a.txt").write_text("a")
    await rex.upload(
        UploadRequest(source_path=str(tmp_path / "in" / "a.txt"), target_path=f"{folder}/one.txt")
    )
    await rex.upload(UploadRequest(source_path=str(tmp_path / "in"), target_path=f"{folder}/all"))
    done = await rex.execute(
        Command(command=f"cd {folder}; cat one.txt all/a.txt; md5sum < all/sub/b.bin", **SH)
    )
    assert done.stdout == f"aa{hashlib.md5(bytes(range(256)) * 999, usedforsecurity=False).hexdigest()}  -\n"


# --- sessions ------------------------------------------------------------------------------------------


async def test_state_stays_between_commands(shell: Shell) -> None:
    await run(shell, "cd /usr && export A='b c' && f() { echo called; }")
    assert (await run(shell, "pwd; echo $A; f")).output.split() == ["/usr", "b", "c", "called"]


async def test_exit_codes_are_checked_as_asked(shell: Shell) -> None:
    assert (await run(shell, "false", check="silent")).exit_code == 1
    assert (await run(shell, "false", check="ignore")).exit_code is None
    with pytest.raises(NonZeroExitCodeError, match="say why"):
        await run(shell, "echo before; (exit 7)", error_msg="say why")
    assert (await run(shell, "true")).exit_code == 0


@pytest.mark.parametrize(
    ("command", "lines"),
    [
        ("echo a\necho b", ["a", "b"]),
        ("cat <<'EOF'\n$x\n'\nEOF", ["$x", "'"]),
        ("for i in 1 2; do\n echo $i\ndone", ["1", "2"]),
        ("echo err >&2", ["err"]),
        ("printf 'no newline'", ["no", "newline"]),
        ("printf '\\033[31mred\\033[0m\\n'", ["red"]),
        ("# only a comment", []),
    ],
)
async def test_what_a_command_shows(shell: Shell, command: str, lines: list[str]) -> None:
    assert (await run(shell, command, check="silent")).output.split() == lines


async def test_wrong_syntax_is_told_before_anything_runs(shell: Shell) -> None:
    with pytest.raises(BashIncorrectSyntaxError) as failed:
        await run(shell, "echo ran\nif true; then")
    assert "syntax error" in failed.value.extra_info["bash_stderr"]
    assert "ran" not in (await run(shell, "echo next")).output


async def test_sessions_are_known_by_name(shell: Shell) -> None:
    runtime, name = shell
    with pytest.raises(SessionExistsError):
        await runtime.create_session(CreateBashSessionRequest(session=name))
    with pytest.raises(SessionDoesNotExistError):
        await runtime.run_in_session(BashAction(command="true", session="none"))
    await runtime.close_session(CloseBashSessionRequest(session=name))
    with pytest.raises(SessionDoesNotExistError):
        await runtime.close_session(CloseBashSessionRequest(session=name))


async def test_a_timeout_then_an_interrupt_then_an_echo(shell: Shell) -> None:
    runtime, name = shell
    with pytest.raises(CommandTimeoutError):
        action = BashAction(command="echo begun; sleep 60", session=name, timeout=0.5)
        await runtime.run_in_session(action)
    done = await runtime.run_in_session(BashInterruptAction(session=name))
    assert done.exit_code == 0
    assert "again" in (await run(shell, "echo again")).output


async def test_an_interactive_program_is_typed_to(shell: Shell) -> None:
    first = await run(shell, "python3 -q", is_interactive_command=True, expect=[">>> "])
    assert first.expect_string == ">>> " and first.exit_code == 0
    typed = await run(shell, "print(6 * 7)", is_interactive_command=True, expect=[">>> "])
    assert "42" in typed.output
    await run(shell, "exit()", is_interactive_quit=True)
    assert "back" in (await run(shell, "echo back")).output


async def test_the_end_of_the_shell_is_an_end_of_file(shell: Shell) -> None:
    with pytest.raises(pexpect.exceptions.EOF):
        await run(shell, "exit 3")


async def test_files_are_sourced_at_the_start(rex: RemoteRuntime, folder: str) -> None:
    await rex.write_file(WriteFileRequest(path=f"{folder}/env", content="export SOURCED=yes\n"))
    name = f"s-{secrets.token_hex(4)}"
    request = CreateBashSessionRequest(session=name, startup_source=[f"{folder}/env"])
    await rex.create_session(request)
    assert "yes" in (await run((rex, name), "echo $SOURCED")).output


# --- what only this server promises ---------------------------------------------------------------------


async def test_an_interrupt_brings_what_the_command_had_written(ours: RemoteRuntime) -> None:
    await ours.create_session(CreateBashSessionRequest())
    with pytest.raises(CommandTimeoutError):
        await ours.run_in_session(BashAction(command="echo begun; sleep 60", timeout=0.3))
    assert (await ours.run_in_session(BashInterruptAction())).output == "begun"


async def test_what_ignores_every_signal_is_ended_all_the_same(ours: RemoteRuntime) -> None:
    await ours.create_session(CreateBashSessionRequest())
    await ours.run_in_session(BashAction(command="cd /usr; export KEPT=1"))
    with pytest.raises(CommandTimeoutError):
        stubborn = "sh -c \"trap '' INT TERM; while :; do sleep 1; done\""
        await ours.run_in_session(BashAction(command=stubborn, timeout=0.3))
    await ours.run_in_session(BashInterruptAction(timeout=0.1, n_retry=2))
    assert (await ours.run_in_session(BashAction(command="pwd; echo $KEPT"))).output == "/usr\n1\n"


async def test_one_command_holds_up_nobody(ours: RemoteRuntime) -> None:
    for name in ("a", "b"):
        await ours.create_session(CreateBashSessionRequest(session=name))
    slow = asyncio.create_task(ours.run_in_session(BashAction(command="sleep 5", session="a")))
    assert (await ours.run_in_session(BashAction(command="echo quick", session="b"))).output == "quick\n"
    assert not slow.done()
    await ours.run_in_session(BashInterruptAction(session="a"))
    with pytest.raises(NonZeroExitCodeError):
        await slow


async def test_alive_is_answered_from_memory(ours: RemoteRuntime) -> None:
    await ours.wait_until_alive(timeout=10)  # it asks with a limit of 0.1 s
    assert not (await RemoteRuntime(host=ours._config.host, auth_token="wrong").is_alive(timeout=5)).is_alive


async def test_the_same_request_twice_is_done_once(ours: RemoteRuntime) -> None:
    await ours.create_session(CreateBashSessionRequest())
    headers = {**ours._headers, "X-Request-ID": secrets.token_hex(8)}
    body = {"action_type": "bash", "command": "echo x >> /tmp/count; sleep 0.3; cat /tmp/count; false"}
    async with httpx.AsyncClient(headers=headers, base_url=ours._config.host, timeout=20) as http:
        first, second = await asyncio.gather(*(http.post("/run_in_session", json=body) for _ in range(2)))
        third = await http.post("/run_in_session", json=body)
    assert first.status_code == 511 and first.content == second.content == third.content
    assert (await ours.execute(Command(command=["cat", "/tmp/count"]))).stdout == "x\n"


async def test_a_client_that_leaves_ends_nothing(ours: RemoteRuntime) -> None:
    await ours.create_session(CreateBashSessionRequest())
    body = {"action_type": "bash", "command": "sleep 0.5; echo done > /tmp/done"}
    async with httpx.AsyncClient(headers=ours._headers, base_url=ours._config.host, timeout=0.2) as http:
        with pytest.raises(httpx.ReadTimeout):
            await http.post("/run_in_session", json=body)
    deadline = time.monotonic() + 10
    while (await ours.execute(Command(command=["cat", "/tmp/done"]))).exit_code:
        assert time.monotonic() < deadline


async def test_a_sandbox_that_ended_says_so(client: Client) -> None:
    made = await client.create(CreateSandbox(session_key=True, ttl_s=1))
    rex = RemoteRuntime(host=made.swerex_url, auth_token=made.session_key)
    deadline = time.monotonic() + 20
    while await rex.is_alive(timeout=5):
        assert time.monotonic() < deadline
    with pytest.raises(SwerexException) as failed:
        await rex.execute(Command(command="true"))
    assert failed.value.extra_info["infra"] == "evicted"  # type: ignore[attr-defined]


async def test_a_key_is_void_once_its_sandbox_is_deleted(client: Client) -> None:
    made = await client.create(CreateSandbox(session_key=True))
    rex = RemoteRuntime(host=made.swerex_url, auth_token=made.session_key)
    assert await rex.is_alive(timeout=5)
    await client.delete(made.id)
    assert not await rex.is_alive(timeout=5)


async def test_a_zip_with_a_name_that_leads_out_is_refused(ours: RemoteRuntime, tmp_path: Path) -> None:
    import zipfile

    bad = tmp_path / "bad.zip"
    with zipfile.ZipFile(bad, "w") as archive:
        archive.writestr("../../escaped", "x")
    async with httpx.AsyncClient(headers=ours._headers, base_url=ours._config.host, timeout=20) as http:
        files, data = {"file": bad.read_bytes()}, {"target_path": "/tmp/in", "unzip": "true"}
        got = await http.post("/upload", files=files, data=data)
    assert got.status_code == 511 and "leads out" in got.json()["swerexception"]["message"]


def test_mini_swe_agent_works_in_a_sandbox(server: Server, tmp_path: Path) -> None:
    """Its own SWE-ReX environment, with this server in Docker's place; the model is a list of commands."""
    found = Path(__file__).with_name("mini_agent.py")
    made = httpx.post(
        f"{server.url}/v1/sandboxes", headers={"X-API-Key": server.key}, json={"session_key": True}
    ).json()
    done = subprocess.run(
        [sys.executable, found, made["swerex_url"], made["session_key"], tmp_path],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "MSWEA_SILENT_STARTUP": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "Submitted: fixed 42" in done.stdout.splitlines()
