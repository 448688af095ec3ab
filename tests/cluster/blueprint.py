"""Everything about a test cluster that is decided before it starts: its directory and its specification.

How to use it: `write(layout, uid, settings, accounting, visible)` fills the directory; holder.py then builds
what etc/holder.json says.

What it does not do: it starts nothing.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from . import accounting as books
from . import config, machine
from .config import Layout

SHELL_SETTINGS = "PS1='\\u@\\h \\W\\$ '\n"
# The checkout belongs to root in there, which git would otherwise refuse to read.
GIT_SETTINGS = "[safe]\n\tdirectory = *\n"


def programs(accounting: bool) -> list[str]:
    return ["munged", "slurmctld", "slurmd", "sbatch", "ip", *(books.PROGRAMS if accounting else ())]


def write(
    layout: Layout,
    uid: int,
    settings: Mapping[str, str | int],
    accounting: bool,
    visible: Iterable[Path],
) -> None:
    _folders(layout)
    _home(layout, uid)
    _accounts(layout, uid)
    layout.munge_key.write_bytes(random.randbytes(1024))
    layout.munge_key.chmod(0o400)
    layout.conf.write_text(config.slurm_conf(layout, settings))
    (layout.slurm / "gres.conf").write_text(config.gres_conf(layout))
    if accounting:
        conf = layout.slurm / "slurmdbd.conf"
        conf.touch(0o600)  # or slurmdbd refuses it
        conf.write_text(books.slurmdbd_conf(layout))
    layout.spec.write_text(json.dumps(_specification(layout, uid, accounting, visible)))


def slurmctld(layout: Layout) -> list[str]:
    return ["slurmctld", "-f", str(layout.conf)]


def slurmd(layout: Layout) -> list[str]:
    return ["slurmd", "-f", str(layout.conf)]


def _folders(layout: Layout) -> None:
    layout.root.chmod(0o755)
    for folder in layout.folders:
        folder.mkdir(parents=True)
    for folder in (layout.state, layout.nodes):
        folder.chmod(0o700)
    for number in range(config.GPUS):
        os.mknod(layout.devices / f"gpu{number}", 0o20000, os.makedev(1, 3 + 2 * number))  # as /dev/null


def _home(layout: Layout, uid: int) -> None:
    (layout.home / ".bashrc").write_text(SHELL_SETTINGS)
    (layout.home / ".gitconfig").write_text(GIT_SETTINGS)
    for path in (*layout.home.iterdir(), layout.home, layout.shared):
        os.chown(path, uid, uid)
    for folder in (layout.home, layout.shared):
        folder.chmod(0o700)


def _accounts(layout: Layout, uid: int) -> None:
    """What covers the machine's files of the same names."""
    (layout.accounts / "slurm").mkdir(parents=True)
    layout.accounts.chmod(0o755)
    texts = config.accounts(uid, layout.home) | {"/etc/hosts": config.hosts()}
    for target, text in texts.items():
        file = layout.accounts / Path(target).name
        file.write_text(text)
        file.chmod(0o600 if target == "/etc/shadow" else 0o644)


def _specification(layout: Layout, uid: int, accounting: bool, visible: Iterable[Path]) -> dict[str, Any]:
    shown = machine.with_targets(visible)
    hosts = {
        name: {
            "address": f"{config.NETWORK}.{number}",
            "start": [slurmd(layout)] if name in config.NODES else [],
        }
        for name, number in config.HOSTS.items()
    }
    return {
        "root": str(layout.root),
        "visible": [str(path) for path in shown],
        "covered": [str(path) for path in machine.closed_parents([layout.root, *shown])],
        "over_etc": str(layout.accounts),
        "slurm": str(layout.slurm),
        "uid": uid,
        "gid": uid,
        "address": config.CONTROL,
        "environment": {"PATH": machine.SYSTEM_PATH, "SLURM_CONF": str(layout.conf)},
        "start": _control_commands(layout, accounting),
        "hosts": hosts,
    }


def _control_commands(layout: Layout, accounting: bool) -> list[list[str]]:
    munged = {
        "key-file": layout.munge_key,
        "log-file": layout.log / "munged",
        "pid-file": layout.pids / "munged",
        "seed-file": layout.etc / "munge.seed",
        "num-threads": 4,
    }
    return [
        ["mkdir", "-m", "755", "/run/munge", str(config.SPOOL)],
        ["munged", "--force", *(f"--{name}={value}" for name, value in munged.items())],
        *(books.commands(layout) if accounting else ()),
        slurmctld(layout),
    ]
