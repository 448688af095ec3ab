"""A real Slurm of five hosts on this machine, private to whoever starts it, gone when they leave.

How to use it
    with Cluster() as cluster:
        cluster.run(["sbatch", "--wrap", "hostname"])           # as the user, on the login host
        cluster.run(["ip", "addr"], user=False, node="gpu1")    # as root, on a node
    In tests: the fixture `cluster` (fixtures.py). For people: `make cluster` (__main__.py).

What is in it
    login           submits; no slurmd          cpu1, cpu2      partition test (the default)
    ctl             munge, slurmctld            gpu1, gpu2      partitions gpu_test and gpu_low, gpu:2 each
    Hosts have a network stack, host name, process ids, /tmp, /var/tmp, /dev/shm and /run/user of their own.
    `cluster.shared` and the user's home are the same directories on every host. All else of the machine
    is read-only. The user (`researcher`) exists only in there, with subordinate ids for rootless Podman.

What it does not do
    No outside network, no CPU binding, no control groups per job, no real GPU. It needs root, and the
    Debian packages slurm-wlm, munge and iproute2 (make setup installs them).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pwd
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from signal import SIGKILL, SIGTERM, Signals
from types import TracebackType
from typing import IO, Any, NamedTuple, TypeVar

from . import config

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
PREFIX = "orchestrate-cluster-"
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "ip")
START_TIMEOUT_S = 60
T = TypeVar("T")


class ClusterError(Exception):
    """The cluster could not be started, or did not get where it was told to; the message has the logs."""


class Process(NamedTuple):
    """One process in the cluster; `pid` as host ctl numbers it, valid for `run(["kill", …], user=False)`."""

    pid: int
    argv: list[str]
    user: str


class Job(NamedTuple):
    """One job as squeue reports it, finished ones included."""

    id: str
    state: str
    partition: str
    nodes: str
    reason: str
    name: str


class Cluster:
    """`settings` replaces or adds lines of slurm.conf; `visible` names further directories that the user
    must be able to read although they lie below a closed one such as /root."""

    def __init__(self, *, settings: Mapping[str, str | int] | None = None, visible: Iterable[Path] = ()):
        self.settings = dict(settings or {})
        self.user = config.USER
        self.nodes = config.NODES
        self.repo = REPOSITORY
        self.python = sys.executable
        self._visible = tuple(visible)
        self._holder: subprocess.Popen[str] | None = None
        self._control = 0
        self._hosts: dict[str, int] = {}

    # --- start and stop

    def start(self) -> None:
        _refuse_what_cannot_work()
        sweep()
        self.uid = _free_uid()
        self.layout = config.Layout(Path(tempfile.mkdtemp(prefix=PREFIX)).resolve())
        self.shared, self.conf = self.layout.shared, self.layout.conf
        try:
            self._write_files()
            self._start_holder()
            self.wait(self._all_idle, START_TIMEOUT_S, "all nodes idle")
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End every process, then remove the directory. May be called twice."""
        if self._holder is not None:
            assert self._holder.stdin is not None
            self._holder.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._holder.wait(20)
            self._holder.kill()  # without effect on a process that has ended
            self._holder.wait()
            assert self._holder.stdout is not None
            self._holder.stdout.close()
            self._holder = None
        shutil.rmtree(self.layout.root, ignore_errors=True)

    def __enter__(self) -> Cluster:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _write_files(self) -> None:
        layout = self.layout
        layout.root.chmod(0o755)
        for folder in layout.folders:
            folder.mkdir(parents=True)
        layout.state.chmod(0o700)
        for folder in (layout.home, layout.shared):
            os.chown(folder, self.uid, self.uid)
            folder.chmod(0o700)
        for number in range(config.GPUS):
            os.mknod(layout.devices / f"gpu{number}", 0o20000, os.makedev(1, 3 + 2 * number))  # as /dev/null
        layout.munge_key.write_bytes(random.randbytes(1024))
        layout.munge_key.chmod(0o400)
        layout.conf.write_text(config.slurm_conf(layout, self.settings))
        (layout.slurm / "gres.conf").write_text(config.gres_conf(layout))
        # The checkout belongs to root in there, which git would otherwise refuse to read.
        (layout.home / ".gitconfig").write_text("[safe]\n\tdirectory = *\n")
        layout.spec.write_text(json.dumps(self._specification()))

    def _files(self) -> dict[str, str]:
        """Private versions of the machine's files: {where the text lies: what it covers}."""
        texts = config.accounts(self.uid, self.layout.home) | {"/etc/hosts": config.hosts()}
        bound = {}
        for target, text in texts.items():
            if Path(target).exists():
                source = self.layout.etc / Path(target).name
                source.write_text(text)
                source.chmod(0o640 if target == "/etc/shadow" else 0o644)
                bound[str(source)] = target
        if Path("/etc/slurm").is_dir():
            bound[str(self.layout.slurm)] = "/etc/slurm"
        return bound

    def _specification(self) -> dict[str, Any]:
        visible = _with_targets([Path(sys.prefix), Path(sys.base_prefix), self.repo, *self._visible])
        return {
            "root": str(self.layout.root),
            "visible": [str(path) for path in visible],
            "covered": [str(path) for path in _closed_parents(visible)],
            "files": self._files(),
            "uid": self.uid,
            "gid": self.uid,
            "address": config.CONTROL,
            "environment": {"PATH": SYSTEM_PATH, "SLURM_CONF": str(self.conf)},
            "start": self._control_commands(),
            "hosts": {
                name: {
                    "address": f"{config.NETWORK}.{number}",
                    "start": [self._slurmd()] if name in self.nodes else [],
                }
                for name, number in config.HOSTS.items()
            },
        }

    def _control_commands(self) -> list[list[str]]:
        etc, log, pids = self.layout.etc, self.layout.log, self.layout.pids
        return [
            ["mkdir", "-m", "755", "/run/munge"],
            ["munged", "--force", f"--key-file={self.layout.munge_key}", f"--log-file={log}/munged",
             f"--pid-file={pids}/munged", f"--seed-file={etc}/munge.seed", "--num-threads=4"],
            self._slurmctld(),
        ]  # fmt: skip

    def _slurmctld(self) -> list[str]:
        return ["slurmctld", "-f", str(self.conf)]

    def _slurmd(self) -> list[str]:
        return ["slurmd", "-f", str(self.conf)]

    def _start_holder(self) -> None:
        lock = self.layout.lock.open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)  # held by every process of the holder, so by the living only
        with lock, (self.layout.log / "holder").open("w") as log:
            self._holder = subprocess.Popen(
                [self.python, "-E", "-s", "-S", str(HERE / "holder.py"), str(self.layout.spec)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
                pass_fds=[lock.fileno()],
            )
        assert self._holder.stdout is not None
        line = self._holder.stdout.readline()
        if not line:
            raise ClusterError(f"the hosts did not start.\n{self.logs()}")
        report = json.loads(line)
        self._control, self._hosts = report["control"], report["hosts"]

    def _all_idle(self) -> bool:
        answer = self.run(["sinfo", "-h", "-N", "-o", "%N %T"], user=False, timeout=15)
        lines = set(answer.stdout.split("\n")) - {""}
        return lines == {f"{node} idle" for node in self.nodes}

    # --- running commands

    def environment(self, user: bool = True) -> dict[str, str]:
        """What a command gets unless it is told more; nothing of ours passes."""
        slurm = str(Path(shutil.which("sbatch") or "/usr/bin/sbatch").parent)
        path = ":".join(dict.fromkeys([f"{sys.prefix}/bin", slurm, *SYSTEM_PATH.split(":")]))
        name, home = (self.user, str(self.layout.home)) if user else ("root", "/")
        return {
            "HOME": home, "USER": name, "LOGNAME": name, "SHELL": "/bin/bash", "LANG": "C.UTF-8",
            "PATH": path, "SLURM_CONF": str(self.conf),
        }  # fmt: skip

    def command(
        self, argv: Sequence[object], *, user: bool = True, node: str | None = None,
        cwd: Path | None = None, terminal: bool = False,
    ) -> list[str]:  # fmt: skip
        """The command line for this machine that runs `argv` in there. Default host: login for the user,
        ctl (which sees the processes of every host) for root."""
        inside = self._hosts[node or ("login" if user else "ctl")]
        ids = {"uid": self.uid, "gid": self.uid} if user else {"uid": 0, "gid": 0}
        spec = ids | {
            "proc": f"/proc/{self._control}/root/proc/{inside}",
            "cwd": str(cwd or (self.shared if user else "/")),
            "groups": [ids["gid"]],
            "terminal": terminal,
        }
        program = [self.python, "-E", "-s", "-S", str(HERE / "enter.py")]
        return [*program, json.dumps(spec), *(str(word) for word in argv)]

    def run(
        self, argv: Sequence[object], *, user: bool = True, node: str | None = None,
        env: Mapping[str, str] | None = None, input: str | None = None, timeout: float = 60,
        check: bool = False, cwd: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:  # fmt: skip
        """Run to the end; `env` is added to a clean environment. A command out of time is killed."""
        result = subprocess.run(
            self.command(argv, user=user, node=node, cwd=cwd),
            env=self.environment(user) | dict(env or {}),
            input=input if input is not None else "",
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check and result.returncode != 0:
            words = " ".join(str(word) for word in argv)
            raise ClusterError(f"{words}: exit code {result.returncode}\n{result.stdout}{result.stderr}")
        return result

    def popen(
        self, argv: Sequence[object], *, user: bool = True, node: str | None = None,
        env: Mapping[str, str] | None = None, cwd: Path | None = None,
        stdin: int | IO[Any] | None = subprocess.DEVNULL, stdout: int | IO[Any] | None = subprocess.PIPE,
        stderr: int | IO[Any] | None = subprocess.STDOUT,
    ) -> subprocess.Popen[str]:  # fmt: skip
        """Start and return; signals sent to the result reach the command, SIGKILL included."""
        return subprocess.Popen(
            self.command(argv, user=user, node=node, cwd=cwd),
            env=self.environment(user) | dict(env or {}),
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            text=True,
        )

    # --- looking

    def processes(self, node: str | None = None) -> list[Process]:
        """Everything that runs on a host (or on all), but for the hosts' own process 1."""
        proc = Path(f"/proc/{self._control}/root/proc")
        wanted = (proc / str(self._hosts[node]) / "ns/uts").readlink() if node else None
        found = []
        for folder in proc.glob("[0-9]*"):
            with contextlib.suppress(OSError):  # ended while we look
                if int(folder.name) in self._hosts.values():
                    continue
                if wanted is None or (folder / "ns/uts").readlink() == wanted:
                    found.append(self._process(folder))
        return [process for process in found if process.argv]

    def _process(self, folder: Path) -> Process:
        argv = (folder / "cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
        uid = folder.stat().st_uid
        name = {0: "root", self.uid: self.user}.get(uid, str(uid))
        return Process(int(folder.name), argv if argv != [""] else [], name)

    def jobs(self) -> list[Job]:
        answer = self.run(["squeue", "-h", "-r", "-t", "all", "-o", "%i|%T|%P|%N|%r|%j"], check=True)
        return [Job(*line.split("|", 5)) for line in answer.stdout.splitlines()]

    def job_state(self, job_id: str | int) -> str:
        """PENDING, RUNNING, …; GONE when the controller no longer knows it."""
        return next((job.state for job in self.jobs() if job.id == str(job_id)), "GONE")

    def node_state(self, node: str) -> str:
        """idle, mixed, down*, …: sinfo's word."""
        return self.run(["sinfo", "-h", "-n", node, "-o", "%T"], check=True).stdout.split()[0]

    def wait(self, condition: Callable[[], T], timeout: float = 30, what: str = "the condition") -> T:
        """The first true answer of `condition`; ClusterError with the logs after `timeout` seconds."""
        end = time.monotonic() + timeout
        while not (answer := condition()):
            if time.monotonic() > end:
                raise ClusterError(f"{what}: not within {timeout:g} s.\n{self.logs()}")
            time.sleep(0.05)
        return answer

    def logs(self, lines: int = 8) -> str:
        """The end of every daemon's log."""
        parts = []
        for file in sorted(self.layout.log.glob("*")):
            tail = file.read_text(errors="replace").splitlines()[-lines:]
            parts += [f"--- {file.name}", *tail]
        return "\n".join(parts)

    # --- faults

    def kill(self, process: Process, number: Signals = SIGKILL) -> None:
        self.run(["kill", f"-{number.value}", process.pid], user=False)

    def kill_slurmd(self, node: str) -> None:
        """The daemon only; steps and jobs of the node go on, as after a crash of slurmd."""
        self._end_daemon("slurmd", node, SIGKILL)

    def start_slurmd(self, node: str) -> None:
        self.run(self._slurmd(), user=False, node=node, check=True)

    def stop_controller(self) -> None:
        self._end_daemon("slurmctld", "ctl", SIGTERM)

    def start_controller(self) -> None:
        self.run(self._slurmctld(), user=False, check=True)
        self.wait(lambda: self.run(["scontrol", "ping"], user=False).returncode == 0, 30, "slurmctld answers")

    def _end_daemon(self, name: str, node: str, number: Signals) -> None:
        def alive() -> list[Process]:
            return [entry for entry in self.processes(node) if Path(entry.argv[0]).name == name]

        for process in alive():
            self.kill(process, number)
        self.wait(lambda: not alive(), 30, f"the end of {name} on {node}")

    def cut(self, node: str) -> None:
        """Pull the network cable: nothing arrives, no connection is closed."""
        self._link(node, "down")

    def join(self, node: str) -> None:
        self._link(node, "up")

    def _link(self, node: str, state: str) -> None:
        port = f"v{list(config.HOSTS).index(node)}"
        self.run(["ip", "link", "set", port, state], user=False, check=True)

    def crash(self, node: str) -> None:
        """Loss of power: the link first, so that no peer hears a goodbye, then every process."""
        self.cut(node)
        self.run(["sh", "-c", "kill -9 -1"], user=False, node=node)

    def boot(self, node: str) -> None:
        """After crash(); files in the host's own places are still there."""
        self.join(node)
        self.start_slurmd(node)

    def reconfigure(self, **settings: str | int) -> None:
        """Change lines of slurm.conf in the running cluster: KillWait=30, MinJobAge=2, …"""
        self.settings |= settings
        self.conf.write_text(config.slurm_conf(self.layout, self.settings))
        self.run(["scontrol", "reconfigure"], user=False, check=True)


def sweep() -> None:
    """Remove the directories of clusters of which no process is left."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        lock = config.Layout(folder).lock
        with contextlib.suppress(OSError), lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.time() - lock.stat().st_mtime > 60:  # not one that is just being made
                shutil.rmtree(folder, ignore_errors=True)


def _refuse_what_cannot_work() -> None:
    if os.geteuid() != 0:
        raise ClusterError(
            "a test cluster needs root (it makes namespaces, mounts and users): sudo, or a container"
        )
    missing = [name for name in PROGRAMS if shutil.which(name, path=SYSTEM_PATH) is None]
    if missing:
        raise ClusterError(
            f"not found: {', '.join(missing)}. Run `make setup`, or: apt-get install slurm-wlm munge iproute2"
        )


def _free_uid() -> int:
    """Drawn, for limits of the kernel are per user id and several clusters may run at once."""
    taken = {entry.pw_uid for entry in pwd.getpwall()}
    return random.choice([uid for uid in range(20_000, 36_000) if uid not in taken])


def _with_targets(paths: list[Path]) -> list[Path]:
    """Each directory as named and as resolved, outer ones first."""
    both = {path.absolute() for path in paths} | {path.resolve() for path in paths}
    return sorted(both, key=lambda path: len(path.parts))


def _closed_parents(paths: list[Path]) -> list[Path]:
    """The topmost directories above `paths` that an ordinary user may not pass."""
    closed = {
        next((parent for parent in reversed(path.parents) if not parent.stat().st_mode & 0o001), None)
        for path in paths
    }
    return sorted(folder for folder in closed if folder is not None)
