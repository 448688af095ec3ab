"""A snapshot of the code that a run will execute, so that later edits change nothing.

What it is
    `take` copies what git knows of the checkout (tracked, and untracked but not ignored), but tests and
    documentation, into the run directory and says which commit it was and what differed from it. Without
    git it copies the folders of the project.

What it does not do
    It never copies what looks like a secret, what is large, or what lies in the runs directory; it says
    what it left out. It changes nothing in the checkout.
"""

from __future__ import annotations

import fnmatch
import os
import stat
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from orchestrator.durable import fsync_directory

_AT_ONCE = 4

MAX_FILE = 4 << 20
"""Bytes; larger files are data, not code."""
MAX_PATCH = 16 << 20

BUILT = ("runtime_server/agent/bin",)
"""Ignored by git, yet part of what runs: the compiled agent."""
NOT_RUN = ("tests/", "docs/")
"""Folders of the checkout that no job runs: nearly half of its files. Commit and patch tell of them."""
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
    """Copy the code of `checkout` to the new folder `into`, durably. Paths in or below `never` are left out.

    Raises OSError.
    """
    questions = {name: _Git(checkout, *arguments) for name, arguments in _QUESTIONS.items()}
    listed = questions["files"].answer()
    names = sorted({n for n in listed.split("\0") if n}) if listed is not None else list(_walk(checkout))
    forbidden = [os.path.realpath(path) for path in never]
    real = os.path.realpath(checkout)
    left_out, wanted = [], []
    for name in [*(n for n in names if not n.startswith(NOT_RUN)), *_built(checkout)]:
        reason = _refuse(real, name, forbidden)
        if reason is None:
            wanted.append(name)
        elif reason:
            left_out.append(f"{name} ({reason})")
    _copy_all(real, into, wanted)
    return _with_commit(checkout, questions, len(wanted), left_out)


def _refuse(checkout: str, name: str, forbidden: list[str]) -> str | None:
    """Why a file is left out; None when it is copied, "" when it is not worth a word.

    Strings, not Path objects: this runs for each of hundreds of files while somebody waits.
    """
    target = os.path.realpath(f"{checkout}/{name}")
    try:
        about = os.stat(target)  # noqa: PTH116 - see above
    except OSError:  # deleted but still in the index, a dangling link
        return ""
    if not stat.S_ISREG(about.st_mode):  # a submodule
        return ""
    if any(target == f or target.startswith(f + os.sep) for f in forbidden):
        return ""
    if not target.startswith(checkout + os.sep):
        return "a link that leads out of the checkout"
    if is_secret(PurePath(name)) or is_secret(PurePath(target)):
        return "looks like a secret"
    return f"larger than {MAX_FILE >> 20} MiB" if about.st_size > MAX_FILE else None


def _copy_all(checkout: str, into: Path, names: Iterable[str]) -> None:
    """Copy the files, then make them durable with their folders: a job may start on another host while
    this one still has them in memory only. Several at once, for a disk commits them together."""
    into.mkdir()
    folders = {"": into}
    for name in names:
        folder = os.path.dirname(name)  # noqa: PTH120 - see _refuse
        if folder not in folders:
            folders[folder] = into / folder
            folders[folder].mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for _ in pool.map(lambda name: _copy(f"{checkout}/{name}", f"{into}/{name}"), names):
            pass
        every = {parent for folder in folders.values() for parent in (folder, *folder.parents)}
        for _ in pool.map(fsync_directory, [f for f in every if f.is_relative_to(into)]):
            pass


def _copy(source: str, target: str) -> None:
    """With its mode and times: what was built stays newer than its source."""
    with open(source, "rb", buffering=0) as old, open(target, "xb", buffering=0) as new:  # noqa: PTH123
        about = os.fstat(old.fileno())
        while os.sendfile(new.fileno(), old.fileno(), None, MAX_FILE):
            pass
        os.fchmod(new.fileno(), stat.S_IMODE(about.st_mode))
        os.utime(new.fileno(), ns=(about.st_atime_ns, about.st_mtime_ns))
        os.fsync(new.fileno())


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


_QUESTIONS = {
    "files": ("ls-files", "-z", "--cached", "--others", "--exclude-standard"),
    "commit": ("rev-parse", "HEAD"),
    "status": ("status", "--porcelain", "-z"),
    "changed": ("diff", "--relative", "--name-only", "-z", "HEAD"),
}
"""Asked all at once; the answers are collected after the files were copied."""


def _with_commit(checkout: Path, questions: Mapping[str, _Git], copied: int, left_out: list[str]) -> Snapshot:
    commit = (questions["commit"].answer() or "").strip()
    status, changed = questions["status"].answer() or "", questions["changed"].answer() or ""
    return Snapshot(commit, bool(status), _patch(checkout, changed) if commit else "", copied, left_out)


def _patch(checkout: Path, changed: str) -> str:
    """The diff of tracked files to the commit, secrets left out."""
    names = [n for n in changed.split("\0") if n and not is_secret(PurePath(n))]
    if not names:
        return ""
    patch = _Git(checkout, "diff", "--relative", "--no-ext-diff", "HEAD", "--", *names).answer() or ""
    return patch if len(patch) <= MAX_PATCH else f"# {len(patch)} bytes of changes, too many to keep\n"


class _Git:
    """A git command that runs while we do something else."""

    def __init__(self, checkout: Path, *arguments: str) -> None:
        # without optional locks: several at once must not refuse each other the index
        argv = ["git", "--no-optional-locks", "-C", str(checkout), *arguments]
        self._out = tempfile.TemporaryFile()  # noqa: SIM115 - a pipe would block it until it is read
        try:
            self._process: subprocess.Popen[bytes] | None = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=self._out, stderr=subprocess.DEVNULL
            )
        except OSError:
            self._process = None

    def answer(self) -> str | None:
        """Its output; None when there is no git, this is no repository of ours, or it hangs."""
        with self._out:
            if self._process is None:
                return None
            try:
                code = self._process.wait(60)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
                return None
            self._out.seek(0)
            return self._out.read().decode(errors="surrogateescape") if code == 0 else None
