"""Sessions: what stays, what a command says, interrupts, timeouts, terminals, and shells of every kind."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from agentkit import Sandbox

from runtime_server.agent import AgentError, Chunk, Finished, Session, SessionEnded

SHELLS = [shell for shell in ("/bin/bash", "/bin/dash", "busybox") if shutil.which(shell)]


@pytest.fixture(params=SHELLS)
async def session(sandbox: Sandbox, request: pytest.FixtureRequest) -> AsyncIterator[Session]:
    shell: str = request.param
    if shell == "busybox":  # one program that looks at its name
        shell = str(sandbox.directory / "ash")
        Path(shell).symlink_to(str(shutil.which("busybox")))
    one = await sandbox.agent.open_session(shell=shell)
    yield one
    if not one.ended and not sandbox.agent.closed:
        await one.close()


async def run(session: Session, text: str, timeout_s: float = 20) -> Finished:
    return await session.run(text, timeout_s=timeout_s)


async def said(session: Session, text: str) -> bytes:
    return (await run(session, text)).stdout.data


async def test_state_stays(session: Session) -> None:
    await run(session, "cd /tmp; x=3; export y=4; f() { echo \"f $1\"; }; alias hi='echo hello'; umask 077")
    assert await said(session, 'pwd; echo "$x"; sh -c "echo $y"; f 2; umask') == b"/tmp\n3\n4\nf 2\n0077\n"
    assert await said(session, "hi") == b"hello\n"


async def test_status_and_streams(session: Session) -> None:
    done = await run(session, "echo out; echo err >&2; (exit 7)")
    assert (done.exit_code, done.stdout.data, done.stderr.data) == (7, b"out\n", b"err\n")
    assert (await run(session, "no-such-program")).exit_code == 127


@pytest.mark.parametrize("text", ["if then", "echo 'a", "x=(", "}", "cat <<E\n$(("])
async def test_a_syntax_error_is_a_result(session: Session, text: str) -> None:
    done = await run(session, text)
    assert done.exit_code != 0 or done.stderr.data
    assert await said(session, "echo alive") == b"alive\n"


async def test_any_text(session: Session) -> None:
    text = "cat <<'END'\na $x\n\\ \"quoted\" 'text' !! %s\nEND\necho \"ü $(printf '\\377')\"  # comment"
    done = await run(session, text)
    assert done.stdout.data == "a $x\n\\ \"quoted\" 'text' !! %s\nü ".encode() + b"\xff\n"
    long = "x='" + "line\n" * 100_000 + "'; echo ${#x}"
    assert await said(session, long) == b"500000\n"


async def test_stdin_is_empty_unless_asked_for(session: Session) -> None:
    assert await said(session, "cat; read x; echo [$x]") == b"[]\n"


async def test_input_of_a_command(sandbox: Sandbox, session: Session) -> None:
    running = asyncio.create_task(session.run("read a; echo got $a; cat", timeout_s=20, stdin=True))
    await sandbox.agent.ping()
    await session.send(b"line\nrest")
    await session.end_input()
    assert (await running).stdout.data == b"got line\nrest"
    done = await session.run("cat", timeout_s=0.2, stdin=True, on_timeout="leave")
    assert done.timed_out  # what the one before left unread, and its end, are not for this one
    await session.end_input()
    assert (await session.rest(10)).stdout.data == b""
    with pytest.raises(AgentError, match="stdin"):
        await session.send(b"x")


ENDLESS = {
    "program": "sleep 100; echo next",
    "loop": "while :; do sleep 0.01; done; echo next",
    "busy": "while :; do :; done; echo next",
    "subshell": "(sleep 100; echo inner); echo next",
    "pipe": "sleep 100 | cat; echo next",
    "function": "f() { sleep 100; echo inner; }; f; echo next",
}


async def interrupted(session: Session, text: str, grace_s: float = 5) -> Finished:
    """Once it has said "on"."""
    on = asyncio.Event()

    def hear(chunk: Chunk) -> None:
        if b"on" in chunk.data:
            on.set()

    task = asyncio.create_task(session.run(text, timeout_s=30, on_output=hear))
    await asyncio.wait_for(on.wait(), 20)
    told = await session.interrupt(grace_s)
    assert told == await task
    return await task


@pytest.mark.parametrize("name", ENDLESS)
async def test_interrupt_ends_the_command_and_not_the_session(
    sandbox: Sandbox, session: Session, name: str
) -> None:
    await run(session, "x=kept; sleep 111 & :")
    while "sleep 111" not in await sandbox.processes():
        pass
    done = await interrupted(session, f"echo on; {ENDLESS[name]}")
    assert (done.exit_code, done.stdout.data, done.killed) == (130, b"on\n", False)
    assert await said(session, 'echo "$x"') == b"kept\n"
    assert "sleep 111" in await sandbox.processes()


async def test_interrupt_of_nothing(session: Session) -> None:
    assert await session.interrupt() is None
    assert await said(session, "echo alive") == b"alive\n"


async def test_what_ignores_the_interrupt_is_killed(sandbox: Sandbox, session: Session) -> None:
    text = "(trap '' INT; echo on; sleep 777; echo inner); echo next"
    done = await interrupted(session, text, grace_s=0.3)
    assert done.killed and done.exit_code == 137 and b"next" not in done.stdout.data
    assert await said(session, "echo alive") == b"alive\n"
    assert len(await sandbox.processes()) == 1


async def test_interrupt_where_the_session_itself_ignores_it(session: Session) -> None:
    done = await interrupted(
        session, "trap '' INT; echo on; while :; do sleep 0.01; done; echo next", grace_s=0.3
    )
    assert done.killed and b"next" not in done.stdout.data
    assert await said(session, "echo alive") == b"alive\n"


async def test_timeout_kills_the_tree_and_keeps_the_session(sandbox: Sandbox, session: Session) -> None:
    await run(session, "x=kept; sleep 111 & :")
    text = "echo part; setsid sleep 777 & (setsid sleep 778 &); sleep 779; echo next"
    done = await session.run(text, timeout_s=0.4)
    assert done.timed_out and (done.exit_code, done.stdout.data) == (124, b"part\n")
    assert await said(session, 'echo "$x"') == b"kept\n"
    left = await sandbox.processes()
    assert len(left) == 2 and "sleep 111" in left


async def test_timeout_may_leave_it_running(session: Session) -> None:
    first = await session.run("echo a; sleep 0.5; echo b", timeout_s=0.1, on_timeout="leave")
    assert first.timed_out and first.stdout.data == b"a\n"
    with pytest.raises(AgentError, match="still running"):
        await run(session, "echo no")
    done = await session.rest(20)
    assert (done.exit_code, done.stdout.data, done.timed_out) == (0, b"a\nb\n", False)
    with pytest.raises(AgentError, match="nothing"):
        await session.rest(1)


async def test_giving_up_waiting_kills_the_command(sandbox: Sandbox, session: Session) -> None:
    task = asyncio.create_task(session.run("setsid sleep 777 & sleep 778", timeout_s=60))
    while len(await sandbox.processes()) < 3:
        pass
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    while True:
        try:
            assert await said(session, "echo alive") == b"alive\n"
            break
        except AgentError as error:
            assert "still running" in str(error)
    assert len(await sandbox.processes()) == 1


async def test_exit_ends_the_session(session: Session) -> None:
    with pytest.raises(SessionEnded) as ended:
        await run(session, "echo bye; exit 3")
    assert ended.value.exit_code == 3 and ended.value.finished
    assert ended.value.finished.stdout.data == b"bye\n"
    with pytest.raises((SessionEnded, AgentError)):
        await run(session, "echo no")


async def test_output_as_it_comes(session: Session) -> None:
    chunks: list[Chunk] = []
    done = await session.run("echo a; sleep 0.1; echo b >&2", timeout_s=20, on_output=chunks.append)
    assert chunks == [Chunk(1, 0, b"a\n"), Chunk(2, 0, b"b\n")] and done.stdout.data == b"a\n"


async def test_background_jobs_speak_to_whoever_reads(session: Session) -> None:
    await run(session, "(sleep 0.3; echo late) &")
    assert await said(session, "sleep 1; echo now") == b"late\nnow\n"
    await run(session, "(head -c 300000 /dev/zero; echo done >&2) & wait; :")
    done = await run(session, "echo alive")
    assert done.stdout.data.endswith(b"alive\n")


async def test_output_is_bounded(session: Session) -> None:
    done = await session.run("echo start; head -c 3000000 /dev/zero; echo end", timeout_s=20, max_output=1000)
    assert done.stdout.total == 3_000_010 and len(done.stdout.data) == 1000
    assert done.stdout.data.startswith(b"start\n") and done.stdout.data.endswith(b"end\n")


async def test_redirections_of_a_command_do_not_outlive_it(session: Session) -> None:
    await run(session, "exec >/dev/null 2>&1 </dev/zero")
    assert await said(session, "echo alive; cat") == b"alive\n"


async def test_closing_takes_its_background_jobs_along(sandbox: Sandbox, session: Session) -> None:
    await run(session, "setsid sleep 777 & sleep 778 &")
    await session.close()
    assert await sandbox.processes() == []


async def test_sessions_do_not_know_each_other(sandbox: Sandbox) -> None:
    many = [await sandbox.agent.open_session(cwd="/tmp", env={"WHO": str(n)}) for n in range(5)]
    await asyncio.gather(*(run(one, f"x={n}; cd /") for n, one in enumerate(many)))
    said_all = await asyncio.gather(*(said(one, 'echo "$x $WHO $PWD"') for one in many))
    assert said_all == [b"%d %d /\n" % (n, n) for n in range(5)]
    await asyncio.gather(*(run(one, "sleep 0.1", 5) for one in many))
    for one in many:
        await one.close()


async def test_default_is_bash_and_a_missing_shell_is_said(sandbox: Sandbox) -> None:
    session = await sandbox.agent.open_session()
    assert await said(session, "[[ -n $BASH_VERSION ]] && echo bash") == b"bash\n"
    with pytest.raises(AgentError, match="no such shell"):
        await sandbox.agent.open_session(shell="/bin/no-such-shell")  # noqa: S604 - the name of a program
    with pytest.raises(AgentError, match="working directory"):
        await sandbox.agent.open_session(cwd="/nonexistent")


async def test_on_a_terminal(sandbox: Sandbox) -> None:
    session = await sandbox.agent.open_session(pty=(90, 30))
    assert await said(session, "stty size; test -t 0 && echo tty") == b"30 90\ntty\n"
    done = await session.run("read x; echo [$x]", timeout_s=0.2, on_timeout="leave")
    assert done.timed_out
    await session.send(b"typed\n")
    assert (await session.rest(10)).stdout.data == b"[typed]\n"
    await session.resize(70, 20)
    assert await said(session, "stty size") == b"20 70\n"
    done = await interrupted(session, "echo on; sleep 100; echo next")
    assert done.exit_code == 130 and b"next" not in done.stdout.data
    await session.run("sleep 100 & jobs; kill %1; fg", timeout_s=5)
    assert await said(session, "echo alive") == b"alive\n"


async def test_a_terminals_output_belongs_to_its_command(sandbox: Sandbox) -> None:
    """A terminal hands on what was written to it a moment later; no byte of it may be late."""
    session = await sandbox.agent.open_session(pty=(90, 30))
    for turn in range(60):
        size = 1 + turn * 577
        done = await session.run(f"head -c {size} /dev/zero | tr '\\0' x; printf %s end{turn}", timeout_s=10)
        assert done.stdout.data == b"x" * size + f"end{turn}".encode()


async def test_no_terminal_is_no_wait(session: Session) -> None:
    done = await run(session, "read x </dev/tty; echo $x", timeout_s=5)
    assert not done.timed_out and done.stderr.data


async def test_forged_results_stay_in_the_session(sandbox: Sandbox) -> None:
    victim, forger = [await sandbox.agent.open_session() for _ in range(2)]
    task = asyncio.create_task(run(victim, "sleep 0.5; echo true"))
    await run(forger, 'for n in 0 1 2 3 4 5 999; do echo "9 $n"; done >/proc/self/fd/243')
    await run(forger, "yes x | head -c 9999 >/proc/self/fd/243")
    assert (await task).exit_code == 0 and (await task).stdout.data == b"true\n"
    reach = "for p in /proc/[0-9]*/fd/243; do echo 9 1 > $p; done; ls /proc/1/fd; cat /proc/1/environ"
    assert b"ermission denied" in (await run(forger, reach)).stderr.data or os.geteuid() == 0
    assert await said(victim, "echo alive") == b"alive\n"
