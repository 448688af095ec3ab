"""Images as tar archives on the shared filesystem: how a node without a registry gets them, once.

What it is
    `save(store, image, file)`   an image of the store as an OCI archive, written beside and renamed
    `load(store, files)`         what these files hold, into the store, unless it is there already

What an archive may be
    What `podman save` or `docker save` wrote, compressed or not; its images keep their names, one without
    a name is called after the file. Or a root filesystem (mmdebstrap, debootstrap, tar of a directory): it is
    imported as localhost/orchestrate/NAME:latest, where NAME is the file's name up to its first dot.
    A file is known by its path, size and time of change, as its server gives them; what was loaded from it
    is written down beside the store.

What it does not do
    It takes no lock (the caller does), pulls nothing, and trusts an archive as much as a registry's image:
    it is unpacked by Podman, in the user's own namespace.
"""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

from orchestrator.contract import publish_bytes
from runtime_server.image_store import FILL_S, ImageError, names_in, podman

Say = Callable[[str], None]
ROOT_FOLDERS = frozenset(
    ("bin", "boot", "dev", "etc", "home", "lib", "lib64", "opt", "proc", "root", "run", "usr")
)
LOOKED_AT = 20  # members from which a root filesystem is told
GROWTH = 3  # an unpacked image is about so many times as large as its archive


def save(store: Path, image: str, file: Path) -> None:
    """Write the image as an OCI archive that every user may read. ImageError says what was wrong."""
    if not store.is_dir():
        raise ImageError(f"there is no image store {store} yet; run `python -m runtime_server.images ensure`")
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        done = podman(
            store, "save", "--quiet", "--format=oci-archive", "-o", str(partial), image, timeout_s=FILL_S
        )
        if done.returncode:
            raise ImageError(f"{image} could not be saved to {file}: {done.stderr.strip()[-400:]}")
        partial.chmod(0o644)
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def load(store: Path, files: Sequence[Path], say: Say = lambda _: None) -> list[str]:
    """Load those that were not loaded before; returns the names of what was. The caller holds the lock."""
    new: list[str] = []
    for file in files:
        if not known(store, file):
            new += _load(store, file, say)
    return new


def known(store: Path, file: Path) -> bool:
    """Whether the store holds what is in this file, as it is now. ImageError when it cannot be read."""
    names = _journal(store).get(_key(file))
    return bool(names) and names_in(store).issuperset(names or ())


def _key(file: Path) -> str:
    try:
        status = file.stat()
        with file.open("rb"):
            return f"{file.resolve()} {status.st_size} {status.st_mtime_ns}"
    except OSError as error:
        raise ImageError(
            f"the image archive {file} cannot be read on this node ({error.strerror}). It must lie on a "
            "filesystem that the CPU nodes see: correct runtime.image_archives, or make it with "
            "`python -m runtime_server.images save FILE`."
        ) from None


def _record(store: Path) -> Path:
    return store.parent / "archives.json"


def _journal(store: Path) -> dict[str, list[str]]:
    try:
        read = json.loads(_record(store).read_text())
    except (OSError, ValueError):
        return {}
    return read if isinstance(read, dict) else {}


def _load(store: Path, file: Path, say: Say) -> list[str]:
    size = file.stat().st_size
    free = shutil.disk_usage(store).free
    if free < GROWTH * size:
        raise ImageError(
            f"{store} has {free >> 20} MiB free, and {file} needs about {GROWTH * size >> 20}: make room, or "
            "set ORCHESTRATE_IMAGE_STORE to a directory on a larger node-local disk"
        )
    say(f"loading {file} ({size >> 20} MiB) into {store}")
    names = _import(store, file) if _is_root(file) else _load_image(store, file)
    _write_down(store, file, names)
    return names


def _write_down(store: Path, file: Path, names: list[str]) -> None:
    """Instead of what the file held when it was another one."""
    others = {key: held for key, held in _journal(store).items() if not key.startswith(f"{file.resolve()} ")}
    publish_bytes(_record(store), json.dumps(others | {_key(file): names}).encode(), 0o600)


def _is_root(file: Path) -> bool:
    try:
        with tarfile.open(file) as tar:
            first = {Path(member.name).parts[:1] for member in islice(tar, LOOKED_AT)}
    except (tarfile.TarError, OSError, EOFError):
        return False  # Podman reads more formats, and says what is wrong
    return any(parts and parts[0] in ROOT_FOLDERS for parts in first)


def _own_name(file: Path) -> str:
    return f"localhost/orchestrate/{file.name.split('.')[0].lower()}:latest"


def _import(store: Path, file: Path) -> list[str]:
    name = _own_name(file)
    done = podman(store, "import", "--change", "CMD /bin/sh", str(file), name, timeout_s=FILL_S)
    if done.returncode:
        raise ImageError(f"podman cannot import {file}: {done.stderr.strip()[-400:]}")
    return [name]


def _load_image(store: Path, file: Path) -> list[str]:
    done = podman(store, "load", "--quiet", "-i", str(file), timeout_s=FILL_S)
    if done.returncode:
        raise ImageError(f"{file} holds no image that podman can load: {done.stderr.strip()[-400:]}")
    said = [line.partition(":") for line in done.stdout.splitlines()]
    names = [name for key, _, value in said if key.startswith("Loaded image") for name in value.split(",")]
    return [_named(store, name.strip(), file) for name in names]


def _named(store: Path, image: str, file: Path) -> str:
    """An image without a name is known by its digest alone; it gets the file's name."""
    if not image.startswith("sha256:"):
        return image
    name = _own_name(file)
    if (done := podman(store, "tag", image, name)).returncode:
        raise ImageError(f"{image} of {file} cannot be named {name}: {done.stderr.strip()[-400:]}")
    return name
