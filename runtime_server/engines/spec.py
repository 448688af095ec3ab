"""A sandbox as Podman's API wants to read it: pure, from a `Recipe` to the JSON of one create call.

What it is
    The security defaults of every sandbox, in one place: no network, every capability dropped but the
    six that package managers and `su` need, no new privileges, the default seccomp profile, limits, and
    two read-only mounts: the agent's binary and the directory of its socket.

What it does not do
    No I/O. Mounts, devices or privileges that a client might ask for have no way in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from runtime_server.engines import AGENT, IO, SOCKET, Recipe

CAPABILITIES = ("CHOWN", "DAC_OVERRIDE", "FOWNER", "SETUID", "SETGID", "KILL")
SECCOMP_BPF = "run.oci.seccomp_bpf_data"
CPU_PERIOD_US = 100_000
PAGE = 4096  # smaller than some machines' pages: the bound is then a larger one
AGENT_OOM_SCORE = -900


class Way(NamedTuple):
    """What to ask of a runtime: cgroup limits, settings of the IPC namespace, a user namespace for each
    sandbox inside the one that all of them are in."""

    limits: bool
    bound_sysv: bool = False
    own_users: bool = False


ROOT_WAYS = (Way(limits=True), Way(limits=False))
USER_WAYS = (
    Way(limits=True, bound_sysv=True, own_users=True),
    Way(limits=False, bound_sysv=True, own_users=True),  # cgroups that are not this user's
    Way(limits=False, own_users=True),  # kernels before 5.19 let only root bound System V memory
    Way(limits=False),
)


@dataclass(frozen=True)
class Node:
    """What the probes found out, as far as it shapes a container."""

    agent: Path
    ulimits: Mapping[str, int]
    cgroup: str = ""  # parent of every sandbox's cgroup; "" leaves it to Podman
    limits: bool = True  # False where limits make the runtime fail
    own_ids: int = 0  # ids in a user namespace of its own; 0: it has none
    own_tasks: bool = False  # whether the limit `nproc` counts one user namespace, not the whole node
    bound_sysv: bool = False  # where no cgroup counts them, segments that nobody has attached are bounded
    protect_agent: bool = False  # only root may lower an OOM score
    seccomp: str = ""  # the default profile as the runtime compiled it (base64), "" to compile each time
    orphan_s: int = 60
    features: frozenset[str] = field(default_factory=frozenset)


def create_body(recipe: Recipe, node: Node, rootfs: Path | None = None) -> dict[str, Any]:
    """The SpecGenerator of one sandbox; with `rootfs` of a bare directory instead of the image."""
    body: dict[str, Any] = {
        "name": recipe.name,
        "hostname": "sandbox",
        "entrypoint": [AGENT, *_agent_options(recipe, node), f"{IO}/{SOCKET}"],
        "command": [],
        "env": dict(recipe.env),
        "netns": {"nsmode": "none"},
        "cap_drop": ["all"],
        "cap_add": list(CAPABILITIES),
        "no_new_privileges": True,
        "mounts": mounts(recipe, node),
        "r_limits": [{"type": name, "soft": n, "hard": n} for name, n in node.ulimits.items()],
        "shm_size": recipe.shm_mb << 20,
        "log_configuration": {"driver": "none"},
        "image_volume_mode": "ignore",
        "systemd": "false",
        "stop_timeout": 0,
        "volatile": True,
    }
    body |= {"rootfs": str(rootfs), "command": body.pop("entrypoint")} if rootfs else {"image": recipe.image}
    return body | _chosen(recipe, node)


def _agent_options(recipe: Recipe, node: Node) -> list[str]:
    """With `own_tasks` the kernel holds the limit of processes even without a cgroup; the agent sets it,
    for the runtime would before it makes the user namespace, and then it counts all sandboxes together."""
    tasks = ["--tasks", str(recipe.pids)] if node.own_tasks else []
    return ["--orphan-timeout", str(node.orphan_s), *tasks, *_workdir(recipe)]


def _workdir(recipe: Recipe) -> list[str]:
    """The agent makes the working directory where it may: Podman would mount the container to do it."""
    return ["--workdir", recipe.workdir] if recipe.workdir and recipe.as_root else []


def _chosen(recipe: Recipe, node: Node) -> dict[str, Any]:
    """The parts that depend on the request or on the node."""
    chosen: dict[str, Any] = {}
    chosen["work_dir"] = "/"
    if recipe.workdir and not recipe.as_root:
        chosen |= {"work_dir": recipe.workdir, "create_working_dir": True}
    if node.cgroup:
        chosen["cgroup_parent"] = f"/{node.cgroup}"
    if node.limits:
        chosen["resource_limits"] = resources(recipe)
    if node.own_ids:
        chosen |= _own_users(node.own_ids)
    if node.bound_sysv:
        size = recipe.shm_mb << 20
        chosen["sysctl"] = {"kernel.shmmax": str(size), "kernel.shmall": str(size // PAGE)}
    if node.protect_agent:
        chosen["oom_score_adj"] = AGENT_OOM_SCORE
    if node.seccomp:
        chosen["annotations"] = {SECCOMP_BPF: node.seccomp}
    return chosen


def _own_users(ids: int) -> dict[str, Any]:
    """The same ids as outside: no file of the image has to change hands for it."""
    same = [{"container_id": 0, "host_id": 0, "size": ids}]
    maps = {"UIDMap": same, "GIDMap": same, "HostUIDMapping": False, "HostGIDMapping": False}
    return {"userns": {"nsmode": "private"}, "idmappings": maps}


def mounts(recipe: Recipe, node: Node) -> list[dict[str, Any]]:
    options = ["ro", "nosuid", "nodev"]
    return [
        {"type": "bind", "source": str(node.agent), "destination": AGENT, "options": options},
        {"type": "bind", "source": str(recipe.io), "destination": IO, "options": [*options, "noexec"]},
    ]


def resources(recipe: Recipe) -> dict[str, Any]:
    size = recipe.memory_mb << 20
    return {
        "memory": {"limit": size, "swap": size},  # memory and swap together: no swap
        "pids": {"limit": recipe.pids},
        "cpu": {"quota": round(recipe.cpus * CPU_PERIOD_US), "period": CPU_PERIOD_US},
    }
