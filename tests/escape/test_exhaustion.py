"""Taking everything: processes, memory, disk, descriptors, output. Neighbours and server answer meanwhile."""

from __future__ import annotations

import asyncio

import pytest

from runtime_server.client import BoundSandbox
from runtime_server.errors import SandboxError
from runtime_server.wire import Code, CreateSandbox, Limits

from .kit import PRELUDE, Field, attempt, refused

pytestmark = [pytest.mark.escape, pytest.mark.container]


async def _meanwhile(field: Field, code: str, timeout_s: float = 8.0, on: BoundSandbox | None = None) -> str:
    """Run a noisy program, with the others asked all the while. What it printed, or what became of it."""
    work = asyncio.ensure_future(
        (on or field.bad).exec(["python3", "-c", f"{PRELUDE}\n{code}"], timeout_s=timeout_s)
    )
    while not work.done():
        await field.others_answer()
        await asyncio.wait({work}, timeout=0.2)
    try:
        done = work.result()
    except SandboxError as error:
        return str(error.code)
    note = "oom " if done.oom else "timeout " if done.timed_out else ""
    return note + " ".join((done.stdout.text + done.stderr.text).split())


async def _one(field: Field, **limits: int) -> BoundSandbox:
    made = await field.client.create(CreateSandbox(limits=Limits(**limits)))  # type: ignore[arg-type]
    return BoundSandbox(field.client, made)


@attempt("fork bomb", "fork without end, in sessions of their own", "the limit of processes: `pids`")
async def test_fork_bomb(field: Field) -> str:
    bad = await _one(field, pids=64)
    code = """
import time
while True:
    try:
        if os.fork() == 0:
            os.setsid()
    except BlockingIOError:
        time.sleep(.01)
"""
    said = await _meanwhile(field, code, 4, bad)
    await field.client.delete(bad.id)
    assert said.startswith(("timeout", "sandbox_died")), said
    return f"{said.split()[0]}; the others answered"


@attempt(
    "processes that outlive",
    "setsid, two forks, SIGTERM ignored, output pipe held",
    "the whole tree is killed",
)
async def test_daemon(field: Field) -> str:
    code = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(999)
    os._exit(0)
time.sleep(999)
"""
    assert (await _meanwhile(field, code, 1)).startswith("timeout")
    left = await field.says("cat /proc/[0-9]*/cmdline | tr '\\0' '\\n' | grep -c '[t]ime.sleep'")
    assert left == "0", left
    return "none was left after the time limit"


@attempt(
    "memory balloon",
    "4 GiB of touched memory in a sandbox of 128 MiB",
    "the limit of memory; programs die first",
)
async def test_balloon(field: Field) -> str:
    bad = await _one(field, memory_mb=128)
    said = await _meanwhile(field, "x = [bytearray(os.urandom(1 << 20)) for _ in range(4096)]", 60, bad)
    assert said.startswith("oom"), said
    after = ""
    if said.startswith("oom "):
        after = "; the agent answers: " + (await bad.exec("echo yes")).stdout.text.strip()
        assert after.endswith("yes")
    await field.client.delete(bad.id)
    return f"reason oom{after}"


@attempt("memory in files", "memfd, tmpfs and /dev/shm filled", "sizes of each tmpfs; memory counts them")
async def test_shm(field: Field) -> str:
    code = """
total = 0
mounts = {l.split()[1] for l in open('/proc/mounts') if l.split()[2] == 'tmpfs'}
for top in sorted(mounts):
    try:
        with open(top + '/filled', 'wb') as file:
            for _ in range(4096):
                total += file.write(b'x' * (1 << 20))
    except OSError:
        pass
assert total < 300 << 20, total
print('ENOSPC')
"""
    said = await _meanwhile(field, code, 60)
    assert said in ("ENOSPC", "oom", "sandbox_died") or said.startswith("oom"), said
    return said


@attempt(
    "memory of System V",
    "shared memory segments that nobody has attached, message queues",
    "the limits of its IPC",
)
async def test_sysv(field: Field) -> str:
    bad = await _one(field, memory_mb=256)
    code = """
made = 0
for _ in range(64):
    segment = libc.shmget(0, 16 << 20, 0o1666)
    if segment < 0:
        break
    libc.shmat.restype = ctypes.c_void_p
    where = libc.shmat(segment, None, 0)
    if where in (None, 2 ** 64 - 1):
        break
    ctypes.memset(where, 1, 16 << 20)
    libc.shmdt(ctypes.c_void_p(where))
    made += 16
print('MiB', made)
assert made <= 512
"""
    said = await _meanwhile(field, code, 60, bad)
    await field.client.delete(bad.id)
    assert said.startswith(("oom", "sandbox_died", "MiB")) and "Assertion" not in said, said
    return said


@attempt("descriptors", "open files until none are left", "the limit of open files")
async def test_descriptors(field: Field) -> str:
    code = """
kept = []
while True:
    try:
        kept.append(os.open('/dev/null', os.O_RDONLY))
    except OSError as error:
        print(errno.errorcode[error.errno], len(kept))
        break
"""
    said = await _meanwhile(field, code, 30)
    assert said.split()[0] in ("EMFILE", "ENFILE") and int(said.split()[1]) < 1 << 20, said
    return f"{said} open"


@attempt(
    "output without end", "1 GiB of output, no newline in it", "head and tail are kept, the rest is counted"
)
async def test_output(field: Field) -> str:
    work = asyncio.ensure_future(
        field.bad.exec("head -c 1073741824 /dev/zero", timeout_s=100, max_output=4096)
    )
    while not work.done():
        await field.others_answer()
        await asyncio.wait({work}, timeout=0.3)
    out = work.result().stdout
    assert out.total == 1 << 30 and len(out.raw) == 4096 and out.dropped == (1 << 30) - 4096
    return f"{out.total} bytes counted, {len(out.raw)} kept"


@attempt("a flood of logs", "/dev/kmsg, /proc/1/fd/{1,2}, syslog", "not there, not ours, no log is kept")
async def test_log_flood(field: Field) -> str:
    code = """
print(*(write(path, 'x' * 1000) for path in ('/dev/kmsg', '/proc/1/fd/1', '/proc/1/fd/2', '/dev/console')))
"""
    return refused(await field.python(code), "ENXIO")


@attempt(
    "invalid UTF-8", "every byte, half characters, NUL, in output and in files", "base64 where text is none"
)
async def test_invalid_text(field: Field) -> str:
    done = await field.bad.exec(
        ["python3", "-c", "import os; os.write(1, bytes(range(256)) * 3 + b'\\xe2\\x82')"]
    )
    assert done.stdout.raw == bytes(range(256)) * 3 + b"\xe2\x82" and done.stdout.encoding == "base64"
    await field.bad.exec(["python3", "-c", "import os; os.mkdir(b'/tmp/\\xff\\x1b[31m')"])
    listed = await field.bad.exec("ls /tmp")
    assert b"\xff\x1b[31m" in listed.stdout.raw
    return "byte for byte"


@attempt("programs that ask", "a password from the terminal, stdin, a pager", "no terminal, stdin is empty")
async def test_asking(field: Field) -> str:
    done = await field.bad.exec(
        "cat; read x </dev/tty; git log --help | head -1; su -c id nobody", timeout_s=20
    )
    assert not done.timed_out
    return "all ended by themselves"


@attempt(
    "commands without end",
    "300 commands at once that sleep",
    "the agent's number of commands; each is one's own",
)
async def test_many_commands(field: Field) -> str:
    bad = await _one(field)
    work = [asyncio.ensure_future(bad.exec("sleep 30", timeout_s=2)) for _ in range(300)]
    while not all(task.done() for task in work):
        await field.others_answer()
        await asyncio.wait(work, timeout=0.3)
    ended = [task.exception() or task.result() for task in work]
    refusals = [e for e in ended if isinstance(e, SandboxError)]
    codes = {e.code for e in refusals}
    await field.client.delete(bad.id)
    if field.world.engine == "process" and codes <= {Code.SANDBOX_DIED, Code.TOO_MANY}:
        return "ended: more processes than it may have, and no kernel to hold it; the others answered"
    assert codes <= {Code.FILE_ERROR, Code.TOO_MANY}, refusals[:3]
    return f"{len(ended) - len(refusals)} ran, {len(refusals)} were refused; {await field.lives()}"


async def _fills(field: Field, code: str) -> str:
    bad = await _one(field, disk_mb=64)
    said = await _meanwhile(field, code, 60, bad)
    if said != Code.DISK_FULL:
        said = f"{said}; then {(await field.client.get(bad.id)).reason}"
    await field.client.delete(bad.id)
    return said


@attempt("disk", "10 GiB in one file, of a sandbox that may have 64 MiB", "measured: the sandbox is ended")
async def test_disk(field: Field) -> str:
    code = """
import time
with open('/filled', 'wb') as file:
    for _ in range(640):
        file.write(b'x' * (1 << 24))
        time.sleep(.05)
"""
    said = await _fills(field, code)
    assert said == Code.DISK_FULL, said
    return f"reason {said}"


@attempt(
    "disk, in files without a name", "files that are deleted while they are open", "what is open counts too"
)
async def test_deleted_files(field: Field) -> str:
    code = """
import time
file = open('/var/tmp/x', 'wb'); os.unlink('/var/tmp/x')
for _ in range(640):
    file.write(b'x' * (1 << 24))
    time.sleep(.05)
"""
    said = await _fills(field, code)
    assert said == Code.DISK_FULL, said
    return f"reason {said}"


@attempt("inodes", "a million empty files in nested directories", "measured: the sandbox is ended")
async def test_inodes(field: Field) -> str:
    code = """
for n in range(100):
    os.makedirs(f'/i/{n}/a/b')
    for m in range(10_000):
        os.close(os.open(f'/i/{n}/a/b/{m}', os.O_CREAT))
"""
    said = await _fills(field, code)
    assert said == Code.DISK_FULL, said
    return f"reason {said}"
