"""The configuration files of a test cluster, as text made from a few values; nothing is written here.

How to use it: `slurm_conf(layout, settings)`, `accounts(…)`, … from cluster.py. HOSTS says who exists.

What it does not do: no I/O except reading the machine's own /etc files, to which the cluster's user is added.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

USER = "researcher"
NETWORK = "10.77.0"
CONTROL = f"{NETWORK}.1"
HOSTS = {"login": 10, "cpu1": 11, "cpu2": 12, "gpu1": 21, "gpu2": 22}
# Not below the cluster's directory: the sockets in there may have 107 characters.
SPOOL = Path("/run/slurmd")
NODES = tuple(name for name in HOSTS if name != "login")
SUBORDINATE_IDS = 65536

# Ordinary requests fit (64 cpus, 512 GB), whatever this machine has.
CPUS, MEMORY_MB, GPUS = 128, 1_048_576, 2

# One name, one line of slurm.conf each; Cluster(settings=…) replaces or adds.
SETTINGS: dict[str, str | int] = {
    "ClusterName": "test",
    "SlurmUser": "root",
    "AuthType": "auth/munge",
    "AuthInfo": "cred_expire=5",  # a requeued job starts after 6 s instead of 120
    "ProctrackType": "proctrack/linuxproc",
    "TaskPlugin": "task/none",
    "SelectType": "select/cons_tres",
    "SelectTypeParameters": "CR_Core_Memory",
    "DefMemPerCPU": 1024,
    "SchedulerType": "sched/backfill",
    "SchedulerParameters": "sched_interval=1,bf_interval=1,sched_min_interval=0,batch_sched_delay=0",
    "PreemptType": "preempt/partition_prio",
    "PreemptMode": "REQUEUE",
    "SlurmdParameters": "config_overrides",
    "MpiDefault": "none",
    "GresTypes": "gpu",
    "JobRequeue": 1,
    "ReturnToService": 2,
    "KillWait": 5,  # sites: 30
    "MinJobAge": 300,
    "SlurmdTimeout": 15,  # sites: 300; a dead node is DOWN after 15 to 35 s
    "AccountingStorageType": "accounting_storage/none",
    "JobAcctGatherType": "jobacct_gather/none",
    "SlurmctldDebug": "info",
    "SlurmdDebug": "info",
}

# Name, nodes, everything else. A job of gpu_test may push one of gpu_low out, which is then requeued.
PARTITIONS = (
    ("test", "cpu[1-2]", "Default=YES PriorityTier=10 PreemptMode=OFF"),
    ("gpu_test", "gpu[1-2]", "PriorityTier=10 PreemptMode=OFF"),
    ("gpu_low", "gpu[1-2]", "PriorityTier=1 PreemptMode=REQUEUE GraceTime=10"),
)


@dataclass(frozen=True)
class Layout:
    """Every path of a cluster. The same inside and outside; all below `root`, which goes with the cluster."""

    root: Path

    @property
    def etc(self) -> Path:
        return self.root / "etc"

    @property
    def accounts(self) -> Path:
        """Laid over /etc."""
        return self.etc / "over"

    @property
    def slurm(self) -> Path:
        """Bound over /etc/slurm, so that jobs without SLURM_CONF find their own cluster."""
        return self.etc / "slurm"

    @property
    def conf(self) -> Path:
        return self.slurm / "slurm.conf"

    @property
    def log(self) -> Path:
        return self.root / "log"

    @property
    def pids(self) -> Path:
        return self.root / "pids"

    @property
    def state(self) -> Path:
        return self.root / "state"

    @property
    def nodes(self) -> Path:
        return self.root / "nodes"

    @property
    def devices(self) -> Path:
        return self.root / "devices"

    @property
    def home(self) -> Path:
        return self.root / "home"

    @property
    def shared(self) -> Path:
        return self.root / "shared"

    @property
    def munge_key(self) -> Path:
        return self.etc / "munge.key"

    @property
    def spec(self) -> Path:
        return self.etc / "holder.json"

    @property
    def lock(self) -> Path:
        return self.etc / "lock"

    @property
    def folders(self) -> tuple[Path, ...]:
        below = (self.log, self.pids, self.state, self.nodes, self.devices, self.home, self.shared)
        return (self.slurm, *below)


def slurm_conf(layout: Layout, settings: Mapping[str, str | int]) -> str:
    paths = {
        "SlurmctldHost": f"ctl({CONTROL})",
        "StateSaveLocation": layout.state,
        "SlurmdSpoolDir": SPOOL / "%n",
        "SlurmctldPidFile": layout.pids / "slurmctld",
        "SlurmdPidFile": layout.pids / "%n",
        "SlurmctldLogFile": layout.log / "slurmctld",
        "SlurmdLogFile": layout.log / "%n",
    }
    lines = [f"{name}={value}" for name, value in (paths | SETTINGS | dict(settings)).items()]
    size = f"CPUs={CPUS} RealMemory={MEMORY_MB}"
    lines += [f"NodeName=cpu[1-2] {size}", f"NodeName=gpu[1-2] {size} Gres=gpu:{GPUS}"]
    lines += [
        f"PartitionName={name} Nodes={nodes} MaxTime=INFINITE State=UP {rest}"
        for name, nodes, rest in PARTITIONS
    ]
    return "\n".join(lines) + "\n"


def gres_conf(layout: Layout) -> str:
    """Each fake GPU needs a file of its own, or Slurm drains the node."""
    return f"NodeName=gpu[1-2] Name=gpu File={layout.devices}/gpu[0-{GPUS - 1}]\n"


def hosts() -> str:
    lines = ["127.0.0.1 localhost", f"{CONTROL} ctl"]
    return "\n".join([*lines, *(f"{NETWORK}.{number} {name}" for name, number in HOSTS.items())]) + "\n"


def accounts(uid: int, home: Path) -> dict[str, str]:
    """The machine's own account files with the cluster's user in them, by path."""
    first = subordinate_ids(uid)
    added = {
        "/etc/passwd": f"{USER}:x:{uid}:{uid}:Researcher:{home}:/bin/bash",
        "/etc/group": f"{USER}:x:{uid}:",
        "/etc/shadow": f"{USER}:!:19000:0:99999:7:::",
        "/etc/subuid": f"{USER}:{first}:{SUBORDINATE_IDS}",
        "/etc/subgid": f"{USER}:{first}:{SUBORDINATE_IDS}",
    }
    return {path: _read(Path(path)) + line + "\n" for path, line in added.items()}


def subordinate_ids(uid: int) -> int:
    """A range far above what distributions hand out, different for each user id."""
    return 1_000_000_000 + (uid % 16_000) * SUBORDINATE_IDS


def _read(path: Path) -> str:
    text = path.read_text() if path.exists() else ""
    return text if not text or text.endswith("\n") else text + "\n"
