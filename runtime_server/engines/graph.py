"""Podman's storage after a service that was killed: what it left half done, and none after it would remove.

How to use it
    tidy(graphroot, runroot)          # before a service is started on them; none may be running

What is left, by when the service was killed
    while it wrote a file of records    its temporary file
    after it made a layer               directories that no record names
    after it wrote that down            a record of a layer that belongs to no container
    after it forgot a container         that container's directories

What it does not do
    It touches no image: what was pulled before a kill is what the next pull goes on from.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from runtime_server.engines import namespace

DIGESTS = ("diff-digest", "compressed-diff-digest")
"""Only layers of images have them."""


def tidy(graphroot: Path, runroot: Path) -> None:
    """See above. What cannot be read or removed stays."""
    with contextlib.suppress(OSError):
        _remove_unknown(graphroot, runroot)
        for half in graphroot.glob("overlay-*/.tmp-*"):
            half.unlink()
        with contextlib.suppress(ValueError, LookupError, TypeError):  # of a Podman that writes otherwise
            _forget(graphroot, _unused(graphroot))
        known = b"".join(file.read_bytes() for file in _files(graphroot, "layers"))
        for layer in (graphroot / "overlay").glob("?" * 64):
            if layer.name.encode() not in known:
                namespace.remove_tree(layer)
        for link in (graphroot / "overlay" / "l").glob("*"):
            if link.is_symlink() and not link.exists():
                link.unlink()


def _remove_unknown(graphroot: Path, runroot: Path) -> None:
    """Directories of containers that are written down nowhere."""
    files = _files(graphroot, "containers")
    known = b"".join(file.read_bytes() for file in files)
    for top in (graphroot, runroot) if files else ():
        for folder in (top / "overlay-containers").glob("?" * 64):
            if folder.name.encode() not in known:
                namespace.remove_tree(folder)


def _files(graphroot: Path, what: str) -> list[Path]:
    """Records of layers, containers or images; newer versions have a volatile part besides."""
    return [*(graphroot / f"overlay-{what}").glob(f"*{what}.json")]


def _records(graphroot: Path, what: str) -> list[dict[str, Any]]:
    files = [json.loads(file.read_bytes()) or () for file in _files(graphroot, what)]
    return [record for records in files for record in records]


def _unused(graphroot: Path) -> set[str]:
    """Layers that were made for a container which was never written down, or is not any more."""
    if not _files(graphroot, "containers"):  # they may be written down elsewhere
        return set()
    layers = {layer["id"]: layer for layer in _records(graphroot, "layers")}
    used = [c["layer"] for c in _records(graphroot, "containers")]
    used += [layer.get("parent", "") for layer in layers.values()]
    of_images = {id_ for id_, layer in layers.items() if any(layer.get(key) for key in DIGESTS)}
    of_images |= {image.get("layer", "") for image in _records(graphroot, "images")}
    return layers.keys() - {*used} - of_images


def _forget(graphroot: Path, layers: set[str]) -> None:
    """Take these out of the records; their directories are then ones that no record names."""
    for file in _files(graphroot, "layers") if layers else []:
        kept = [layer for layer in json.loads(file.read_bytes()) or [] if layer["id"] not in layers]
        beside = file.with_name(f".tmp-{file.name}")
        beside.write_text(json.dumps(kept))
        beside.replace(file)
