"""Commands: results, streams, stdin, environment, many at once."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import importlib.util
import os
import sys
import time
from pathlib import Path

import pytest
from agentkit import Sandbox

from runtime_server.agent import AgentError


async def test_result_separates_streams_and_code(sandbox: Sandbox) -> None:
    done = await sandbox.sh("echo out; echo err >&2; exit 3")
    assert (done.exit_code, done.signal, done.timed_out) == (3, 0, False)
    assert (done.stdout.data, done.stderr.data) == (b"out\n", b"err\n")
    assert (done.stdout.total, done.stdout.head) == (4, 4)
    assert 0 < done.duration_ms < 5000


@pytest.mark.parametrize("number", [9, 15, 11])
async def test_signal_is_reported(sandbox: Sandbox, number: int) -> None:
    done = await sandbox.sh(f"kill -{number} $$")
    assert (done.exit_code, done.signal) == (128 + number, number)


async def test_missing_program_is_127(sandbox: Sandbox) -> None:
    done = await sandbox.run("no-such-program")
    assert done.exit_code == 127
    assert b"no-such-program" in done.stderr.data and b"No such file" in done.stderr.data
    assert (await sandbox.run("")).exit_code == 127


async def test_not_executable_is_126(sandbox: Sandbox) -> None:
    done = await sandbox.run("/etc/passwd")
    assert done.exit_code == 126 and b"Permission denied" in done.stderr.data


async def test_script_without_shebang_runs_in_a_shell(sandbox: Sandbox) -> None:
    path = str(sandbox.directory / "script")
    await sandbox.agent.write_file(path, b'echo "script $1"\n', mode=0o755)
    assert (await sandbox.run(path, "ran")).stdout.data == b"script ran\n"


async def test_cwd(sandbox: Sandbox) -> None:
    assert (await sandbox.run("pwd", cwd="/usr/lib")).stdout.data == b"/usr/lib\n"
    with pytest.raises(AgentError, match="working directory") as caught:
        await sandbox.run("pwd", cwd="/no/such/place")
    assert caught.value.errno == errno.ENOENT
    with pytest.raises(AgentError) as caught:
        await sandbox.run("pwd", cwd="/etc/passwd")
    assert caught.value.errno == errno.ENOTDIR


async def test_environment_is_merged_over_the_agents(sandbox: Sandbox) -> None:
    done = await sandbox.run("env", env={"LANG": "xx", "NEW": "a=b\nc", "EMPTY": ""})
    assert b"LANG=xx\n" in done.stdout.data and b"NEW=a=b\nc\n" in done.stdout.data
    assert b"EMPTY=\n" in done.stdout.data and b"PATH=" in done.stdout.data and b"HOME=" in done.stdout.data
    assert done.stdout.data.count(b"LANG=") == 1


async def test_path_of_the_command_finds_the_program(sandbox: Sandbox) -> None:
    tool = str(sandbox.directory / "bin" / "tool")
    await sandbox.agent.write_file(tool, b"#!/bin/sh\necho found\n", mode=0o755)
    assert (await sandbox.run("tool", env={"PATH": os.path.dirname(tool)})).stdout.data == b"found\n"  # noqa: PTH120
    assert (await sandbox.run("tool", env={"PATH": "/nowhere::/usr/bin"})).exit_code == 127


@pytest.mark.parametrize(
    ("argv", "env"), [((), {}), (("a\0b",), {}), (("true",), {"A=B": ""}), (("true",), {"": "x"})]
)
async def test_what_no_kernel_takes_is_refused(
    sandbox: Sandbox, argv: tuple[str, ...], env: dict[str, str]
) -> None:
    with pytest.raises(AgentError) as caught:
        await sandbox.run(*argv, env=env)
    assert caught.value.errno == errno.EINVAL


async def test_too_long_arguments(sandbox: Sandbox) -> None:
    assert (await sandbox.run("echo", "x" * 100_000)).stdout.total == 100_001
    done = await sandbox.run("echo", "x" * 500_000)  # above what one argument may have: the kernel's answer
    assert done.exit_code == 126 and b"too long" in done.stderr.data
    with pytest.raises(AgentError) as caught:
        await sandbox.run("echo", *["x" * 1000] * 1100)
    assert caught.value.errno == errno.E2BIG


async def test_bytes_are_exact(sandbox: Sandbox) -> None:
    raw = bytes(range(256)) * 50 + b"\xff\xfe\xc3"
    done = await sandbox.run("cat", stdin=raw)
    assert done.stdout.data == raw


async def test_stdin_none_is_dev_null(sandbox: Sandbox) -> None:
    assert (await sandbox.run("cat")).stdout.total == 0
    assert (await sandbox.run("cat", stdin=b"")).stdout.total == 0
    done = await sandbox.sh("readlink /proc/self/fd/0; exec 3</dev/tty")
    assert done.stdout.data == b"/dev/null\n" and done.exit_code != 0  # and there is no terminal to ask


async def test_large_stdin_through_and_back(sandbox: Sandbox) -> None:
    data = os.urandom(10_000_000)
    done = await sandbox.run("cat", stdin=data, max_output=len(data))
    assert hashlib.sha256(done.stdout.data).digest() == hashlib.sha256(data).digest()


async def test_reader_that_stops_early(sandbox: Sandbox) -> None:
    done = await sandbox.run("head", "-c", "3", stdin=b"abc" + b"x" * 10_000_000)
    assert (done.exit_code, done.stdout.data) == (0, b"abc")
    slow = await sandbox.sh("exec <&-; sleep 0.2; echo done", stdin=b"x" * 10_000_000)
    assert slow.stdout.data == b"done\n"


async def test_blocked_stdin_does_not_stall_others(sandbox: Sandbox) -> None:
    blocked = asyncio.create_task(sandbox.run("sleep", "60", stdin=b"x" * 10_000_000, timeout_s=100))
    for _ in range(20):
        assert (await sandbox.run("cat", stdin=b"y" * 100_000)).stdout.total == 100_000
    assert not blocked.done()
    blocked.cancel()
    await asyncio.wait([blocked])
    assert await sandbox.settles()


async def test_three_hundred_at_once(sandbox: Sandbox) -> None:
    async def one(number: int) -> None:
        done = await sandbox.sh(
            f"read line; echo $line; sleep 0.2; exit {number % 200}", stdin=b"%d\n" % number
        )
        assert (done.exit_code, done.stdout.data) == (number % 200, b"%d\n" % number)

    await asyncio.gather(*(one(number) for number in range(300)))
    assert await sandbox.processes() == [] and await sandbox.zombies() == 0


async def test_more_than_the_agent_runs_at_once_wait(sandbox: Sandbox) -> None:
    count = sandbox.agent.max_commands + 50
    results = await asyncio.gather(*(sandbox.run("true") for _ in range(count)))
    assert {one.exit_code for one in results} == {0}


@pytest.mark.parametrize("limit", [0, 1, 7, 100, 4096, 40_000])
async def test_head_and_tail_are_kept(sandbox: Sandbox, limit: int) -> None:
    text = b"".join(b"%d\n" % number for number in range(50_000))
    done = await sandbox.run("cat", stdin=text, max_output=limit)
    head = done.stdout.head
    assert (done.stdout.total, head) == (len(text), limit // 2)
    assert done.stdout.data == text[:head] + text[len(text) - (limit - head) :]


async def test_flood_is_bounded(sandbox: Sandbox) -> None:
    started = time.monotonic()
    script = "head -c 1000000000 /dev/zero | tr '\\0' x; printf THE-END"
    done = await sandbox.sh(script, max_output=1 << 20, timeout_s=60)
    assert done.stdout.total == 1_000_000_007 and len(done.stdout.data) == 1 << 20
    assert done.stdout.data.endswith(b"xTHE-END") and done.stdout.data.startswith(b"xxx")
    assert sandbox.memory_kib() < 4096 and time.monotonic() - started < 60


async def test_memory_for_output_is_shared(sandbox: Sandbox) -> None:
    flood = "head -c 30000000 /dev/zero; printf END"
    many = [sandbox.sh(flood, max_output=8 << 20, timeout_s=60) for _ in range(12)]
    peak = 0
    for result in asyncio.as_completed(many):
        done = await result
        peak = max(peak, sandbox.memory_kib())
        assert done.stdout.total == 30_000_003 and done.stdout.data.endswith(b"END")
        assert len(done.stdout.data) >= 16_384 and done.stdout.head == len(done.stdout.data) // 2
    assert peak < 40 * 1024


async def test_background_process_does_not_hold_the_command(sandbox: Sandbox) -> None:
    started = time.monotonic()
    done = await sandbox.sh("sleep 777 & echo started", timeout_s=30)
    assert (done.exit_code, done.stdout.data) == (0, b"started\n")
    assert time.monotonic() - started < 5
    assert await sandbox.settles("sleep 777")


async def test_background_writer_lives_on(sandbox: Sandbox) -> None:
    mark = sandbox.directory / "mark"
    script = f"(while [ ! -e {mark} ]; do echo noise || exit; done; echo survived > {mark}.ok) & echo go"
    done = await sandbox.sh(script)
    assert done.stdout.data.startswith(b"go\n") or b"noise" in done.stdout.data
    await sandbox.sh(f"touch {mark}; for i in $(seq 500); do [ -s {mark}.ok ] && exit; sleep 0.01; done")
    assert (sandbox.directory / "mark.ok").read_text() == "survived\n"


async def test_output_of_last_children_is_caught(sandbox: Sandbox) -> None:
    """Best effort: the grace is short, so on a busy machine it needs not work every time."""
    results = [await sandbox.run("bash", "-c", "echo through > >(cat)") for _ in range(10)]
    assert b"through\n" in {one.stdout.data for one in results}


async def test_children_inherit_nothing(sandbox: Sandbox) -> None:
    done = await sandbox.run(sys.executable, "-c", "import os; print(sorted(os.listdir('/proc/self/fd')))")
    assert done.stdout.data == b"['0', '1', '2', '3']\n"  # 3 is the listing itself
    status = (await sandbox.run("cat", "/proc/self/status")).stdout.data.decode()
    masks = [line.split()[1] for line in status.splitlines() if line.startswith(("SigBlk", "SigIgn"))]
    assert masks == ["0000000000000000"] * 2
    session = await sandbox.sh("ps -o pid=,sid= -p $$; cat /proc/$$/oom_score_adj")
    pid, sid, adjustment = session.stdout.data.split()
    own = Path(f"/proc/{sandbox.agent.pid}/oom_score_adj").read_text()
    assert pid == sid and int(adjustment) > int(own)  # memory runs out: it dies, not the agent


async def test_idle_agent_is_small(sandbox: Sandbox) -> None:
    await asyncio.gather(*(sandbox.run("true") for _ in range(100)))
    musl = importlib.util.find_spec("ziglang") is not None
    assert sandbox.memory_kib() < (1024 if musl else 2048)
