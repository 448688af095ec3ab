"""A snapshot of the code that a run will execute, so that later edits change nothing.

What it is
    `take` copies what git knows of the checkout (tracked, and untracked but not ignored), but tests and
    documentation, into the run directory and says which commit it was and what differed from it. Without
    git it copies the folders of the project.

    What has not changed since an earlier launch is linked from a store of copies (`orchestrator.code_store`).

What it does not do
    It never copies what looks like a secret, what is large, or what lies in the runs directory; it says
    what it left out. It changes nothing in the checkout.
"""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePath
from threading import Thread
from typing import Self, TypeVar

from orchestrator.code_store import Store, read_only
from orchestrator.durable import fsync_directory
from orchestrator.frozen import dataclass, field

T = TypeVar("T")

_AT_ONCE = 4

MAX_FILE = 4 << 20
"""Bytes; larger files are data, not code."""
MAX_PATCH = 16 << 20

BUILT = ("runtime_server/agent/bin",)
"""Ignored by git, yet part of what runs: the compiled agent."""
NOT_RUN = ("tests/", "docs/")
"""Folders of the checkout that no job runs: nearly half of its files. Commit and patch tell of them."""
FOLDERS = ("orchestrator", "runtime_server", "trainer", "config", "jobs", "images")

_SECRET = {"env.sh", ".netrc", "_netrc", ".pypirc", ".npmrc", ".pgpass", "runtime_api_key.txt"}
_SECRET_STARTS = (".env.", "id_rsa", "id_ed25519", "id_ecdsa")
_SECRET_ENDS = (".env", ".pem", ".key", ".p12", ".pfx", ".kdbx")
_VAGUE = ("secret", "credential", "password")  # secrets, unless it is source code
_SOURCE = {".py", ".pyi", ".c", ".h", ".sh", ".md", ".toml"}


@dataclass(frozen=True)
class Snapshot:
    """What was taken: `commit` is "" without git, `patch` is the diff of tracked files to it."""

    commit: str = ""
    dirty: bool = False
    patch: str = ""
    files: int = 0
    left_out: list[str] = field(default_factory=list)


def is_secret(path: str | PurePath) -> bool:
    """True for names that usually hold keys or passwords."""
    given = os.path.basename(path)  # noqa: PTH119 - see _real
    name = given.lower()
    if name in _SECRET or name.startswith(_SECRET_STARTS) or name.endswith(_SECRET_ENDS):
        return True
    return any(word in name for word in _VAGUE) and PurePath(given).suffix not in _SOURCE


def take(
    checkout: Path,
    into: Path,
    never: Iterable[Path] = (),
    asked: Asked | None = None,
    store: Store | None = None,
) -> Snapshot:
    """Copy the code of `checkout` to the new folder `into`, durably. Paths in or below `never` are left out.

    `asked` is about the same checkout, when git was asked before; `store` has copies on the same filesystem
    as `into`. Raises OSError.
    """
    with asked or Asked(checkout) as questions:
        return _take(checkout, into, never, questions, store)


class Taking(Thread):
    """A snapshot that is taken while the caller does something else; `join` before what it writes to is
    removed."""

    def __init__(
        self,
        checkout: Path,
        into: Path,
        never: Iterable[Path] = (),
        asked: Asked | None = None,
        store: Store | None = None,
    ) -> None:
        super().__init__(name="snapshot")
        self._take: Callable[[], Snapshot] = lambda: take(checkout, into, never, asked, store)
        self._taken: Snapshot | None = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._taken = self._take()
        except BaseException as error:  # raised again by `result`, in the caller's thread
            self._error = error

    def result(self) -> Snapshot:
        """What was taken, once it was. Raises OSError."""
        self.join()
        if self._taken is None:
            raise self._error or AssertionError("the thread has ended without a word")
        return self._taken


def _take(
    checkout: Path, into: Path, never: Iterable[Path], questions: Asked, store: Store | None
) -> Snapshot:
    listed = questions.answer("files")
    names = sorted({n for n in listed.split("\0") if n}) if listed is not None else list(_walk(checkout))
    forbidden = [os.path.realpath(path) for path in never]
    real = os.path.realpath(checkout)
    folders: dict[str, str] = {}
    left_out: list[str] = []
    wanted: list[str] = []
    for name in dict.fromkeys([*(n for n in names if not n.startswith(NOT_RUN)), *_built(checkout)]):
        reason = _refuse(real, name, *_real(real, name, folders), forbidden)
        if reason is None:
            wanted.append(name)
        elif reason:
            left_out.append(f"{name} ({reason})")
    _copy_all(real, into, wanted, store)
    return _with_commit(checkout, questions, len(wanted), left_out)


def _real(checkout: str, name: str, folders: dict[str, str]) -> tuple[str, os.stat_result | None]:
    """`realpath` of a file, that of its folder only asked for once, and how it stands; None when it is gone
    but still in the index, or a dangling link.

    Strings, not Path objects: this runs for each of hundreds of files while somebody waits.
    """
    folder, _, last = name.rpartition("/")
    if folder not in folders:
        folders[folder] = os.path.realpath(f"{checkout}/{folder}")
    path = f"{folders[folder]}/{last}"
    with contextlib.suppress(OSError):
        about = os.lstat(path)
        if not stat.S_ISLNK(about.st_mode):
            return path, about
        path = os.path.realpath(path)
        return path, os.stat(path)  # noqa: PTH116 - see above
    return path, None


def _refuse(
    checkout: str, name: str, target: str, about: os.stat_result | None, forbidden: list[str]
) -> str | None:
    """Why a file is left out; None when it is copied, "" when it is not worth a word."""
    if about is None or not stat.S_ISREG(about.st_mode):  # nothing, or a submodule
        return ""
    if any(target == f or target.startswith(f + os.sep) for f in forbidden):
        return ""
    if not target.startswith(checkout + os.sep):
        return "a link that leads out of the checkout"
    if is_secret(name) or (not target.endswith(f"/{name}") and is_secret(target)):
        return "looks like a secret"
    return f"larger than {MAX_FILE >> 20} MiB" if about.st_size > MAX_FILE else None


def _copy_all(checkout: str, into: Path, names: Sequence[str], store: Store | None) -> None:
    """Link or copy the files, then make them durable with their folders: a job may start on another host
    while this one still has them in memory only."""
    folders = _make_folders(into, names)
    new = [n for n in names if store is None or not store.link(f"{checkout}/{n}", f"{into}/{n}")]
    if new:  # several at once, for a disk commits them together
        _several(lambda name: _copy(f"{checkout}/{name}", f"{into}/{name}", store), new)
    if new and store is not None:
        store.prune()
    _several(fsync_directory, folders)


def _make_folders(into: Path, names: Sequence[str]) -> list[Path]:
    """`into` and the folders of the files below it, made and returned."""
    into.mkdir()
    made = {"": str(into)}

    def make(folder: str) -> None:
        if folder not in made:
            make(folder.rpartition("/")[0])
            made[folder] = f"{into}/{folder}"
            os.mkdir(made[folder])  # noqa: PTH102 - see _real

    for name in names:
        make(name.rpartition("/")[0])
    return [Path(folder) for folder in made.values()]


def _several(work: Callable[[T], object], items: Sequence[T]) -> None:
    """Do it to all, several at once. Raises the first error, after every thread has stopped.

    concurrent.futures does the same, and takes as long to import as all the copying.
    """
    errors: list[BaseException] = []

    def some(part: Sequence[T]) -> None:
        try:
            for item in part:
                if not errors:
                    work(item)
        except BaseException as error:  # raised below, in the caller's thread
            errors.append(error)

    threads = [Thread(target=some, args=(items[i::_AT_ONCE],)) for i in range(_AT_ONCE)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def _copy(source: str, target: str, store: Store | None) -> None:
    """With its times, so that what was built stays newer than its source, and its mode, but read-only."""
    with open(source, "rb", buffering=0) as old, open(target, "xb", buffering=0) as new:  # noqa: PTH123
        about = os.fstat(old.fileno())
        while os.sendfile(new.fileno(), old.fileno(), None, MAX_FILE):
            pass
        os.fchmod(new.fileno(), read_only(about.st_mode))
        os.utime(new.fileno(), ns=(about.st_atime_ns, about.st_mtime_ns))
        os.fsync(new.fileno())
        unchanged = _version(os.fstat(old.fileno())) == _version(about)
    if store is not None and unchanged:
        store.keep(about, target)


def _version(about: os.stat_result) -> tuple[int, ...]:
    return about.st_size, about.st_mode, about.st_mtime_ns, about.st_ctime_ns


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
    "status": ("status", "--porcelain=v2", "--branch", "-z"),
}
"""Asked at once; the answer about the commit is collected after the files were copied."""
_OID = "# branch.oid "
_TRACKED = ("1 ", "2 ", "u ")
"""How a line about a tracked file that differs from the commit begins."""


def _with_commit(checkout: Path, questions: Asked, copied: int, left_out: list[str]) -> Snapshot:
    about = [line for line in (questions.answer("status") or "").split("\0") if line]
    commit = next((line.removeprefix(_OID) for line in about if line.startswith(_OID)), "")
    if not commit or commit == "(initial)":
        return Snapshot("", any(not line.startswith("# ") for line in about), "", copied, left_out)
    dirty = any(not line.startswith("# ") for line in about)
    patch = _patch(checkout) if any(line.startswith(_TRACKED) for line in about) else ""
    return Snapshot(commit, dirty, patch, copied, left_out)


def _patch(checkout: Path) -> str:
    """The diff of tracked files to the commit, secrets left out."""
    changed = _ask(checkout, "diff", "--relative", "--name-only", "-z", "HEAD")
    names = [n for n in changed.split("\0") if n and not is_secret(n)]
    if not names:
        return ""
    patch = _ask(checkout, "diff", "--relative", "--no-ext-diff", "HEAD", "--", *names)
    return patch if len(patch) <= MAX_PATCH else f"# {len(patch)} bytes of changes, too many to keep\n"


def _ask(checkout: Path, *arguments: str) -> str:
    with _Git(checkout, *arguments) as git:
        return git.answer() or ""


@contextlib.contextmanager
def asked(checkout: Path | None) -> Iterator[Asked | None]:
    """Ask ahead of `take`; None where there is no checkout to ask about."""
    if checkout is None:
        yield None
        return
    with Asked(checkout) as questions:
        yield questions


class Asked:
    """What is asked of git about a checkout, the answers on their way. Leaving the context ends what is
    still running."""

    def __init__(self, checkout: Path) -> None:
        self._git = {name: _Git(checkout, *arguments) for name, arguments in _QUESTIONS.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for git in self._git.values():
            git.close()

    def answer(self, name: str) -> str | None:
        return self._git[name].answer()


class _Git:
    """A git command that runs while we do something else."""

    def __init__(self, checkout: Path, *arguments: str) -> None:
        # without optional locks: several at once must not refuse each other the index
        argv = ["git", "--no-optional-locks", "-C", str(checkout), *arguments]
        self._process: subprocess.Popen[bytes] | None = None
        self._out = open(os.memfd_create("git"), "rb")  # noqa: SIM115, PTH123 - a pipe would block it until read
        with contextlib.suppress(OSError):
            self._process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=self._out, stderr=subprocess.DEVNULL
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._out.close()

    def answer(self) -> str | None:
        """Its output; None when there is no git, this is no repository of ours, or it hangs."""
        if self._process is None:
            return None
        try:
            code = self._process.wait(60)
        except subprocess.TimeoutExpired:
            self.close()
            return None
        self._out.seek(0)
        return self._out.read().decode(errors="surrogateescape") if code == 0 else None
