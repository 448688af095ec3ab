"""Moves the policy's work from its sandbox to one that it never touched, and nothing else with it.

What it is
    Two ways. `as_files`: every regular file of the task's directory, for directories that a task made
    itself. `as_patch`: what git says has changed since a commit, for repositories too large to move. Either
    way the tests of the task, whatever configures Python or pytest, and compiled code stay behind, in both
    directions: the fresh sandbox keeps its own.

How to use it
    await as_files(place, fresh, spared)

What it does not do
    It does not trust what it moves: the archive is read here, file by file, and links are left out. A
    sandbox whose git was tampered with can only give a wrong patch, and that is the policy's work as well.
"""

from __future__ import annotations

import io
import posixpath
import shlex
import tarfile
from collections.abc import Iterable, Mapping

from trainer.rewards import Place, Spoilt

LIMIT = 64 << 20
MOVE_S = 120.0
PATCH = ".work.patch"
CONFIGURING = (
    "conftest.py",
    "pytest.ini",
    ".pytest.ini",
    "pytest.toml",
    ".pytest.toml",
    "tox.ini",
    "setup.cfg",
    "pyproject.toml",
    "sitecustomize.py",
    "usercustomize.py",
)
"""Never moved: they say what pytest and Python do, wherever in the tree they are."""
FOLDERS = (".git", ".venv", "venv", "__pycache__", ".pytest_cache", "node_modules")
COMPILED = (".pyc", ".pyo", ".pth")
"""Python would run these instead of, or before, what the tests mean to import."""


def moves(path: str, spared: Iterable[str]) -> bool:
    """Whether a file of the policy, by its relative path, is part of its work."""
    folders, name = path.split("/")[:-1], posixpath.basename(path)
    return not (
        name in CONFIGURING
        or name.endswith(COMPILED)
        or any(folder in FOLDERS for folder in folders)
        or any(path == kept or path.startswith(kept.rstrip("/") + "/") for kept in spared)
    )


async def as_files(place: Place, fresh: Place, spared: tuple[str, ...] = ()) -> None:
    """All files; those that the policy removed are removed in `fresh`, too. Raises Spoilt."""
    work = await place.pack(LIMIT)
    before = await fresh.pack(LIMIT)
    kept = cleaned(work, spared)
    gone = sorted(names(before, spared) - names(kept, spared))
    if gone:
        done = await fresh.run("rm -f -- " + " ".join(map(shlex.quote, gone)), MOVE_S, 1024)
        if done.exit_code:
            raise Spoilt("what was removed cannot be removed again")
    await fresh.unpack(kept)


async def as_patch(place: Place, fresh: Place, base: str, spared: tuple[str, ...] = ()) -> None:
    """What git says has changed since the commit `base`. Raises Spoilt."""
    excluded = [f":(exclude,glob)**/{name}" for name in (*CONFIGURING, *(f"*{end}" for end in COMPILED))]
    excluded += [f":(exclude,glob)**/{folder}/**" for folder in FOLDERS]
    excluded += [f":(exclude){kept}" for kept in (*spared, PATCH)]
    chosen = " ".join(map(shlex.quote, [".", *excluded]))
    asked = (
        f"git add -A -f -N -- {chosen} && "
        f"git diff --binary --no-color --no-ext-diff --no-textconv {shlex.quote(base)} -- {chosen} > {PATCH}"
    )
    if (await place.run(asked, MOVE_S, 1024)).exit_code:
        raise Spoilt("git cannot say what was changed")
    patch = await place.read(PATCH, LIMIT)
    if patch is None or len(patch) >= LIMIT:
        raise Spoilt("the change is too large, or gone")
    if not patch.strip():
        return
    await fresh.unpack(_tar({PATCH: (patch, 0o644)}))
    done = await fresh.run(f"git apply --whitespace=nowarn {PATCH} && rm -f {PATCH}", MOVE_S, 1024)
    if done.exit_code:
        raise Spoilt("the change does not fit the repository that it began with")


def cleaned(tar: bytes, spared: Iterable[str]) -> bytes:
    """The regular files of an archive that are the policy's work. Raises Spoilt on what is no archive."""
    spared = tuple(spared)
    files: dict[str, tuple[bytes, int]] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(tar), mode="r:") as packed:
            for member in packed:
                name = posixpath.normpath(member.name)
                opened = packed.extractfile(member) if member.isreg() and _inside(name) else None
                if opened is not None and moves(name, spared):
                    files[name] = opened.read(), member.mode & 0o755
    except (tarfile.TarError, OSError) as error:
        raise Spoilt(f"the work cannot be read: {error}") from error
    return _tar(files)


def names(tar: bytes, spared: Iterable[str]) -> set[str]:
    """Paths of the regular files of an archive that would be moved."""
    spared = tuple(spared)
    with tarfile.open(fileobj=io.BytesIO(tar), mode="r:") as packed:
        found = {posixpath.normpath(member.name) for member in packed if member.isreg()}
    return {name for name in found if _inside(name) and moves(name, spared)}


def _inside(name: str) -> bool:
    return not (name.startswith("/") or name == ".." or name.startswith("../"))


def _tar(files: Mapping[str, tuple[bytes, int]]) -> bytes:
    """An archive of contents and modes by path."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, (content, mode) in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), mode
            tar.addfile(member, io.BytesIO(content))
    return packed.getvalue()
