"""A real Slurm of four nodes on this machine, private to whoever starts it, gone when they leave.

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

from . import accounting as books
from . import blueprint, config, machine
from .machine import ClusterError

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
PREFIX = "orchestrate-cluster-"
START_TIMEOUT_S = 60
T = TypeVar("T")


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
    """`accounting` adds slurmdbd and its database. `settings` replaces or adds lines of slurm.conf;
    `visible` names further directories that the user must be able to read although they lie below a
    closed one such as /root."""

    def __init__(
        self,
        *,
        accounting: bool = False,
        settings: Mapping[str, str | int] | None = None,
        visible: Iterable[Path] = (),
    ):
        self.accounting = accounting
        self.settings = (books.SETTINGS if accounting else {}) | dict(settings or {})
        self.user = config.USER
        self.nodes = config.NODES
        self.repo = REPOSITORY
        self.python = sys.executable
        self._visible = [Path(sys.prefix), Path(sys.base_prefix), self.repo, *visible]
        self._holder: subprocess.Popen[str] | None = None
        self._control = 0
        self._hosts: dict[str, int] = {}

    # --- start and stop

    def start(self) -> None:
        machine.refuse_what_cannot_work(blueprint.programs(self.accounting))
        machine.sweep(Path(tempfile.gettempdir()).glob(f"{PREFIX}*"))
        self.uid = machine.free_uid()
        self.layout = config.Layout(Path(tempfile.mkdtemp(prefix=PREFIX)).resolve())
        self.shared, self.conf = self.layout.shared, self.layout.conf
        try:
            blueprint.write(self.layout, self.uid, self.settings, self.accounting, self._visible)
            self._start_holder()
            self.wait(self._all_idle, START_TIMEOUT_S, "all nodes idle")
        except BaseException:  # an interrupt too: nothing half-started may stay
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

    @property
    def holder_pids(self) -> tuple[int, int]:
        """(the process that waits for our end, process 1 of the cluster) as this machine numbers them."""
        assert self._holder is not None
        return self._holder.pid, self._control

    # --- running commands

    def environment(self, user: bool = True) -> dict[str, str]:
        """What a command gets unless it is told more; nothing of ours passes."""
        slurm = str(Path(shutil.which("sbatch") or "/usr/bin/sbatch").parent)
        path = ":".join(dict.fromkeys([f"{sys.prefix}/bin", slurm, *machine.SYSTEM_PATH.split(":")]))
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
            "proc": str(self._proc / str(inside)),
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
        wanted = self._uts(self._proc / str(self._hosts[node])) if node else None
        found = []
        for folder in self.proc_folders():
            with contextlib.suppress(OSError):  # ended while we look
                hosts_own = int(folder.name) in self._hosts.values()
                if not hosts_own and wanted in (None, self._uts(folder)):
                    found.append(self._process(folder))
        return [process for process in found if process.argv]

    @property
    def _proc(self) -> Path:
        """/proc of host ctl, seen from here."""
        return Path(f"/proc/{self._control}/root/proc")

    def proc_folders(self) -> list[Path]:
        """One of /proc per process of the cluster, as this machine can read them."""
        return list(self._proc.glob("[0-9]*"))

    @staticmethod
    def _uts(folder: Path) -> Path:
        """Which host a process is on."""
        return (folder / "ns/uts").readlink()

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
            time.sleep(0.1)
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
        self.run(blueprint.slurmd(self.layout), user=False, node=node, check=True)

    def stop_controller(self) -> None:
        self._end_daemon("slurmctld", "ctl", SIGTERM)

    def start_controller(self) -> None:
        self.run(blueprint.slurmctld(self.layout), user=False, check=True)
        self.wait(lambda: self.run(["scontrol", "ping"], user=False).returncode == 0, 30, "slurmctld answers")

    def _end_daemon(self, name: str, node: str, number: Signals) -> None:
        def alive() -> list[Process]:
            return [entry for entry in self.processes(node) if Path(entry.argv[0]).name == name]

        for process in alive():
            self.kill(process, number)
        self.wait(lambda: not alive(), 30, f"the end of {name} on {node}")

    def small_disk(self, folder: Path, megabytes: int) -> None:
        """A filesystem of its own at `folder`, the same on every host, so that it can be filled. From here
        it is seen through `inside(folder)` only."""
        self.run(["mkdir", "-p", folder], check=True)
        hosts = [str(self._proc / str(pid)) for pid in (1, *set(self._hosts.values()) - {1})]
        spec = {"proc": hosts, "folder": str(folder), "megabytes": megabytes, "uid": self.uid}
        program = [self.python, "-E", "-s", "-S", str(HERE / "small_disk.py"), json.dumps(spec)]
        subprocess.run(program, check=True, timeout=30)

    def inside(self, path: Path) -> Path:
        """A path as the hosts see it, for reading from here."""
        return Path(f"/proc/{self._control}/root") / path.relative_to("/")

    def cut(self, node: str) -> None:
        """Pull the network cable: nothing arrives, no connection is closed."""
        self._link(node, "down")

    def join(self, node: str) -> None:
        """Slurm asks a node that is DOWN only once a minute; a slurmd that is started reports at once."""
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
