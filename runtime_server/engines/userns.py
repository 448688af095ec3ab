"""Runs a command in a user and mount namespace of its own, as its root: what ordinary users have for root.

How to run it
    python runtime_server/engines/userns.py COMMAND [ARGUMENT ...]   the command's exit code is the result
    python runtime_server/engines/userns.py --single COMMAND ...     map this user alone, no subordinate ids
    python runtime_server/engines/userns.py --try-overlay DIR OPTS   inside of it: does overlay work?

What it is
    `podman unshare` without Podman and without the process that it leaves behind to hold the namespace
    open: this process makes the namespaces, a child of it has the ids mapped (newuidmap and newgidmap,
    which are setuid, by /etc/subuid and /etc/subgid; else the one id that needs no help), and then this
    process becomes the command. So the command's pid is the pid that the caller started.
    Half of hybrid cgroups is hidden in it: crun refuses hybrid mode.

What it does not do
    It imports nothing of the project and is started as a file: 20 ms, where a package costs 100. It
    decides nothing: `namespace.py` says which way works on this node.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

NEWNS, NEWUSER = 0x0002_0000, 0x1000_0000
MS_REC, MS_SLAVE = 0x4000, 0x8_0000
PR_SET_PDEATHSIG = 1
UNIFIED = Path("/sys/fs/cgroup/unified")
MAPPING_S = 20.0
FAILED = 125

Ids = list[tuple[int, int]]  # (first, how many), as they are outside


def subordinate(kind: str) -> Ids:
    """This user's subordinate ids; `kind` is "uid" or "gid". From the files, else from the directory."""
    name, number = user(), str(os.getuid())
    try:
        lines = Path(f"/etc/sub{kind}").read_text().split("\n")
    except OSError:
        lines = []
    fields = [line.strip().split(":") for line in lines]
    found = [f[1:] for f in fields if len(f) == 3 and f[0] in (name, number)]
    return _numbers(found) or _numbers(_asked(name, kind))


def user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def _numbers(fields: list[list[str]]) -> Ids:
    return [(int(first), int(count)) for first, count in fields if first.isdigit() and count.isdigit()]


def _asked(name: str, kind: str) -> list[list[str]]:
    """`getsubids` knows what LDAP or SSSD hand out: lines like "0: USER 100000 65536"."""
    if not (program := shutil.which("getsubids")):
        return []
    command = [program, *(["-g"] if kind == "gid" else []), name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=MAPPING_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [line.split() for line in done.stdout.splitlines()]
    return [row[2:] for row in rows if len(row) == 4]


def triples(own: int, more: Ids) -> list[str]:
    """Arguments of newuidmap: this user is root inside, the subordinate ids follow."""
    out, inside = ["0", str(own), "1"], 1
    for first, count in more:
        out += [str(inside), str(first), str(count)]
        inside += count
    return out


def map_ids(pid: int, single: bool) -> None:
    """Map the ids of a process that has just made its user namespace. OSError when it is refused."""
    if single:
        Path(f"/proc/{pid}/setgroups").write_text("deny")
        Path(f"/proc/{pid}/uid_map").write_text(f"0 {os.getuid()} 1")
        Path(f"/proc/{pid}/gid_map").write_text(f"0 {os.getgid()} 1")
        return
    for kind, own in (("uid", os.getuid()), ("gid", os.getgid())):
        command = [f"new{kind}map", str(pid), *triples(own, subordinate(kind))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=MAPPING_S, check=False)
        if done.returncode:
            raise OSError(f"{command[0]} failed: {done.stderr.strip()[-300:]}")


def in_child(work: Callable[[], None]) -> tuple[int, int]:
    """A child that does `work` once it is told to; its pid, and the pipe whose closing tells it."""
    reading, writing = os.pipe()
    if pid := os.fork():
        os.close(reading)
        return pid, writing
    os.close(writing)
    os.read(reading, 1)
    try:
        work()
        os._exit(0)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"userns: {error}", file=sys.stderr, flush=True)
    os._exit(FAILED)


def enter(single: bool) -> None:
    """Make the namespaces and have the ids mapped from outside. OSError says what is not allowed here."""
    me, libc = os.getpid(), ctypes.CDLL(None, use_errno=True)
    child, pipe = in_child(lambda: map_ids(me, single))
    failed = libc.unshare(NEWUSER | NEWNS)
    number = ctypes.get_errno()
    if failed:
        os.kill(child, signal.SIGKILL)
    os.close(pipe)
    _, status = os.waitpid(child, 0)
    if failed:
        raise OSError(number, f"unshare: {os.strerror(number)}")
    if status:
        raise OSError("the ids were not mapped")
    arrange(libc)


def arrange(libc: ctypes.CDLL) -> None:
    """Become root inside; keep mounts to ourselves; die with whoever started this."""
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    if libc.mount(b"none", b"/", None, MS_REC | MS_SLAVE, None):
        raise OSError(ctypes.get_errno(), "mount: this namespace gives no rights (AppArmor?)")
    if (UNIFIED / "cgroup.controllers").exists():
        libc.mount(b"tmpfs", os.fsencode(UNIFIED), b"tmpfs", 0, b"size=4k")


def try_overlay(folder: Path, options: str) -> int:
    """0 when an overlay with its layers in this empty directory can be mounted, changed and unmounted."""
    libc, top = ctypes.CDLL(None, use_errno=True), folder / "m"
    for name in "luwm":
        (folder / name).mkdir()
    (folder / "l" / "a").touch()
    layers = f"lowerdir={folder}/l,upperdir={folder}/u,workdir={folder}/w{options}"
    if libc.mount(b"overlay", os.fsencode(top), b"overlay", 0, layers.encode()):
        return ctypes.get_errno()
    (top / "a").unlink()
    (top / "b").touch()
    return int(libc.umount(os.fsencode(top)))


def main(argv: Sequence[str]) -> int:
    if argv[:1] == ["--try-overlay"]:
        return try_overlay(Path(argv[1]), argv[2])
    single = argv[:1] == ["--single"]
    command = list(argv[single:])
    parent, uid, gid = os.getppid(), os.getuid(), os.getgid()
    try:
        enter(single)
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:
            return FAILED
        names = {"_CONTAINERS_USERNS_CONFIGURED": "done", "_CONTAINERS_ROOTLESS_UID": str(uid)}
        os.environ.update({**names, "_CONTAINERS_ROOTLESS_GID": str(gid)})
        os.execvp(command[0], command)  # noqa: S606 - to become it is what this is for
    except OSError as error:
        print(f"userns: {error}", file=sys.stderr)
        return FAILED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
