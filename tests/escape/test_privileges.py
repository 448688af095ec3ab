"""What a process that wants out may become, and what of the machine it can reach: devices, cgroups, clock,
rights, its own name and terminal."""

from __future__ import annotations

import pytest

from .kit import PRELUDE, Field, attempt, refused

pytestmark = [pytest.mark.escape, pytest.mark.container]


@attempt(
    "device nodes", "mknod of the disk and of memory; open /dev/{mem,kmsg,fuse,kvm,vda,loop-control}",
    "no CAP_MKNOD; an empty /dev; nodev",
)  # fmt: skip
async def test_devices(field: Field) -> str:
    code = """
import stat
for major, minor in ((254, 0), (8, 0), (1, 1), (10, 229)):
    print(tried(lambda: os.mknod(f'/d{major}', 0o666 | stat.S_IFBLK, os.makedev(major, minor))),
          tried(lambda: os.mknod(f'/c{major}', 0o666 | stat.S_IFCHR, os.makedev(major, minor))))
for name in ('mem', 'kmem', 'port', 'kmsg', 'fuse', 'kvm', 'vda', 'sda', 'loop-control', 'vhost-vsock', 'vsock'):
    print(read('/dev/' + name))
"""
    return refused(await field.python(code))


@attempt(
    "cgroup escape", "release_agent, notify_on_release, devices.allow, memory.max of our own and of parent groups",
    "cgroups are mounted read-only; no mounts",
)  # fmt: skip
async def test_cgroups(field: Field) -> str:
    code = """
names = ('release_agent', 'notify_on_release', 'devices.allow', 'memory.max', 'memory.limit_in_bytes', 'pids.max',
         'cgroup.procs', 'tasks', 'cgroup.subtree_control')
found = [os.path.join(top, name) for top, _, files in os.walk('/sys/fs/cgroup') for name in files if name in names]
print(*(write(path, '1') for path in found), *(tried(lambda: os.mkdir(path)) for path in {os.path.dirname(p) + '/x' for p in found}))
print(call('mount', b'cgroup', b'/mnt', b'cgroup', 0, b'memory'), call('mount', b'c', b'/mnt', b'cgroup2', 0, 0))
"""
    return refused(await field.python(code))


@attempt(
    "kernel's own files",
    "debugfs, tracefs, kcore, kallsyms, kmsg, dmesg, keys, efivars",
    "masked; the filter",
)
async def test_kernel_files(field: Field) -> str:
    code = """
def empty(path):  # what is masked is there and holds nothing
    try:
        return not (os.listdir(path) if os.path.isdir(path) else open(path, 'rb').read(64))
    except OSError:
        return True
for path in ('/sys/kernel/debug', '/sys/kernel/tracing', '/proc/kcore', '/sys/firmware', '/proc/keys',
             '/proc/latency_stats', '/proc/timer_list', '/proc/sched_debug', '/proc/scsi', '/proc/acpi',
             '/dev/kmsg', '/proc/kmsg', '/sys/kernel/security'):
    assert empty(path), path
symbols = open('/proc/kallsyms').readline().split()
assert not symbols or int(symbols[0], 16) == 0, symbols
print(call('syslog', 3, ctypes.create_string_buffer(64), 64), call('syslog', 10, 0, 0))
"""
    return f"empty; dmesg {refused(await field.python(code))}"


@attempt("the clock", "settimeofday, clock_settime, `date -s`", "no CAP_SYS_TIME; the filter")
async def test_clock(field: Field) -> str:
    code = """
time = (ctypes.c_long * 2)(0, 0)
print(call('settimeofday', time, 0), call('clock_settime', 0, time))
"""
    assert "cannot set date" in await field.says("date -s '2001-01-01'")
    return refused(await field.python(code))


@attempt("reboot, swap, kexec, accounting", "each of those system calls", "no capabilities; the filter")
async def test_reboot(field: Field) -> str:
    code = """
print(call('reboot', 0xfee1dead, 672274793, 0x89abcdef, 0), call('swapon', b'/m', 0), call('swapoff', b'/m'),
      call('kexec_load', 0, 0, 0, 0), call('acct', b'/a'), call('quotactl', 0, 0, 0, 0))
"""
    return refused(await field.python(code))


@attempt(
    "setuid binary",
    "a setuid-root copy of a program, run as uid 1000",
    "no new privileges: the bit means nothing",
)
async def test_setuid(field: Field) -> str:
    code = """
import shutil, subprocess
shutil.copy('/usr/bin/id', '/usr/bin/owned')
os.chmod('/usr/bin/owned', 0o6755)
pid = os.fork()
if pid == 0:
    os.setgid(1000); os.setuid(1000)
    os.execv('/usr/bin/owned', ['owned', '-u'])
os.waitpid(pid, 0)
"""
    said = await field.python(code)
    assert said == "1000", said
    return "the effective user stays 1000"


@attempt(
    "file capabilities", "security.capability on a program, all of them, as root and as uid 1000",
    "no new privileges; the bounding set",
)  # fmt: skip
async def test_file_capabilities(field: Field) -> str:
    code = """
import shutil, struct
shutil.copy('/bin/cat', '/usr/bin/able')
value = struct.pack('<5I', 0x02000001, 0xffffffff, 0, 0xffffffff, 0)
print(tried(lambda: os.setxattr('/usr/bin/able', 'security.capability', value)), flush=True)
pid = os.fork()
if pid == 0:
    os.setgid(1000); os.setuid(1000)
    os.execv('/usr/bin/able', ['able', '/proc/self/status'])
os.waitpid(pid, 0)
"""
    said = await field.python(code)
    words = said.split()
    held = [] if "CapEff:" not in words else [int(words[words.index("CapEff:") + 1], 16)]
    assert held in ([0], []), said  # none, or a program that did not start
    return f"setting them: {words[0]}; held afterwards: none"


@attempt("capabilities", "what a root process in the sandbox may hold at most", "all dropped but six")
async def test_bounding_set(field: Field) -> str:
    said = await field.says("grep -E 'CapBnd|CapEff|NoNewPrivs|Seccomp:' /proc/self/status")
    words = said.split()
    bounding = int(words[words.index("CapBnd:") + 1], 16)
    allowed = (
        1 << 0 | 1 << 1 | 1 << 3 | 1 << 5 | 1 << 6 | 1 << 7
    )  # CHOWN DAC_OVERRIDE FOWNER KILL SETGID SETUID
    assert bounding & ~allowed == 0, said
    assert words[words.index("NoNewPrivs:") + 1] == "1" and words[words.index("Seccomp:") + 1] == "2"
    return f"bounding set {bounding:x}, no new privileges, seccomp on"


@attempt(
    "raise limits", "nproc, nofile, memlock above the hard limit; nice -20; SCHED_FIFO; oom_score_adj -1000",
    "no CAP_SYS_RESOURCE, no CAP_SYS_NICE",
)  # fmt: skip
async def test_limits(field: Field) -> str:
    code = """
import resource
def raised(kind):
    hard = resource.getrlimit(kind)[1]
    if hard == resource.RLIM_INFINITY:
        return 'EPERM'
    try:
        resource.setrlimit(kind, (hard, hard + 1))
        return 'done'
    except (ValueError, OSError):
        return 'EPERM'
print(raised(resource.RLIMIT_NPROC), raised(resource.RLIMIT_NOFILE), tried(lambda: os.nice(-20)),
      tried(lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50))),
      write('/proc/self/oom_score_adj', '-1000'))
"""
    return refused(await field.python(code))


@attempt(
    "a name that misleads", "a process named `) R 1 (`, a command line like the engine's own",
    "the parent is read after the last bracket; nothing is ended by name",
)  # fmt: skip
async def test_renamed(field: Field) -> str:
    code = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
for name in (b') R 1 (', b'podman', b'agent', b'a\\nb'):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            libc.prctl(15, name, 0, 0, 0)
            time.sleep(600)
        os._exit(0)
time.sleep(600)
"""
    done = await field.bad.exec(["python3", "-c", f"{PRELUDE}\n{code}"], timeout_s=2)
    assert done.timed_out
    left = await field.says("ls /proc | grep -c '^[0-9]' ; cat /proc/[0-9]*/comm | tr '\\n' ' '")
    assert "podman" not in left and ")" not in left, left
    return "all ended at the command's time limit"


@attempt("typing into a terminal", "TIOCSTI and TIOCLINUX on a terminal of its own", "the agent's filter")
async def test_tiocsti(field: Field) -> str:
    code = """
import fcntl, pty
pid, master = pty.fork()
if pid == 0:
    results = [tried(lambda: fcntl.ioctl(0, number, b'x')) for number in (0x5412, 0x541c)]
    os._exit(0 if all(r in ('EPERM', 'EIO', 'ENOTTY') for r in results) else 1)
print('EPERM' if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0 else 'typed')
"""
    return refused(await field.python(code))


@attempt(
    "file handles", "open_by_handle_at of inode 2, the host's root", "no CAP_DAC_READ_SEARCH; the filter"
)
async def test_handles(field: Field) -> str:
    code = """
import struct
handle = ctypes.create_string_buffer(struct.pack('<IIQ', 8, 1, 2), 32)
print(call('open_by_handle_at', os.open('/', os.O_RDONLY), handle, 0),
      call('name_to_handle_at', -100, b'/', handle, handle, 0))
"""
    return refused(await field.python(code))


@attempt("chroot", "chroot and .. out of it, pivot_root", "no CAP_SYS_CHROOT; the filter")
async def test_chroot(field: Field) -> str:
    code = (
        "os.makedirs('/x/y', exist_ok=True); print(call('chroot', b'/x'), call('pivot_root', b'/x', b'/x/y'))"
    )
    return refused(await field.python(code))


@attempt(
    "replace the agent", "write, rename, unlink, link over /.orchestrate/agent, also through /proc/self/exe of a child",
    "a read-only mount, whose point cannot be moved",
)  # fmt: skip
async def test_replace_agent(field: Field) -> str:
    code = """
agent = '/.orchestrate/agent'
print(tried(lambda: os.open(agent, os.O_WRONLY)), tried(lambda: os.unlink(agent)), tried(lambda: os.chmod(agent, 0)),
      tried(lambda: os.rename(agent, '/gone')), tried(lambda: os.rename('/bin/sh', agent)),
      tried(lambda: os.rmdir('/.orchestrate/io')), tried(lambda: os.mknod('/.orchestrate/io/agent.sock', 0o140777)))
"""
    return f"{refused(await field.python(code), 'EBUSY', 'EXDEV', 'ETXTBSY')}; {await field.lives()}"
