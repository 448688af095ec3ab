"""Code that earlier launches took, kept beside the runs: a new run gets links to what has not changed.

What it is
    A private folder of read-only files. The name of each says of which version of which file it is a copy:
    device, inode, size, mode, and the times of modification and of change, which no program can choose. A
    run links them into its own directory, so that it stays whole when the store is removed, and the other
    way round; files that no run links any more are removed after a day.

How to use it
    store = Store.of(runs_dir, checkout)
    store.link(source, target) or copy…, store.keep(about, target)

What it does not do
    It links no file of the user's own, for those are edited, and trusts no folder that others may write
    to. It is a cache: where it cannot be used, everything is copied.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from pathlib import Path
from typing import Self

SETTLED_S = 10.0
"""A file that changed a moment ago may change again within the same tick of the filesystem's clock, and look
as it did before: it is copied, not kept. Long enough for clocks that are seconds apart."""
UNUSED_S = 86_400.0

_WRITE = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH


def read_only(mode: int) -> int:
    """The permissions of a file as a snapshot has it: an edit in place would be one of many runs at once."""
    return stat.S_IMODE(mode) & ~_WRITE


class Store:
    """The copies of one checkout's files."""

    def __init__(self, folder: Path, settled_s: float = SETTLED_S) -> None:
        self.folder, self.settled_s, self.unused_s = str(folder), settled_s, UNUSED_S

    @classmethod
    def of(cls, runs_dir: Path, checkout: Path) -> Self | None:
        """That of this user and checkout; None where there can be none."""
        ours = runs_dir / f".code-{os.geteuid()}"
        folder = ours / str(checkout).replace("%", "%25").replace("/", "%2F")
        try:
            ours.mkdir(mode=0o700, parents=True, exist_ok=True)
            about = ours.lstat()
            if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.geteuid() or about.st_mode & 0o022:
                return None  # somebody else could put code there that we would run
            folder.mkdir(mode=0o700, exist_ok=True)
        except OSError:  # a name that is too long, a full disk: what matters will say so again
            return None
        return cls(folder)

    def link(self, source: str, target: str) -> bool:
        """Make `target` the copy of `source` as it is now. False when there is no such copy.

        The source is opened, not only looked at: that is when NFS asks the server how it stands.
        """
        descriptor = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
        try:
            about = os.fstat(descriptor)
        finally:
            os.close(descriptor)
        kept = self._name(about)
        with contextlib.suppress(OSError):  # no copy yet, too many links of it, or no links at all here
            if _is_copy(os.stat(kept), about):  # noqa: PTH116 - hundreds of files, while somebody waits
                os.link(kept, target)
                return True
            os.unlink(kept)  # noqa: PTH108 - somebody has edited it in place
        return False

    def keep(self, about: os.stat_result, target: str) -> None:
        """Link `target` for launches to come, a durable copy of a file that looked like `about` before and
        after it was copied."""
        if time.time() - max(about.st_mtime, about.st_ctime) < self.settled_s:
            return
        with contextlib.suppress(OSError):
            if _is_copy(os.stat(target), about):  # noqa: PTH116 - the clock here may be coarser than there
                os.link(target, self._name(about))

    def prune(self) -> None:
        """Remove what no run has linked for a day: losing its last run was its last change."""
        with contextlib.suppress(OSError), os.scandir(self.folder) as entries:
            for entry in entries:
                about = entry.stat(follow_symlinks=False)
                if about.st_nlink == 1 and time.time() - about.st_ctime > self.unused_s:
                    os.unlink(entry.path)  # noqa: PTH108

    def _name(self, about: os.stat_result) -> str:
        of = (about.st_dev, about.st_ino, about.st_size, about.st_mode, about.st_mtime_ns, about.st_ctime_ns)
        return f"{self.folder}/{'-'.join(f'{number:x}' for number in of)}"


def _is_copy(copy: os.stat_result, about: os.stat_result) -> bool:
    return (copy.st_size, copy.st_mtime_ns, stat.S_IMODE(copy.st_mode)) == (
        about.st_size,
        about.st_mtime_ns,
        read_only(about.st_mode),
    )
