"""The sandbox image: made, loaded or pulled once on a node, for every server of this user there.

How to run it
    python -m runtime_server.images ensure               make the default image when it is missing
    python -m runtime_server.images ensure --from FILE   or load it from an archive
    python -m runtime_server.images save FILE            write it as an archive, for nodes that cannot make it
    python -m runtime_server.images list                 the images in the store
    python -m runtime_server.images path                 where the store is

How the image is made
    Where a registry answers: `podman build` on the Containerfile in images/sandbox. Where none does, the
    same Debian packages are put together by mmdebstrap and imported. One process does it, others wait
    on a lock. `runtime_server` opens the store read-only, beside a writable store of its own.

What it does not do
    It starts no sandbox, and it changes no image store but its own: the user's `podman images` are
    neither read nor touched.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from runtime_server import archives
from runtime_server.engines import EngineError
from runtime_server.image_store import (
    ImageError,
    default_store,
    images,
    index,
    locked,
    map_ids,
    names_in,
    podman,
    private_directory,
)

Say = Callable[[str], None]
DEFAULT_IMAGE = "localhost/orchestrate/sandbox:latest"
SUITE = "bookworm"
LABEL = "orchestrate.packages"
PULL_TIMEOUT_S = 600
BUILD_TIMEOUT_S = 900


def recipe() -> Path:
    """The folder with Containerfile and packages.txt: of the checkout, else of the installed wheel."""
    here = Path(__file__).resolve().parent
    for folder in (here.parent / "images" / "sandbox", here / "data" / "images" / "sandbox"):
        if (folder / "packages.txt").is_file():
            return folder
    raise ImageError("images/sandbox/packages.txt is missing from this installation; install it again")


def packages(folder: Path) -> list[str]:
    lines = (folder / "packages.txt").read_text().split("\n")
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def fingerprint(folder: Path) -> str:
    """What the image is made of; an image with another one is made anew."""
    return hashlib.sha256(f"{SUITE} {sorted(packages(folder))}".encode()).hexdigest()[:16]


def ensure(store: Path, say: Say = lambda _: None, files: Sequence[Path] = ()) -> bool:
    """Have the default image as packages.txt wants it, or an archive's. True when it was made or loaded."""
    private_directory(store)
    with locked(store):
        made = bool(archives.load(store, files, say))
        here = images(store)
        if not (files and DEFAULT_IMAGE in here) and not _current(here):
            _make(store, say)
            made = True
        map_ids(store)
    return made


def _current(here: dict[str, dict[str, str]]) -> bool:
    return here.get(DEFAULT_IMAGE, {}).get(LABEL) == fingerprint(recipe())


def provide(store: Path, image: str, files: Sequence[Path], say: Say) -> None:
    """What a server needs before it starts: the archives' images, and `image`, whatever way it comes.

    From the store, else from an archive, else from a registry; the default one is made where there is none.
    ImageError says what was tried. A local image that is nowhere is left for the server to refuse.
    """
    private_directory(store)
    here = index(store)
    ready = os.getuid() == 0 or all(here.values())
    if ready and image in here and all(archives.known(store, file) for file in files):
        return
    with locked(store):
        archives.load(store, files, say)
        _provide_one(store, image, say)
        map_ids(store)


def _provide_one(store: Path, image: str, say: Say) -> None:
    if image in names_in(store) or podman(store, "image", "exists", image).returncode == 0:
        return
    if image == DEFAULT_IMAGE:
        _make(store, say)
    elif not image.startswith("localhost/"):
        _pull(store, image, say)


def _pull(store: Path, image: str, say: Say) -> None:
    say(f"pulling {image} into {store}")
    done = podman(store, "pull", "--quiet", image, timeout_s=PULL_TIMEOUT_S)
    if done.returncode:
        raise ImageError(
            f"{image} is neither in {store} nor in an archive (runtime.image_archives), and it cannot be "
            f"pulled: {done.stderr.strip()[-400:]}"
        )


def _make(store: Path, say: Say) -> None:
    if not _build_from_registry(store, recipe(), say):
        _build_from_debian(store, recipe(), say)


def _build_from_registry(store: Path, folder: Path, say: Say) -> bool:
    """True when the base image could be pulled and built on; False when no registry answers."""
    if os.environ.get("ORCHESTRATE_OFFLINE"):
        return False
    base = (folder / "Containerfile").read_text().split("FROM ", 1)[1].split()[0]
    say(f"pulling {base}")
    try:
        if podman(store, "pull", "--quiet", base, timeout_s=PULL_TIMEOUT_S).returncode:
            say("no registry answers")
            return False
        say("installing packages into it")
        label = f"{LABEL}={fingerprint(folder)}"
        args = ["build", "--isolation=chroot", "--label", label, "-t", DEFAULT_IMAGE, str(folder)]
        return podman(store, *args, timeout_s=BUILD_TIMEOUT_S).returncode == 0
    except subprocess.TimeoutExpired:
        say("the registry is too slow")
        return False


def _build_from_debian(store: Path, folder: Path, say: Say) -> None:
    if shutil.which("mmdebstrap") is None:
        raise ImageError(
            "no registry answers and mmdebstrap is not installed. Debian: apt-get install mmdebstrap; "
            "elsewhere: where the image exists, `python -m runtime_server.images save FILE`, with FILE on a "
            "filesystem that this node sees; then name FILE in runtime.image_archives, or with --from FILE."
        )
    with tempfile.TemporaryDirectory(prefix="orc-img-", dir=store.parent) as scratch:
        tar = Path(scratch) / "root.tar"
        say(f"putting Debian {SUITE} together ({len(packages(folder))} packages and what they need)")
        _run(_mmdebstrap(folder, tar), "mmdebstrap")
        say("importing")
        args = ["import", "--change", "CMD /bin/bash", "--change", f"LABEL {LABEL}={fingerprint(folder)}"]
        done = podman(store, *args, str(tar), DEFAULT_IMAGE, timeout_s=BUILD_TIMEOUT_S)
        if done.returncode:
            raise ImageError(f"podman import failed: {done.stderr.strip()[-800:]}")


def _mmdebstrap(folder: Path, tar: Path) -> list[str]:
    without = [f"/usr/share/{name}/*" for name in ("doc", "man", "info", "locale")]
    leave_out = [option for path in without for option in ("--dpkgopt", f"path-exclude={path}")]
    include = ",".join(packages(folder))
    return ["mmdebstrap", "--variant=minbase", f"--include={include}", *leave_out, SUITE, str(tar)]


def _run(command: Sequence[str], name: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S, check=False)
    if done.returncode:
        raise ImageError(
            f"{name} failed (exit code {done.returncode}); its last words:\n{done.stderr.strip()[-1500:]}\n"
            "Is a Debian mirror reachable? `apt-get update` tells."
        )


def main(argv: Sequence[str] | None = None) -> int:
    options = _arguments(argv)
    try:
        _act(options, lambda text: print(f"  {text}", flush=True))
    except (ImageError, EngineError, subprocess.TimeoutExpired, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m runtime_server.images", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("action", choices=["ensure", "save", "list", "path"])
    parser.add_argument("file", type=Path, nargs="?", help="save: the archive to write")
    parser.add_argument("--from", dest="files", type=Path, action="append", default=[], metavar="FILE")
    parser.add_argument("--image", default=DEFAULT_IMAGE, help=f"save: which one (default {DEFAULT_IMAGE})")
    parser.add_argument("--store", type=Path, default=default_store())
    options = parser.parse_args(argv)
    if (options.action == "save") != (options.file is not None):
        parser.error("`save` takes the file to write, and nothing else takes one")
    return options


def _act(options: argparse.Namespace, say: Say) -> None:
    if options.action == "path":
        print(options.store)
    elif options.action == "list":
        print("\n".join(sorted(images(options.store))) or f"no image in {options.store}")
    elif options.action == "save":
        archives.save(options.store, options.image, options.file.absolute())
        say(f"wrote {options.image} to {options.file}")
    elif ensure(options.store, say, options.files):
        say(f"{DEFAULT_IMAGE} is there")


if __name__ == "__main__":
    sys.exit(main())
