"""Reaching what is not the sandbox: the server, the host, the cloud, a neighbour."""

from __future__ import annotations

import asyncio
import socket

import pytest

from runtime_server.client import BoundSandbox
from runtime_server.wire import CreateSandbox, Network

from .kit import Field, attempt, refused

pytestmark = [pytest.mark.escape, pytest.mark.container]

NONE = "a network namespace without any interface but loopback"
DIAL = """
import socket
def dial(host, port, kind=socket.SOCK_STREAM, family=None):
    family = family or (socket.AF_INET6 if ':' in host else socket.AF_INET)
    with socket.socket(family, kind) as one:
        one.settimeout(3)
        return tried(lambda: one.connect((host, port)))
"""
UNREACHABLE = ("ENETUNREACH", "ECONNREFUSED", "EHOSTUNREACH", "EADDRNOTAVAIL")


def _addresses() -> list[str]:
    """Of this machine, as somebody outside would use them."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
            return ["127.0.0.1", probe.getsockname()[0]]
        except OSError:
            return ["127.0.0.1"]


@attempt("the server's API", "connect to its port on loopback and on the node's address", NONE)
async def test_api(field: Field) -> str:
    port = field.world.server.url.rpartition(":")[2]
    dials = ", ".join(f"dial({host!r}, {port})" for host in [*_addresses(), "::1", "10.0.2.2", "169.254.1.2"])
    return refused(await field.python(f"{DIAL}\nprint({dials})"), *UNREACHABLE)


@attempt("ports of the host", "a listener of this machine, ssh, Slurm's, and a scan of loopback", NONE)
async def test_host_ports(field: Field) -> str:
    with socket.create_server(("0.0.0.0", 0)) as listener:
        port = listener.getsockname()[1]
        dials = ", ".join(f"dial({host!r}, {port})" for host in _addresses())
        code = (
            f"{DIAL}\nprint({dials}, *(dial('127.0.0.1', p) for p in range(1, 1024)), dial('10.0.2.2', 22))"
        )
        return refused(await field.python(code), *UNREACHABLE)


@attempt("metadata", "169.254.169.254, fd00:ec2::254, metadata.google.internal", NONE)
async def test_metadata(field: Field) -> str:
    code = f"""{DIAL}
try:
    socket.getaddrinfo('metadata.google.internal', 80)
    print('resolved')
except OSError:
    print('ENETUNREACH')
print(dial('169.254.169.254', 80), dial('fd00:ec2::254', 80), dial('1.1.1.1', 53, socket.SOCK_DGRAM))
"""
    return refused(await field.python(code), *UNREACHABLE)


@attempt(
    "raw and odd sockets", "AF_PACKET, raw IP, vsock to the machine's host, AF_ALG, TIPC, netlink routes",
    "the agent's filter of socket families; no CAP_NET_RAW, no CAP_NET_ADMIN",
)  # fmt: skip
async def test_raw(field: Field) -> str:
    code = """
import socket, struct
for family, kind in ((17, 3), (2, 3), (10, 3), (40, 1), (38, 5), (30, 1), (31, 3), (29, 3), (44, 3), (21, 5)):
    print(tried(lambda: socket.socket(family, kind, 1 if kind == 3 and family in (2, 10) else 0)))
link = socket.socket(16, 3, 0)
link.send(struct.pack('=IHHII', 32, 16, 5, 1, 0) + struct.pack('=BxHiII', 0, 0, 1, 0, 1))
print(errno.errorcode[-struct.unpack_from('=i', link.recv(4096), 16)[0]])
"""
    return refused(await field.python(code))


@attempt(
    "another sandbox", "its TCP port, abstract socket, shared memory, files in /tmp, process numbers",
    "namespaces of its own: network, IPC, processes, mounts",
)  # fmt: skip
async def test_neighbour(field: Field) -> str:
    async with field.client.sandbox() as other:
        serve = """
import socket, time
tcp = socket.create_server(('127.0.0.1', 7777)); one = socket.socket(socket.AF_UNIX); one.bind('\\0secret'); one.listen()
libc.shmget(4242, 4096, 0o1666); open('/dev/shm/secret', 'w').write('x'); open('/tmp/secret', 'w').write('x')
libc.prctl(15, b'neighbour-0', 0, 0, 0)
print('up', flush=True)
if os.fork() == 0:
    [os.close(number) for number in (0, 1, 2)]
    time.sleep(600)
"""
        assert await field.python(serve, on=other) == "up"
        code = f"""{DIAL}
print(dial('127.0.0.1', 7777))
one = socket.socket(socket.AF_UNIX)
print(tried(lambda: one.connect('\\0secret')), read('/dev/shm/secret'), read('/tmp/secret'))
print(outcome(libc.shmget(4242, 4096, 0)))
names = [open(f'/proc/{{pid}}/comm').read() for pid in os.listdir('/proc') if pid.isdigit()]
assert not any('neighbour-0' in name for name in names), names
"""
        return refused(await field.python(code), *UNREACHABLE)


@attempt("processes of the host", "list /proc, signal every process number", "a process namespace of its own")
async def test_host_processes(field: Field) -> str:
    code = """
pids = [int(p) for p in os.listdir('/proc') if p.isdigit()]
lines = [open(f'/proc/{p}/cmdline').read() for p in pids if p != os.getpid()]
assert len(pids) < 12 and not any('runtime_server' in l or 'podman' in l or 'conmon' in l or 'init' == l for l in lines), lines
for pid in range(2, 70_000):
    if pid not in pids:
        assert tried(lambda: os.kill(pid, 0)) == 'ESRCH'
print(len(pids), 'processes seen, its own')
"""
    said = await field.python(code, timeout_s=60)
    assert said.endswith("its own"), said
    return said


@attempt(
    "forged agent", "look for its socket, bind one in its place, connect a second time, guess abstract names",
    "the socket is unlinked once connected, its directory is read-only, peers are checked by process id",
)  # fmt: skip
async def test_forged_agent(field: Field) -> str:
    code = """
import socket
assert os.listdir('/.orchestrate/io') == [], os.listdir('/.orchestrate/io')
one = socket.socket(socket.AF_UNIX)
print(tried(lambda: one.connect('/.orchestrate/io/agent.sock')), tried(lambda: one.bind('/.orchestrate/io/agent.sock')))
lines = open('/proc/net/unix').read().splitlines()[1:]
print(*(tried(lambda: socket.socket(socket.AF_UNIX).connect(line.split()[7])) for line in lines if len(line.split()) > 7))
"""
    return f"{refused(await field.python(code), 'ECONNREFUSED')}; {await field.lives()}"


@attempt(
    "agent frames as output", "a program writes frames of the protocol, huge and cut, to its outputs",
    "output is data: a frame of its own, with a length",
)  # fmt: skip
async def test_frames_in_output(field: Field) -> str:
    code = """
import struct
for kind in range(256):
    os.write(1, struct.pack('<IBI', 5, kind, 1)); os.write(2, struct.pack('<IBI', 0xffffffff, kind, 0))
os.write(1, struct.pack('<IBIi', 13, 68, 1, 0) * 1000)
"""
    done = await field.bad.exec(["python3", "-c", f"import os\n{code}"])
    assert done.exit_code == 0 and done.stdout.total == 256 * 9 + 13 * 1000 and done.stderr.total == 256 * 9
    return await field.lives()


@attempt(
    "forged results",
    "a program that ends with another's exit code, output and time",
    "the kernel reports the end",
)
async def test_forged_results(field: Field) -> str:
    good = asyncio.ensure_future(field.bad.exec("sleep 1; echo true; exit 4"))
    code = """
for pid in os.listdir('/proc'):
    if pid.isdigit() and int(pid) not in (1, os.getpid()):
        for number in '12':
            write(f'/proc/{pid}/fd/{number}', 'forged')
"""
    await field.python(code)
    done = await good
    assert done.exit_code == 4 and "true" in done.stdout.text
    return "exit codes stay; processes of one sandbox can write into each other's pipes, as everywhere"


@attempt("a sandbox that is over", "everything asked of it after its delete", "its id means nothing any more")
async def test_after_delete(field: Field) -> str:
    made = await field.client.create()
    await field.client.delete(made.id)
    async with field.http() as http:
        codes = [
            (await http.post(f"/v1/sandboxes/{made.id}/exec", json={"command": "id"})).status_code,
            (await http.get(f"/v1/sandboxes/{made.id}/files", params={"path": "/etc/passwd"})).status_code,
            (await http.post(f"/v1/sandboxes/{made.id}/kill")).status_code,
        ]
    assert codes == [404, 404, 404]
    await BoundSandbox(field.client, made).delete()
    return "404"


@attempt(
    "out through the proxy", "names and ports off the list, localhost, addresses in every spelling, metadata",
    "an allowlist of names; every address is checked, and the one that was checked is connected",
)  # fmt: skip
async def test_proxy(field: Field) -> str:
    api = field.world.server.url.rpartition(":")[2]
    rules = ["localhost", f"localhost:{api}", socket.gethostname().lower(), "allowed.example"]
    network = Network(
        mode="allowlist", allow=[rule for rule in rules if "." in rule or rule.startswith("localhost")]
    )
    made = await field.client.create(CreateSandbox(network=network))
    targets = [
        "localhost:80",
        f"localhost:{api}",
        f"127.0.0.1:{api}",
        "2130706433:80",
        "0x7f000001:80",
        "[::1]:80",
    ]
    targets += [
        "[::ffff:127.0.0.1]:80",
        "169.254.169.254:80",
        "metadata.google.internal:80",
        "evil.example:443",
    ]
    targets += ["allowed.example:22", "allowed.example.evil:443", "localhost.:80", "LOCALHOST:443"]
    code = f"""
import socket
for target in {targets!r}:
    with socket.create_connection(('127.0.0.1', 3128), 20) as one:
        one.sendall(f'CONNECT {{target}} HTTP/1.1\\r\\n\\r\\n'.encode())
        print(one.recv(100).split()[1].decode())
with socket.create_connection(('127.0.0.1', 3128), 20) as one:
    one.sendall(b'GET http://localhost:{api}/v1/sandboxes HTTP/1.1\\r\\n\\r\\n')
    print(one.recv(100).split()[1].decode())
"""
    said = await field.python(code, timeout_s=60, on=BoundSandbox(field.client, made))
    await field.client.delete(made.id)
    assert set(said.split()) <= {"403", "400", "502"}, said
    return f"{len(targets) + 1} requests: {' '.join(sorted(set(said.split())))}"
