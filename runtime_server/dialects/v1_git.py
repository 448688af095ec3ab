"""What changed in a repository inside a sandbox, as OpenHands V1 asks for it.

What it does not do
    It runs the image's own git, and without one there are no changes to tell of.
"""

from __future__ import annotations

import posixpath
import re

from runtime_server.agent import Finished
from runtime_server.dialects.common import Fault
from runtime_server.dialects.inside import Inside, join

EMPTY_TREE = "4b825dc642cb6eb9a060e54bf8d69288fbee4904"
FILE_MAX = 1 << 20
_SHA = re.compile(r"[0-9a-fA-F]{4,64}")
_STATUS = {"A": "ADDED", "D": "DELETED", "M": "UPDATED", "T": "UPDATED", "U": "UPDATED", "C": "ADDED"}


async def _git(inside: Inside, cwd: str, *words: str) -> Finished:
    return await inside.run(["git", "--no-pager", "-c", "safe.directory=*", *words], cwd=cwd, timeout_s=50)


def _text(done: Finished) -> str:
    return done.stdout.data.decode(errors="replace").strip()


async def _is_repository(inside: Inside, path: str) -> bool:
    if await inside.kind(path) != "d":
        return False
    return (await _git(inside, path, "rev-parse", "--git-dir")).exit_code == 0


async def _reference(inside: Inside, repo: str, asked: str | None) -> str:
    """What to compare with: what was asked for, else the upstream branch, the default one, else nothing."""
    if asked:
        if asked.startswith("-"):
            raise Fault(400, "a ref does not begin with '-'")
        done = await _git(inside, repo, "rev-parse", "--verify", "--quiet", f"{asked}^{{commit}}")
        if done.exit_code:
            raise Fault(400, f"{asked!r} is no commit of this repository")
        return _text(done)
    for candidate in ("@{upstream}", "origin/HEAD", "HEAD"):
        done = await _git(inside, repo, "rev-parse", "--verify", "--quiet", f"{candidate}^{{commit}}")
        if done.exit_code == 0:
            return _text(done)
    return EMPTY_TREE


async def changes(inside: Inside, path: str, ref: str | None) -> list[dict[str, str]]:
    """Of files below `path`; [] where there is no repository. Fault 400 with what git said."""
    where = join(inside.box.workdir, path)
    if not await _is_repository(inside, where):
        return []
    base = await _reference(inside, where, ref)
    diff = await _git(inside, where, "diff", "--name-status", "-z", "--relative", base)
    if diff.exit_code:
        raise Fault(400, diff.stderr.data.decode(errors="replace").strip() or "git diff failed")
    new = await _git(inside, where, "ls-files", "-z", "--others", "--exclude-standard")
    found = _named(diff.stdout.data.decode(errors="replace").split("\0"))
    return found + [{"status": "ADDED", "path": name} for name in _text(new).split("\0") if name]


def _named(parts: list[str]) -> list[dict[str, str]]:
    """`git diff --name-status -z`: a letter, a name; of a rename two names, old and new."""
    found: list[dict[str, str]] = []
    rest = iter(part for part in parts if part)
    for letter in rest:
        name = next(rest, "")
        if letter[0] in "RC":
            new = next(rest, "")
            found += [{"status": "DELETED", "path": name}] if letter[0] == "R" else []
            letter, name = "A", new
        found.append({"status": _STATUS.get(letter[0], "UPDATED"), "path": name})
    return found


async def diff(inside: Inside, path: str, ref: str | None, commit: str | None) -> dict[str, str | None]:
    """One file, before and after. Fault 400 when it exists neither now nor then."""
    where = join(inside.box.workdir, path)
    folder, name = posixpath.split(where)
    while folder != "/" and await inside.kind(folder) != "d":  # its directory may have gone with it
        folder, last = posixpath.split(folder)
        name = posixpath.join(last, name)
    if not await _is_repository(inside, folder):
        raise Fault(400, f"File is not in a git repository: {where}")
    if commit:
        if ref or not _SHA.fullmatch(commit):
            raise Fault(400, "commit is a hexadecimal id, and goes without ref")
        before, after = f"{commit}^", await _at(inside, folder, commit, name)
    else:
        before, after = await _reference(inside, folder, ref), await _now(inside, where)
    original = await _at(inside, folder, before, name)
    if original is None and after is None:
        raise Fault(400, f"File does not exist: {where}")
    return {"modified": after if after is not None or commit else "", "original": original}


async def _at(inside: Inside, folder: str, commit: str, name: str) -> str | None:
    done = await _git(inside, folder, "show", f"{commit}:./{name}")
    return None if done.exit_code else done.stdout.data.decode(errors="replace")


async def _now(inside: Inside, path: str) -> str | None:
    if await inside.kind(path) != "f":
        return None
    data = await inside.get(path)
    if len(data) > FILE_MAX:
        raise Fault(400, f"File too large for git diff: {len(data)} bytes (max: {FILE_MAX} bytes)")
    return data.decode(errors="replace")
