"""What the kernel offers to a process that wants out: namespaces, /proc, other processes, system calls."""

from __future__ import annotations

import pytest

from .kit import Field, attempt, refused

pytestmark = [pytest.mark.escape, pytest.mark.container]

FILTER = "the agent's system-call filter; no CAP_SYS_ADMIN"


@attempt("mount", "mount tmpfs, bind /proc elsewhere, remount the agent writable, open_tree, fsopen", FILTER)
async def test_mount(field: Field) -> str:
    code = """
os.makedirs('/m', exist_ok=True)
print(call('mount', b'none', b'/m', b'tmpfs', 0, 0), call('mount', b'/proc', b'/m', b'none', 0x1000, 0),
      call('mount', b'none', b'/.orchestrate/agent', b'none', 0x1020, 0), call('umount2', b'/proc', 2),
      call('open_tree', -100, b'/', 1), call('fsopen', b'ext4', 0), call('mount_setattr', -100, b'/', 0, 0, 0))
"""
    return refused(await field.python(code))


@attempt(
    "new namespaces", "unshare, clone and clone3 with CLONE_NEWUSER, NEWNS, NEWNET, NEWPID, NEWCGROUP",
    "the agent's system-call filter",
)  # fmt: skip
async def test_namespaces(field: Field) -> str:
    code = """
kinds = (0x10000000, 0x20000, 0x40000000, 0x20000000, 0x02000000, 0x10020000)
print(*(call('unshare', kind) for kind in kinds), *(call('clone', kind | 17, 0, 0, 0, 0) for kind in kinds))
arguments = (ctypes.c_uint64 * 8)(0x10000000, 0, 0, 0, 17)
print(call('clone3', ctypes.byref(arguments), 64))
"""
    return refused(await field.python(code))


@attempt("enter another namespace", "setns into every namespace of PID 1, by path and by pidfd", FILTER)
async def test_setns(field: Field) -> str:
    code = """
print(*(tried(lambda: os.open(f'/proc/1/ns/{name}', os.O_RDONLY)) for name in os.listdir('/proc/self/ns')))
print(call('setns', os.open('/proc/self/ns/mnt', os.O_RDONLY), 0), call('setns', libc.syscall(434, 1, 0), 0x20000))
"""
    return refused(await field.python(code))


@attempt(
    "write to /proc/sys", "hostname, ip_forward, overcommit_memory, randomize_va_space, ns_last_pid",
    "/proc/sys is read-only",
)  # fmt: skip
async def test_proc_sys(field: Field) -> str:
    code = """
for name in ('kernel/hostname', 'net/ipv4/ip_forward', 'vm/overcommit_memory', 'kernel/randomize_va_space',
             'kernel/ns_last_pid', 'kernel/modprobe'):
    print(write('/proc/sys/' + name, '1'))
"""
    return refused(await field.python(code))


@attempt(
    "core_pattern", "write a pipe into /proc/sys/kernel/core_pattern, then crash",
    "/proc/sys is read-only; the limit of core files is 0",
)  # fmt: skip
async def test_core_pattern(field: Field) -> str:
    code = """
import resource
print(write('/proc/sys/kernel/core_pattern', '|/bin/sh -c id>/owned %p'))
assert resource.getrlimit(resource.RLIMIT_CORE) == (0, 0)
print(tried(lambda: resource.setrlimit(resource.RLIMIT_CORE, (1 << 20, 1 << 20))) if os.getuid() else 'EPERM')
pid = os.fork()
if pid == 0:
    os.abort()
assert not os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) >= 0 and not os.path.exists('/owned')
"""
    return refused(await field.python(code))


@attempt("sysrq", "write b and c into /proc/sysrq-trigger", "/proc/sysrq-trigger is read-only")
async def test_sysrq(field: Field) -> str:
    return refused(await field.python("print(write('/proc/sysrq-trigger', 'h'))"))


@attempt("kernel modules", "init_module, finit_module, delete_module", "no CAP_SYS_MODULE; the filter")
async def test_modules(field: Field) -> str:
    code = "print(call('init_module', b'', 0, b''), call('finit_module', 0, b'', 0), call('delete_module', b'ext4', 0))"
    return refused(await field.python(code))


@attempt(
    "ptrace of the agent", "PTRACE_ATTACH, PTRACE_SEIZE, process_vm_readv and pidfd_getfd on PID 1",
    "the agent is not dumpable; no CAP_SYS_PTRACE",
)  # fmt: skip
async def test_ptrace(field: Field) -> str:
    code = """
buffer = ctypes.create_string_buffer(64)
class Piece(ctypes.Structure):
    _fields_ = (('base', ctypes.c_void_p), ('size', ctypes.c_size_t))
ours, theirs = Piece(ctypes.addressof(buffer), 64), Piece(0x400000, 64)
print(call('ptrace', 16, 1, 0, 0), call('ptrace', 0x4206, 1, 0, 0),
      call('process_vm_readv', 1, ctypes.byref(ours), 1, ctypes.byref(theirs), 1, 0),
      *(call('pidfd_getfd', libc.syscall(434, 1, 0), number, 0) for number in range(3, 9)))
"""
    return f"{refused(await field.python(code))}; {await field.lives()}"


@attempt(
    "ptrace of what waits for the next command", "ptrace, process_vm_readv, mem, environ and fd of every process",
    "the agent's children are as little dumpable as the agent, until they become a command",
)  # fmt: skip
async def test_ptrace_of_supervisors(field: Field) -> str:
    await field.python("print('a supervisor stays after this')")
    code = """
buffer = ctypes.create_string_buffer(64)
class Piece(ctypes.Structure):
    _fields_ = (('base', ctypes.c_void_p), ('size', ctypes.c_size_t))
ours, theirs = Piece(ctypes.addressof(buffer), 64), Piece(0x400000, 64)
others = [int(name) for name in os.listdir('/proc') if name.isdigit() and int(name) != os.getpid()]
assert len(others) > 1, others
for other in others:
    print(call('ptrace', 16, other, 0, 0), call('ptrace', 0x4206, other, 0, 0),
          call('process_vm_readv', other, ctypes.byref(ours), 1, ctypes.byref(theirs), 1, 0),
          *(call('pidfd_getfd', libc.syscall(434, other, 0), number, 0) for number in range(8)),
          *(read(f'/proc/{other}/{name}') for name in ('mem', 'environ', 'maps')))
"""
    return f"{refused(await field.python(code))}; {await field.lives()}"


@attempt(
    "/proc/1", "read mem, environ, maps, auxv, fd, root, cwd, exe, syscall, stack of the agent",
    "the agent is not dumpable",
)  # fmt: skip
async def test_proc_1(field: Field) -> str:
    code = """
for name in ('mem', 'environ', 'maps', 'auxv', 'syscall', 'stack', 'io'):
    print(read('/proc/1/' + name))
for number in os.listdir('/proc/1/fd'):
    print(tried(lambda: os.readlink('/proc/1/fd/' + number)), read('/proc/1/fd/' + number))
print(tried(lambda: os.listdir('/proc/1/root/')), tried(lambda: os.readlink('/proc/1/exe')),
      tried(lambda: os.readlink('/proc/1/cwd')))
"""
    return refused(await field.python(code))


@attempt(
    "kill or stop the agent",
    "all 64 signals to PID 1, by kill, tgkill and pidfd",
    "it is PID 1 of its namespace",
)
async def test_kill_agent(field: Field) -> str:
    code = """
for number in range(1, 65):
    for target in (lambda: os.kill(1, number), lambda: libc.syscall(234, 1, 1, number)):
        tried(target)
print('sent')
"""
    assert "sent" in await field.python(code)
    return await field.lives()


@attempt("keyrings", "add a key to the user keyring, look for it from another sandbox", "the agent's filter")
async def test_keyrings(field: Field) -> str:
    code = """
print(call('add_key', b'user', b'orc', b'secret', 6, -4), call('keyctl', 0, -4, 1), call('keyctl', 1, 0),
      call('request_key', b'user', b'orc', 0, 0))
"""
    return refused(await field.python(code))


@attempt(
    "bpf, perf, userfaultfd",
    "bpf(MAP_CREATE), perf_event_open, userfaultfd",
    "no capabilities; the agent's filter",
)
async def test_tracing(field: Field) -> str:
    code = """
zero = ctypes.create_string_buffer(128)
print(call('bpf', 0, zero, 128), call('perf_event_open', zero, 0, -1, -1, 0), call('userfaultfd', 0),
      call('userfaultfd', 1))
"""
    return refused(await field.python(code))


@attempt("io_uring", "io_uring_setup", "the agent's filter: not there, so that programs fall back")
async def test_io_uring(field: Field) -> str:
    return refused(await field.python("print(call('io_uring_setup', 8, ctypes.create_string_buffer(120)))"))


@attempt(
    "foreign system calls", "getpid as i386 (int 0x80) and as x32, from a page of machine code",
    "the agent's filter: i386 ends the process, x32 is not there",
)  # fmt: skip
async def test_foreign(field: Field) -> str:
    code = """
import mmap, signal
if ARM:
    print('ENOSYS')
    raise SystemExit
page = mmap.mmap(-1, 4096, prot=7)
page.write(bytes.fromhex('b814000000cd80c3'))  # mov eax, 20; int 0x80; ret
address = ctypes.addressof(ctypes.c_char.from_buffer(page))
pid = os.fork()
if pid == 0:
    os._exit(7 if ctypes.CFUNCTYPE(ctypes.c_int)(address)() > 0 else 8)
status = os.waitpid(pid, 0)[1]
print('SIGSYS' if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGSYS else f'status-{status}')
print(outcome(libc.syscall(0x40000000 + 39)))
"""
    return refused(await field.python(code), "SIGSYS")
