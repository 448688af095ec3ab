"""The node-local image store: makes the sandbox image once, for every server of this user on this node.

How to run it
    python -m runtime_server.images ensure      make the default image when it is missing
    python -m runtime_server.images list        the images in the store
    python -m runtime_server.images path        where the store is

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
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from filelock import FileLock

DEFAULT_IMAGE = "localhost/orchestrate/sandbox:latest"
SUITE = "bookworm"
LABEL = "orchestrate.packages"
PULL_TIMEOUT_S = 600
BUILD_TIMEOUT_S = 900


class ImageError(Exception):
    """The image could not be made; the message says what to do."""


def default_store() -> Path:
    """Where this user's images lie on this node: local disk, never a home directory on NFS."""
    configured = os.environ.get("ORCHESTRATE_IMAGE_STORE")
    return Path(configured) if configured else Path(f"/var/tmp/orchestrate-{os.getuid()}/images")  # noqa: S108 - checked by private_directory


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


def podman(store: Path, *args: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    """Run podman on this store only: its own root, run root and temporary directory, overlay driver."""
    if shutil.which("podman") is None:
        raise ImageError(
            "podman is not installed. Debian: apt-get install podman; else ask an administrator."
        )
    with tempfile.TemporaryDirectory(prefix="orc-img-") as run:
        # podman's own database remembers where it ran; it lives as long as this call, the images stay
        conf, storage = Path(run) / "containers.conf", Path(run) / "storage.conf"
        conf.write_text(
            f'[engine]\nstatic_dir = "{run}/s"\ntmp_dir = "{run}/t"\n'
            'cgroup_manager = "cgroupfs"\nevents_logger = "none"\n'
        )
        storage.write_text(f'[storage]\ndriver = "overlay"\ngraphroot = "{store}"\nrunroot = "{run}/r"\n')
        files = {"CONTAINERS_CONF": str(conf), "CONTAINERS_STORAGE_CONF": str(storage)}
        environment = {**os.environ, **files, "XDG_RUNTIME_DIR": run}
        return subprocess.run(
            ["podman", *args], env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
        )


def fingerprint(folder: Path) -> str:
    """What the image is made of; an image with another one is made anew."""
    return hashlib.sha256(f"{SUITE} {sorted(packages(folder))}".encode()).hexdigest()[:16]


def images(store: Path) -> dict[str, dict[str, str]]:
    """Names in the store, each with its labels. An empty store has none."""
    if not (store / "overlay-images").is_dir():
        return {}
    listed = podman(store, "images", "--format", "json")
    if listed.returncode:
        raise ImageError(f"podman cannot read the image store {store}: {listed.stderr.strip()[-400:]}")
    rows = json.loads(listed.stdout or "[]")
    return {name: row.get("Labels") or {} for row in rows for name in row.get("Names") or []}


def ensure(store: Path, say: Callable[[str], None] = lambda _: None) -> bool:
    """Make the default image unless the store has it as packages.txt wants it. True when it was made."""
    private_directory(store)
    folder = recipe()
    with FileLock(store.parent / "images.lock", timeout=BUILD_TIMEOUT_S):
        if images(store).get(DEFAULT_IMAGE, {}).get(LABEL) == fingerprint(folder):
            return False
        if not _build_from_registry(store, folder, say):
            _build_from_debian(store, folder, say)
    return True


def _build_from_registry(store: Path, folder: Path, say: Callable[[str], None]) -> bool:
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


def _build_from_debian(store: Path, folder: Path, say: Callable[[str], None]) -> None:
    if shutil.which("mmdebstrap") is None:
        raise ImageError(
            "no registry answers and mmdebstrap is not installed. Debian: apt-get install mmdebstrap; "
            "elsewhere: make the image on another machine, `podman save` it, and load it into "
            f"`podman --root {store} load` as {DEFAULT_IMAGE}."
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
    parser = argparse.ArgumentParser(
        prog="python -m runtime_server.images", description=__doc__.split("\n")[0]
    )
    parser.add_argument("action", choices=["ensure", "list", "path"])
    parser.add_argument("--store", type=Path, default=default_store())
    options = parser.parse_args(argv)
    try:
        if options.action == "path":
            print(options.store)
        elif options.action == "list":
            print("\n".join(sorted(images(options.store))) or f"no image in {options.store}")
        elif ensure(options.store, say=lambda text: print(f"  {text}", flush=True)):
            print(f"  made {DEFAULT_IMAGE}", flush=True)
    except (ImageError, subprocess.TimeoutExpired, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
