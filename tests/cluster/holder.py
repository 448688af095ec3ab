"""The machine below a test cluster: namespaces, network and private file tree, kept while this process lives.

How to run it
    Cluster (cluster.py) does:  python -S holder.py SPEC.json   as root, with a pipe as stdin.
    When the hosts are up it prints one JSON line, {"control": P, "hosts": {"ctl": 1, "cpu1": N, …}}: P is
    process 1 of the cluster as the machine numbers it, the others are as P numbers them. It ends when
    stdin is closed or one of its two processes is killed.

Who is who
    keeper          this process; waits, and removes the cluster's directory at the end
    └─ ctl          process 1 of a PID namespace: with its end the kernel ends everything below,
       │            and with the last process go all mounts and network interfaces
       └─ cpu1 …    one process 1 per host, in PID, network, UTS, IPC and mount namespaces of its own

What it does not do
    It knows nothing of Slurm but the commands in the specification that each host starts with.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import namespaces as ns

RUN, STAGE = Path("/run"), Path("/run/keep")
KERNEL_FILES = {"proc", "sysfs", "devtmpfs", "devpts", "tmpfs", "cgroup", "cgroup2", "mqueue", "ramfs"}


class Tree:
    """The private view of the file tree. Directories that must stay visible are staged below /run/keep,
    so that they can be put back wherever something is mounted above them."""

    def __init__(self, spec: dict[str, Any]):
        self.spec = spec
        self.root = Path(spec["root"])
        self.kept = [self.root, *(Path(path) for path in spec["visible"])]

    def build(self) -> None:
        """Once, for all hosts: nothing outside of the cluster's directory can be written."""
        ns.detach_from_machine()
        sources = [os.open(path, os.O_PATH) for path in self.kept]  # some may lie below /run
        ns.mount_new("tmpfs", RUN, "mode=755")
        for number, source in enumerate(sources):
            self._stage(number, Path(f"/proc/self/fd/{source}"))
            os.close(source)
        self._freeze()
        ns.bind(STAGE / "0", self.root)  # the only thing on disk that stays writable
        for folder in self.spec["covered"]:
            self.cover(Path(folder), 0o755)
        # As a whole: what is mounted over the file /etc/passwd is gone once somebody adds a user to the
        # machine, because that replaces the file.
        ns.overlay(Path(self.spec["over_etc"]), Path("/etc"))
        ns.bind(Path(self.spec["slurm"]), Path("/etc/slurm"))
        self._devices()

    def _freeze(self) -> None:
        for path, kind, options in ns.mounts():
            if kind not in KERNEL_FILES and "rw" in options and path != STAGE / "0":
                with contextlib.suppress(OSError):  # hidden below another mount, so out of reach anyway
                    ns.read_only(path)

    def _stage(self, number: int, source: Path) -> None:
        place = STAGE / str(number)
        place.mkdir(parents=True)
        ns.bind(source, place)

    def _devices(self) -> None:
        """What sites give to everybody and a bare machine keeps for root."""
        for name, major, minor in (("fuse", 10, 229), ("net/tun", 10, 200)):
            if (target := Path("/dev", name)).exists():
                node = STAGE.parent / name.replace("/", "-")
                os.mknod(node, 0o20666, os.makedev(major, minor))
                node.chmod(0o666)
                ns.bind(node, target)

    def cover(self, folder: Path, mode: int, cover_with: Path | None = None) -> None:
        """Put an empty directory over `folder`, and the kept directories back into it."""
        if cover_with is None:
            ns.mount_new("tmpfs", folder, f"mode={mode:o}")
        else:
            cover_with.mkdir(parents=True, exist_ok=True)
            cover_with.chmod(mode)
            ns.bind(cover_with, folder)
        for number, path in enumerate(self.kept):
            if path.is_relative_to(folder):
                path.mkdir(parents=True, exist_ok=True)
                ns.bind(STAGE / str(number), path)

    def own_places(self, node: str) -> None:
        """What no two hosts share."""
        self.cover(Path("/tmp"), 0o1777)
        self.cover(Path("/var/tmp"), 0o1777, STAGE / "0" / "nodes" / node / "var-tmp")
        self.cover(Path("/dev/shm"), 0o1777)
        users = RUN / "user"
        users.mkdir(exist_ok=True)
        ns.mount_new("tmpfs", users, "mode=755")
        own = users / str(self.spec["uid"])
        own.mkdir(mode=0o700)
        os.chown(own, self.spec["uid"], self.spec["gid"])


def kernel_files() -> None:
    """/proc of this PID namespace, /sys of this network namespace with the control groups put back, which
    belong to the whole machine: read-only, or groups made in here would outlive us."""
    ns.mount_new("proc", Path("/proc"))
    groups, place = Path("/sys/fs/cgroup"), RUN / "cgroup"
    place.mkdir(exist_ok=True)
    ns.bind(groups, place, recursive=True)
    ns.mount_new("sysfs", Path("/sys"))
    ns.bind(place, groups, recursive=True)
    ns.unmount(place)
    for path in {path for path, _, _ in ns.mounts() if path.is_relative_to(groups)}:
        ns.read_only(path)


def ip(*lines: str) -> None:
    subprocess.run(["ip", "-batch", "-"], input="\n".join(lines) + "\n", text=True, check=True)


def start(commands: list[list[str]], environment: dict[str, str]) -> None:
    for argv in commands:
        subprocess.run(argv, env=environment, stdin=subprocess.DEVNULL, stdout=2, check=True)


def reap_for_ever() -> NoReturn:
    """What process 1 owes to orphans."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    while True:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        signal.sigwait({signal.SIGCHLD})


def in_new_pid_namespace(flags: int, first_process: Callable[[], NoReturn]) -> int:
    """Run `first_process` as process 1 of new namespaces; its id in the present ones."""
    ns.unshare(flags | ns.PID)
    pid = os.fork()
    if pid == 0:
        first_process()
    return pid


def boot(tree: Tree, name: str, wired: int, ready: int) -> NoReturn:
    """Process 1 of a host."""
    host = tree.spec["hosts"][name]
    socket.sethostname(name)
    kernel_files()
    tree.own_places(name)
    ns.share_below()
    os.read(wired, 1)
    ip("link set lo up", f"addr add {host['address']}/24 dev eth0", "link set eth0 up")
    start(host["start"], tree.spec["environment"])
    os.write(ready, b"1")
    reap_for_ever()


def fork_host(tree: Tree, name: str, number: int) -> tuple[int, int]:
    """Start a host; (its process id here, a descriptor that tells when it is up)."""
    pids, wired, ready = os.pipe(), os.pipe(), os.pipe()
    if (child := os.fork()) == 0:
        flags = ns.MOUNT | ns.NETWORK | ns.UTS | ns.IPC
        pid = in_new_pid_namespace(flags, lambda: boot(tree, name, wired[0], ready[1]))
        os.write(pids[1], str(pid).encode())
        os._exit(0)
    os.close(pids[1])
    pid = int(os.read(pids[0], 20))
    os.waitpid(child, 0)
    ip(
        f"link add v{number} type veth peer name eth0 netns {pid}",
        f"link set v{number} master bridge up alias {name}",
    )
    os.write(wired[1], b"1")
    os.close(ready[1])  # so that the death of the host reads as end of file
    return pid, ready[0]


def control(spec: dict[str, Any], report: int) -> NoReturn:
    """Process 1 of the cluster, which is also its controller host."""
    ns.die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # for process 1 that means: ignored
    ns.unshare(ns.MOUNT | ns.NETWORK | ns.UTS | ns.IPC)
    socket.sethostname("ctl")
    tree = Tree(spec)
    tree.build()
    kernel_files()
    ip(
        "link set lo up",
        "link add bridge type bridge",
        f"addr add {spec['address']}/24 dev bridge",
        "link set bridge up",
    )
    tree.own_places("ctl")
    start(spec["start"], spec["environment"])
    started = {name: fork_host(tree, name, number) for number, name in enumerate(spec["hosts"])}
    down = [name for name, (_, ready) in started.items() if os.read(ready, 1) != b"1"]
    if down:
        sys.exit(f"these hosts did not come up: {' '.join(down)}")
    os.write(report, json.dumps({"ctl": 1} | {name: pid for name, (pid, _) in started.items()}).encode())
    os.close(report)
    reap_for_ever()


def guarded_control(spec: dict[str, Any], report: int) -> NoReturn:
    """No process of ours may come back up into main() after a fork."""
    try:
        control(spec, report)
    except BaseException as error:  # whatever it was, say it and end the namespace
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(1)


def wait_for_end(control_pid: int) -> None:
    """Until stdin is closed (whoever started us is gone) or process 1 of the cluster is."""
    descriptor = os.pidfd_open(control_pid)
    select.select([sys.stdin, descriptor], [], [])
    with contextlib.suppress(ProcessLookupError):
        os.kill(control_pid, signal.SIGKILL)
    os.waitpid(control_pid, 0)  # returns only once every process below is gone


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    answer, report = os.pipe()
    pid = in_new_pid_namespace(0, lambda: guarded_control(spec, report))
    os.close(report)
    if hosts := os.read(answer, 65536):
        print(json.dumps({"control": pid, "hosts": json.loads(hosts)}), flush=True)
        wait_for_end(pid)
    else:
        os.waitpid(pid, 0)
    shutil.rmtree(spec["root"], ignore_errors=True)


if __name__ == "__main__":
    main()
