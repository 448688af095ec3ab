"""The node-local image store: where it is, what is in it, and Podman run on it alone.

What it is
    One directory for every server of this user on this node, which opens it read-only. Whoever adds to it
    holds `locked(store)`.

What it does not do
    It fetches and makes nothing (`images.py`, `archives.py`), and touches no other store: the user's
    `podman images` are neither read nor changed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from filelock import FileLock

from runtime_server.engines import namespace
from runtime_server.engines.filesystems import networked

FILL_S = 900


class ImageError(Exception):
    """The image could not be made; the message says what to do."""


def default_store() -> Path:
    """Where this user's images lie on this node: local disk that outlives a job, never a home on NFS."""
    if configured := os.environ.get("ORCHESTRATE_IMAGE_STORE"):
        return Path(configured)
    return local_disk() / f"orchestrate-{os.getuid()}" / "images"


def local_disk() -> Path:
    """The one that outlives jobs; where that is shared or read-only, the one that goes with the job."""
    places = [Path("/var/tmp")]  # noqa: S108 - checked by private_directory
    places += [Path(os.environ[name]) for name in ("SLURM_TMPDIR", "TMPDIR") if name in os.environ]
    for place in places:
        if os.access(place, os.W_OK) and not networked(place):
            return place
    return places[0]


def private_directory(path: Path) -> Path:
    """Make `path` with mode 0700, and refuse one that somebody else owns or could write to."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    for folder in (path, path.parent) if path.parent.name.startswith("orchestrate-") else (path,):
        status = folder.lstat()
        if status.st_uid != os.getuid() or status.st_mode & 0o022 or folder.is_symlink():
            raise ImageError(
                f"{folder} is not yours alone (owner {status.st_uid}, mode {status.st_mode & 0o7777:o}). "
                "Remove it, or set ORCHESTRATE_IMAGE_STORE to a directory of your own on a local disk."
            )
    return path


def podman(store: Path, *args: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    """Run podman on this store only: its own root, run root and temporary directory, overlay driver."""
    if shutil.which("podman") is None:
        raise ImageError(
            "podman is not installed. Debian: apt-get install podman; else ask an administrator."
        )
    with tempfile.TemporaryDirectory(prefix="orc-img-") as run:
        # podman's own database remembers where it ran; it lives as long as this call, the images stay
        conf = Path(run) / "containers.conf"
        conf.write_text(
            f'[engine]\nstatic_dir = "{run}/s"\ntmp_dir = "{run}/t"\n'
            'cgroup_manager = "cgroupfs"\nevents_logger = "none"\nlock_type = "file"\n'
        )
        storage = namespace.configure_storage(Path(run, "c"), store, Path(run, "r"))
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("CONTAINERS_", "STORAGE_"))}
        environment |= {"CONTAINERS_CONF": str(conf), "XDG_RUNTIME_DIR": run, **storage}
        try:
            return subprocess.run(
                [*namespace.entry().prefix, "podman", *args],
                env=environment,
                capture_output=True,
                text=True,
                timeout=timeout_s,
                check=False,
            )
        finally:
            namespace.end_pause(Path(run))


def images(store: Path) -> dict[str, dict[str, str]]:
    """Names in the store, each with its labels. An empty store has none."""
    if not (store / "overlay-images").is_dir():
        return {}
    listed = podman(store, "images", "--format", "json")
    if listed.returncode:
        raise ImageError(f"podman cannot read the image store {store}: {listed.stderr.strip()[-400:]}")
    rows = json.loads(listed.stdout or "[]")
    return {name: row.get("Labels") or {} for row in rows for name in row.get("Names") or []}


def index(store: Path) -> dict[str, bool]:
    """The names of the store's images, from its own index (no Podman is started for it), and whether
    `map_ids` has been done to each."""
    found: dict[str, bool] = {}
    for file in store.glob("*-images/images.json"):
        try:
            rows = json.loads(file.read_text())
            found |= {n: bool(row.get("mapped-layers")) for row in rows for n in row.get("names") or ()}
        except (OSError, ValueError, AttributeError):
            return dict.fromkeys(images(store), False)
    return found


def names_in(store: Path) -> set[str]:
    return set(index(store))


def map_ids(store: Path) -> None:
    """For ordinary users: have an image's layer at hand for sandboxes with a user namespace of their own.

    Without it every such sandbox walks through its whole image, to find that no file changes hands: 350 ms.
    Nothing but that time is lost where it fails.
    """
    if not (ids := namespace.entry().ids):
        return
    maps = [f"--{kind}map=0:0:{ids}" for kind in ("uid", "gid")]
    limits = [f"--ulimit={name}=1024:1024" for name in ("nofile", "nproc")]
    for image in [name for name, done in index(store).items() if not done]:
        made = podman(store, "create", "--network=none", *maps, *limits, image, "true", timeout_s=FILL_S)
        if made.returncode == 0:
            podman(store, "rm", made.stdout.split()[-1])


def locked(store: Path) -> FileLock:
    """What one process holds while it adds to the store; the others wait, then find what they want."""
    return FileLock(store.parent / "images.lock", timeout=FILL_S)
