"""A snapshot of the code that a run will execute, so that later edits change nothing.

What it is
    `take` copies what git knows of the checkout (tracked, and untracked but not ignored) into the run
    directory and says which commit it was and what differed from it. Without git it copies the folders
    of the project.

What it does not do
    It never copies what looks like a secret, what is large, or what lies in the runs directory; it says
    what it left out. It changes nothing in the checkout.
"""

from __future__ import annotations

import fnmatch
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath

MAX_FILE = 4 << 20
"""Bytes; larger files are data, not code."""
MAX_PATCH = 16 << 20

BUILT = ("runtime_server/agent/bin",)
"""Ignored by git, yet part of what runs: the compiled agent."""
FOLDERS = ("orchestrator", "runtime_server", "trainer", "config", "jobs", "images")

_SECRET = (
    *(".env", ".env.*", "*.env", "env.sh", ".netrc", "_netrc", ".pypirc", ".npmrc", ".pgpass"),
    *("*.pem", "*.key", "*.p12", "*.pfx", "*.kdbx", "id_rsa*", "id_ed25519*", "id_ecdsa*"),
    "runtime_api_key.txt",
)
_VAGUE = ("*secret*", "*credential*", "*password*")  # secrets, unless it is source code
_SOURCE = {".py", ".pyi", ".c", ".h", ".sh", ".md", ".toml"}


@dataclass(frozen=True)
class Snapshot:
    """What was taken: `commit` is "" without git, `patch` is the diff of tracked files to it."""

    commit: str = ""
    dirty: bool = False
    patch: str = ""
    files: int = 0
    left_out: list[str] = field(default_factory=list)


def is_secret(path: PurePath) -> bool:
    """True for names that usually hold keys or passwords."""
    name = path.name.lower()
    if any(fnmatch.fnmatch(name, pattern) for pattern in _SECRET):
        return True
    return path.suffix not in _SOURCE and any(fnmatch.fnmatch(name, pattern) for pattern in _VAGUE)


def take(checkout: Path, into: Path, never: Iterable[Path] = ()) -> Snapshot:
    """Copy the code of `checkout` to the new folder `into`. Paths in or below `never` are left out.

    Raises OSError.
    """
    listed = _git(checkout, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    names = sorted({n for n in listed.split("\0") if n}) if listed is not None else list(_walk(checkout))
    forbidden = [path.resolve() for path in never]
    into.mkdir()
    left_out = []
    copied = 0
    for name in [*names, *_built(checkout)]:
        reason = _refuse(checkout, name, forbidden)
        if reason is None:
            _copy(checkout / name, into / name)
            copied += 1
        elif reason:
            left_out.append(f"{name} ({reason})")
    return _with_commit(checkout, copied, left_out)


def _refuse(checkout: Path, name: str, forbidden: list[Path]) -> str | None:
    """Why a file is left out; None when it is copied, "" when it is not worth a word."""
    path = checkout / name
    target = path.resolve()
    if not target.is_file():  # deleted but still in the index, a submodule, a dangling link
        return ""
    if any(target.is_relative_to(f) for f in forbidden):
        return ""
    if not target.is_relative_to(checkout.resolve()):
        return "a link that leads out of the checkout"
    if is_secret(PurePath(name)) or is_secret(target):
        return "looks like a secret"
    return f"larger than {MAX_FILE >> 20} MiB" if path.stat().st_size > MAX_FILE else None


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source, target)  # with its times: what was built stays newer than its source


def _built(checkout: Path) -> list[str]:
    return [
        str(path.relative_to(checkout))
        for folder in BUILT
        for path in sorted((checkout / folder).glob("*"))
        if path.is_file() and not path.name.endswith(".lock")
    ]


def _walk(checkout: Path) -> Iterator[str]:
    yield from (name for name in ("pyproject.toml",) if (checkout / name).is_file())
    for folder in FOLDERS:
        for path in sorted((checkout / folder).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                yield str(path.relative_to(checkout))


def _with_commit(checkout: Path, copied: int, left_out: list[str]) -> Snapshot:
    commit = (_git(checkout, "rev-parse", "HEAD") or "").strip()
    status = _git(checkout, "status", "--porcelain", "-z") or ""
    return Snapshot(commit, bool(status), _patch(checkout) if commit else "", copied, left_out)


def _patch(checkout: Path) -> str:
    """The diff of tracked files to the commit, secrets left out."""
    changed = _git(checkout, "diff", "--relative", "--name-only", "-z", "HEAD") or ""
    names = [n for n in changed.split("\0") if n and not is_secret(PurePath(n))]
    if not names:
        return ""
    patch = _git(checkout, "diff", "--relative", "--no-ext-diff", "HEAD", "--", *names) or ""
    return patch if len(patch) <= MAX_PATCH else f"# {len(patch)} bytes of changes, too many to keep\n"


def _git(checkout: Path, *arguments: str) -> str | None:
    """Output of a git command; None when there is no git, or this is no repository of ours."""
    try:
        done = subprocess.run(
            ["git", "-C", str(checkout), *arguments], capture_output=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode(errors="surrogateescape") if done.returncode == 0 else None
