"""Commands in a sandbox, over HTTP: what an agent may do, and what it must not get away with."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator

import httpx
import pytest
from serverkit import Server

from runtime_server.client import BoundSandbox, Client
from runtime_server.errors import BadRequest, Gone, NotFound, SandboxError
from runtime_server.wire import Code, CreateSandbox, Exec, Limits

pytestmark = pytest.mark.container


async def test_streams_and_exit_code_are_apart(sandbox: BoundSandbox) -> None:
    result = await sandbox.exec("echo out; echo err >&2; exit 3")
    assert (result.stdout.text, result.stderr.text, result.exit_code) == ("out\n", "err\n", 3)


async def test_a_list_runs_as_it_is(sandbox: BoundSandbox) -> None:
    assert (await sandbox.exec(["echo", "$HOME; rm"])).stdout.text == "$HOME; rm\n"


async def test_env_cwd_and_stdin(sandbox: BoundSandbox) -> None:
    result = await sandbox.exec("pwd; echo $A; cat", cwd="/usr", env={"A": "b c"}, stdin="typed")
    assert result.stdout.text == "/usr\nb c\ntyped"


async def test_stdin_is_empty_unless_given(sandbox: BoundSandbox) -> None:
    assert (await sandbox.exec("cat; read line || echo none", timeout_s=5)).stdout.text == "none\n"


async def test_a_command_that_never_ends_is_ended_and_its_output_kept(sandbox: BoundSandbox) -> None:
    result = await sandbox.exec("echo begun; setsid sleep 1000 & sleep 1000", timeout_s=0.5)
    assert result.timed_out and result.exit_code == 124 and result.stdout.text == "begun\n"
    assert (await sandbox.exec("pgrep -c sleep")).stdout.text == "0\n"


async def test_a_gigabyte_of_output_is_bounded(sandbox: BoundSandbox) -> None:
    result = await sandbox.exec("head -c 1000000000 /dev/zero | tr '\\0' x; echo end", max_output=4096)
    assert result.stdout.total == 1_000_000_004
    assert len(result.stdout.raw) == 4096 and result.stdout.raw.endswith(b"xend\n")
    assert result.stdout.dropped == result.stdout.total - 4096 and "left out" in result.stdout.text


async def test_a_fork_bomb_hurts_only_itself(client: Client, sandbox: BoundSandbox) -> None:
    async with client.sandbox(CreateSandbox(limits=Limits(pids=64, cpus=0.5))) as bad:
        # The shell that waits forks before the bomb goes off: after that it might not be able to any more.
        text = "(bomb() { bomb | bomb & }; bomb) & exec sleep 60"
        bomb = asyncio.create_task(bad.exec(text, timeout_s=3))
        assert (await sandbox.exec("echo alive", timeout_s=20)).stdout.text == "alive\n"
        assert (await bomb).timed_out
        assert (await bad.exec("echo over", timeout_s=20)).stdout.text == "over\n"


async def test_output_that_is_no_text_arrives_as_it_was(sandbox: BoundSandbox) -> None:
    result = await sandbox.exec(r"printf '\377\000\376'")
    assert result.stdout.encoding == "base64" and result.stdout.raw == b"\xff\x00\xfe"


async def test_missing_program_and_missing_folder(sandbox: BoundSandbox) -> None:
    assert (await sandbox.exec(["no-such-program"])).exit_code == 127
    with pytest.raises(SandboxError) as failed:
        await sandbox.exec("true", cwd="/no/such")
    assert failed.value.code in (Code.FILE_NOT_FOUND, Code.FILE_ERROR)


async def test_two_hundred_commands_at_once(sandbox: BoundSandbox) -> None:
    results = await asyncio.gather(*(sandbox.exec(f"echo {n}", timeout_s=60) for n in range(200)))
    assert [int(r.stdout.text) for r in results] == [*range(200)]


async def test_hanging_up_ends_the_command(client: Client, server: Server, sandbox: BoundSandbox) -> None:
    body = Exec(command="sleep 1001", timeout_s=100).model_dump_json()
    headers = {"X-API-Key": server.key, "Content-Type": "application/json"}
    with pytest.raises(httpx.ReadTimeout):
        async with httpx.AsyncClient(timeout=0.5) as raw:
            await raw.post(f"{server.url}/v1/sandboxes/{sandbox.id}/exec", content=body, headers=headers)
    deadline = time.monotonic() + 10
    while (await sandbox.exec("pgrep -cf 'sleep 100[1]'")).stdout.text != "0\n":
        assert time.monotonic() < deadline


async def test_memory_is_limited_and_said_to_be_the_reason(client: Client) -> None:
    async with client.sandbox(CreateSandbox(limits=Limits(memory_mb=64))) as small:
        eat = "python3 -c 'x = bytearray(200 << 20)'"
        try:
            result = await small.exec(eat, timeout_s=30)
        except Gone as error:
            assert error.code == Code.OOM and not error.infrastructure
        else:
            assert result.oom and not result.ok


async def test_files_are_byte_exact(sandbox: BoundSandbox) -> None:
    data = os.urandom(3_000_000)
    info = await sandbox.write_file("/tmp/deep/er/x.bin", data, 0o750)
    assert (info.size, info.mode) == (len(data), 0o750)
    assert await sandbox.read_file("/tmp/deep/er/x.bin") == data
    assert (await sandbox.exec("stat -c %a /tmp/deep/er/x.bin")).stdout.text == "750\n"
    await sandbox.write_file("empty", b"")
    assert await sandbox.read_file("empty") == b""


@pytest.mark.parametrize(("path", "code"), [("/no/such", Code.FILE_NOT_FOUND), ("/tmp", Code.FILE_ERROR)])
async def test_files_that_cannot_be_read(sandbox: BoundSandbox, path: str, code: Code) -> None:
    with pytest.raises(SandboxError) as failed:
        await sandbox.read_file(path)
    assert failed.value.code == code


async def test_a_fifo_or_device_does_not_hang(sandbox: BoundSandbox) -> None:
    await sandbox.exec("mkfifo /tmp/fifo; ln -s /dev/zero /tmp/zero")
    for path in ("/tmp/fifo", "/tmp/zero"):
        with pytest.raises(BadRequest):
            await sandbox.read_file(path)


async def test_killing_the_first_process_is_not_possible_from_inside(sandbox: BoundSandbox) -> None:
    await sandbox.exec("kill -9 1; kill -STOP 1; kill -TERM -1", timeout_s=10)
    assert (await sandbox.exec("echo still here", timeout_s=10)).stdout.text == "still here\n"


async def test_what_a_sandbox_sees(sandbox: BoundSandbox) -> None:
    result = await sandbox.exec(
        "hostname; ls /sys/class/net; mount -t tmpfs none /mnt 2>/dev/null || echo no mount; env; "
        "grep -E 'CapEff|NoNewPrivs|Seccomp:' /proc/self/status; cat /proc/1/environ; ls /.orchestrate/io"
    )
    seen = result.stdout.text
    assert seen.startswith("sandbox\nlo\nno mount\n")
    assert "CapEff:\t00000000000000eb" in seen and "NoNewPrivs:\t1" in seen and "Seccomp:\t2" in seen
    assert "agent.sock" not in seen
    assert "ORCHESTRATE" not in seen and "HOME=/root" in seen


async def test_an_unknown_sandbox(client: Client) -> None:
    with pytest.raises(NotFound) as failed:
        await client.exec("s-nothing", Exec(command="true"))
    assert failed.value.code == Code.SANDBOX_NOT_FOUND


async def test_kill_ends_what_was_left_running_and_keeps_files(sandbox: BoundSandbox) -> None:
    await sandbox.exec("echo kept > file; setsid sleep 1000 >/dev/null 2>&1 & (trap '' TERM; sleep 1000) &")
    running = asyncio.create_task(sandbox.exec("sleep 1000"))
    for _ in range(500):
        if (await sandbox.exec("pgrep -c sleep")).stdout.text == "3\n":
            break
    await sandbox.kill()
    assert (await running).signal == 9
    assert (await sandbox.exec("pgrep -c sleep; cat file")).stdout.text == "0\nkept\n"


ODD = [
    (b'{"command":["false"]}', {}, 200),
    (b'{"command":["false"],"timeout_s":NaN}', {}, 400),
    (b'{"command":["false"],"other":1}', {}, 400),
    (b'{"command":"echo \\ud800"}', {}, 400),
    (b"{", {}, 400),
    (b"", {}, 400),
    (b'{"command":["false"]}', {"Content-Type": "text/plain"}, 400),
    (b'{"command":["false"],"cwd":"/no/such"}', {}, 404),
]


@pytest.mark.parametrize(("body", "headers", "status"), ODD)
async def test_the_short_way_and_the_route_say_the_same(
    server: Server, sandbox: BoundSandbox, body: bytes, headers: dict[str, str], status: int
) -> None:
    """A body whose length is not announced up front, and one with a key, do not go the short way."""

    async def pieces() -> AsyncIterator[bytes]:
        for at in range(0, len(body), 8):
            yield body[at : at + 8]
            await asyncio.sleep(0.002)

    where = f"{server.url}/v1/sandboxes/{sandbox.id}/exec"
    headers = {"X-API-Key": server.key, "Content-Type": "application/json"} | headers
    async with httpx.AsyncClient(timeout=20) as raw:
        short = await raw.post(where, content=body, headers=headers)
        slow = await raw.post(where, content=pieces(), headers=headers)
        keyed = await raw.post(
            where, content=body, headers=headers | {"Idempotency-Key": os.urandom(8).hex()}
        )
    for one in (short, slow, keyed):
        assert one.status_code == status
        assert _said(one) == _said(short)


def _said(response: httpx.Response) -> object:
    said = response.json()
    said.pop("duration_ms", None)
    return [response.headers["content-type"], said]


async def test_the_short_way_is_guarded_like_every_other(server: Server, sandbox: BoundSandbox) -> None:
    where, body = f"{server.url}/v1/sandboxes/%s/exec", {"command": ["true"]}
    async with httpx.AsyncClient(timeout=20) as raw:
        for key in ({}, {"X-API-Key": "wrong"}):
            assert (await raw.post(where % sandbox.id, json=body, headers=key)).status_code == 401
        known = {"X-API-Key": server.key}
        missing = await raw.post(where % "no-such-box", json=body, headers=known)
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "sandbox_not_found")
        assert (await raw.get(where % sandbox.id, headers=known)).status_code == 405
