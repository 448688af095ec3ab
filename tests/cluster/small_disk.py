"""One filesystem of limited size, mounted at the same place on every host of a test cluster.

How to run it
    Cluster.small_disk (cluster.py) does:  python -S small_disk.py SPEC
    SPEC is JSON: {"proc": ["/proc/P/root/proc/1", …], "folder", "megabytes", "uid"}, the controller's first.

What it does not do: it is never unmounted; it goes with the cluster.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import namespaces as ns


def main(spec: dict[str, Any]) -> None:
    """A mount belongs to one namespace: each host gets a copy, taken in the first and placed in its own."""
    folder, uid = Path(spec["folder"]), spec["uid"]
    first, *others = [os.open(f"{proc}/ns/mnt", os.O_RDONLY) for proc in spec["proc"]]
    ns.enter(first, ns.MOUNT)
    ns.mount_new("tmpfs", folder, f"mode=700,uid={uid},gid={uid},size={spec['megabytes']}m")
    for other in others:
        ns.enter(first, ns.MOUNT)
        copy = ns.copy_mount(folder)
        ns.enter(other, ns.MOUNT)
        ns.place_mount(copy, folder)
        os.close(copy)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
