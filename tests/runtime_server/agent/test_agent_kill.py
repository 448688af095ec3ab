"""Nothing survives a timeout, whatever it does; and nothing inside can harm the agent."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from agentkit import Sandbox, running

from runtime_server.agent import AgentError


async def test_timeout_keeps_partial_output(sandbox: Sandbox) -> None:
    started = time.monotonic()
    done = await sandbox.sh("echo partial; echo oops >&2; sleep 99", timeout_s=0.3)
    assert (done.exit_code, done.timed_out) == (124, True)
    assert (done.stdout.data, done.stderr.data) == (b"partial\n", b"oops\n")
    assert 0.3 <= time.monotonic() - started < 3
    assert await sandbox.processes() == []


STUBBORN = {
    "setsid": "setsid sleep 777 & sleep 777",
    "double fork": "(setsid sh -c '(sleep 777 &) ; exit' &) ; sleep 777",
    "ignores signals": "trap '' TERM INT HUP QUIT; (trap '' TERM; sleep 777) & while :; do sleep 777; done",
    "holds the pipe": "(exec sleep 777) & (exec sleep 777 >/dev/null 2>&1) & wait",
    "deep": 'sh -c \'sh -c "sh -c \\"sleep 777 & sleep 777; :\\"; :"; :\'; :',
    "stopped": "sleep 777 & kill -STOP $!; kill -STOP $$; sleep 777",
    "root has ended into background": "(while :; do sleep 0.01; done) & exec sleep 777",
}


@pytest.mark.parametrize("name", STUBBORN)
async def test_tree_is_gone_after_timeout(sandbox: Sandbox, name: str) -> None:
    done = await sandbox.sh(f"echo started; {STUBBORN[name]}", timeout_s=0.8)
    assert done.timed_out and done.stdout.data.startswith(b"started\n")
    assert await sandbox.processes() == [] and await sandbox.zombies() == 0


async def test_only_the_timed_out_tree_dies(sandbox: Sandbox) -> None:
    await sandbox.sh("sleep 111 &")
    other = asyncio.create_task(sandbox.sh("sleep 1; echo fine"))
    done = await sandbox.sh("setsid sleep 777 & sleep 777", timeout_s=0.2)
    assert done.timed_out
    assert (await other).stdout.data == b"fine\n"
    assert await sandbox.settles("sleep 111")


async def test_many_timeouts_at_once(sandbox: Sandbox) -> None:
    started = time.monotonic()
    many = [sandbox.sh("echo x; setsid sleep 777 & sleep 777", timeout_s=1) for _ in range(100)]
    results = await asyncio.gather(*many)
    assert all(one.timed_out and one.stdout.data == b"x\n" for one in results)
    assert time.monotonic() - started < 10
    assert await sandbox.processes() == []


async def test_cancelling_kills_the_tree(sandbox: Sandbox) -> None:
    mark = sandbox.directory / "started"
    task = asyncio.create_task(sandbox.sh(f"setsid sleep 777 & echo > {mark}; sleep 777"))
    assert (await sandbox.sh(f"until [ -s {mark} ]; do sleep 0.01; done")).exit_code == 0
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await sandbox.settles()


async def test_kill_all(sandbox: Sandbox) -> None:
    await sandbox.sh("setsid sleep 111 &")
    running_one = asyncio.create_task(sandbox.sh("echo x; sleep 777"))
    while not await sandbox.processes():
        pass
    await sandbox.agent.kill_all()
    done = await running_one
    assert (done.exit_code, done.signal, done.timed_out) == (137, 9, False)
    assert await sandbox.processes() == []


@pytest.fixture
async def crowded(binary: Path) -> AsyncIterator[Sandbox]:
    """A sandbox whose processes are limited, so that a fork bomb stays inside it."""
    if os.geteuid() != 0:
        pytest.skip("a private process limit needs root")
    async with running(binary, nproc=150) as one:
        yield one


def borrow(sandbox: Sandbox, program: str) -> str:
    """A copy where the sandbox's unprivileged user can reach it."""
    return str(shutil.copy2(program, sandbox.directory))


async def test_fork_bomb(crowded: Sandbox, hostile: str) -> None:
    bystander = asyncio.create_task(crowded.run("sleep", "2"))
    await crowded.agent.ping()
    started = time.monotonic()
    done = await crowded.run(borrow(crowded, hostile), "bomb", timeout_s=0.5)
    assert done.timed_out and time.monotonic() - started < 10
    assert await crowded.settles("sleep 2")
    assert (await crowded.run("echo", "alive")).stdout.data == b"alive\n"
    assert (await bystander).exit_code == 0  # stopped with everybody for a moment, and none the wiser


async def test_command_in_a_full_sandbox_fails_plainly(crowded: Sandbox, hostile: str) -> None:
    full = asyncio.create_task(crowded.run(borrow(crowded, hostile), "fill", timeout_s=1))
    codes = set()
    while not full.done():
        done = await crowded.run("true")
        codes.add(done.exit_code)
        if done.exit_code:
            assert (done.exit_code, b"too many" in done.stderr.data) == (126, True)
    assert 126 in codes
    assert (await full).timed_out and await crowded.processes() == []


@pytest.mark.parametrize("mode", ["hop", "headless"])
async def test_programs_that_do_not_want_to_die(sandbox: Sandbox, hostile: str, mode: str) -> None:
    started = time.monotonic()
    script = f"echo x; {hostile} {mode} & {hostile} {mode} & wait; sleep 777"
    done = await sandbox.sh(script, timeout_s=0.5)
    assert done.timed_out and time.monotonic() - started < 10
    assert await sandbox.processes() == []


async def test_two_generations_kill_their_supervisor(sandbox: Sandbox, hostile: str) -> None:
    done = await sandbox.run(hostile, "usurp")
    assert (done.exit_code, done.signal) == (137, 9)
    assert await sandbox.processes() == []


async def test_supervisor_killed_from_inside(sandbox: Sandbox) -> None:
    await sandbox.sh("sleep 111 &")
    script = "echo before; setsid sleep 777 & kill -9 $PPID; sleep 777"
    done = await sandbox.sh(script, timeout_s=30)
    assert (done.exit_code, done.signal, done.timed_out) == (137, 9, False)
    assert done.stdout.data == b"before\n" and done.duration_ms < 5000
    assert await sandbox.settles("sleep 111")


async def test_supervisor_stopped_from_inside(sandbox: Sandbox) -> None:
    done = await sandbox.sh("echo x; kill -STOP $PPID; setsid sleep 777 & exit 0", timeout_s=0.5)
    assert done.timed_out and done.stdout.data == b"x\n"
    assert await sandbox.processes() == []


async def test_signals_from_inside_do_nothing(sandbox: Sandbox) -> None:
    for number in (9, 19, 15, 2, 3, 1, 10, 17, 34):
        await sandbox.sh(f"kill -{number} 1")
    assert (await sandbox.run("echo", "alive")).stdout.data == b"alive\n"
    everybody = await sandbox.sh("kill -9 -1")
    assert everybody.exit_code == 137
    assert (await sandbox.run("echo", "alive")).stdout.data == b"alive\n"


async def test_agent_cannot_be_traced_or_read(sandbox: Sandbox) -> None:
    attach = (
        "import ctypes; libc = ctypes.CDLL(None, use_errno=True); "
        "print([libc.ptrace(request, 1, None, None) for request in (16, 0x4206)], ctypes.get_errno())"
    )
    done = await sandbox.run(sys.executable, "-c", attach)
    assert done.stdout.data == b"[-1, -1] 1\n"
    for name in ("environ", "mem", "maps", "fd/0", "root/etc"):
        assert (await sandbox.sh(f"cat /proc/1/{name} > /dev/null")).exit_code != 0, name
        assert (await sandbox.sh(f"cat /proc/$PPID/{name} > /dev/null")).exit_code != 0, name
    assert (await sandbox.sh("ls -l /proc/1/fd/ /proc/$PPID/fd/")).stdout.data.count(b"socket") == 0


async def test_sigterm_from_outside_ends_everything(sandbox: Sandbox) -> None:
    await sandbox.sh("setsid sleep 777 &")
    os.kill(sandbox.agent.pid, 15)
    started = time.monotonic()
    await asyncio.wait_for(sandbox.process.wait(), 5)
    await asyncio.wait_for(sandbox.agent.wait_closed(), 5)
    assert time.monotonic() - started < 2 and sandbox.agent.closed


# ---- supervisors that stay ---------------------------------------------------------------------------------


async def parent(sandbox: Sandbox) -> int:
    return int((await sandbox.sh("echo $PPID")).stdout.data)


async def test_a_supervisor_with_nobody_left_takes_the_next_command(sandbox: Sandbox) -> None:
    first = await parent(sandbox)
    assert await parent(sandbox) == first
    await sandbox.sh("sleep 111 &")
    second = await parent(sandbox)
    assert second != first and await parent(sandbox) == second
    await sandbox.sh("pkill sleep")
    assert await sandbox.settles()


async def test_nothing_of_a_command_is_left_for_the_next(sandbox: Sandbox) -> None:
    where = "pwd; umask; echo A=$A; ls /proc/self/fd | wc -l; cat; echo $1 >&2"
    fresh = await sandbox.sh(where)
    script = "ulimit -n 99; umask 0; trap '' PIPE USR1; exec 7</dev/null; cd /; exit 3"
    other = await sandbox.run("sh", "-c", script, cwd="/usr", env={"A": "b"}, stdin=b"x")
    assert other.exit_code == 3
    again = await sandbox.sh(where)
    assert (again.stdout, again.stderr) == (fresh.stdout, fresh.stderr)
    assert (await sandbox.sh("grep SigIgn /proc/self/status")).stdout.data.split()[1].strip(b"0") == b""


async def test_a_folder_that_is_missing_costs_no_supervisor(sandbox: Sandbox) -> None:
    first = await parent(sandbox)
    for _ in range(3):
        with pytest.raises(AgentError):
            await sandbox.run("true", cwd="/no/such")
    assert await parent(sandbox) == first


@pytest.mark.parametrize("signal", ["KILL", "STOP"])
async def test_an_idle_supervisor_that_is_hit_is_replaced_or_goes_on(
    sandbox: Sandbox, signal: str, tmp_path: Path
) -> None:
    go, hit = tmp_path / "go", tmp_path / "hit"
    script = f"(while ! [ -s {go} ]; do sleep 0.01; done; kill -{signal} $(cat {go}); echo > {hit}) &"
    await sandbox.sh(script)  # keeps its own supervisor busy
    await sandbox.agent.write_file(str(go), str(await parent(sandbox)).encode())
    deadline = time.monotonic() + 10
    while not hit.exists():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
    assert [(await sandbox.sh("echo alive")).stdout.data for _ in range(3)] == [b"alive\n"] * 3


async def test_a_command_too_large_for_a_supervisor_that_stays(sandbox: Sandbox) -> None:
    await parent(sandbox)
    for size in (16_000, 17_000, 120_000, 16_383):
        assert (await sandbox.run("printf", "%s", "x" * size)).stdout.data == b"x" * size


async def test_many_at_once_and_killed_while_they_go_on(sandbox: Sandbox) -> None:
    async def one(number: int) -> None:
        done = await sandbox.sh(f"echo {number}; sleep 0.0{number % 10}; echo x", timeout_s=20)
        assert done.stdout.data == f"{number}\nx\n".encode()

    for _ in range(3):
        await asyncio.gather(*map(one, range(40)))
        waiting = asyncio.ensure_future(sandbox.run("sleep", "777"))
        assert await sandbox.settles("sleep 777")
        await sandbox.agent.kill_all()
        assert (await waiting).exit_code == 137
    assert await sandbox.processes() == []


async def test_output_larger_than_a_pipe_right_at_the_end(sandbox: Sandbox) -> None:
    for _ in range(5):
        done = await sandbox.sh("head -c 300000 /dev/zero; head -c 70000 /dev/zero >&2")
        assert (done.stdout.total, done.stderr.total) == (300_000, 70_000)
