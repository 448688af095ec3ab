"""An ordinary user of this machine, made up for a test: commands run as it, out of reach of root's files.

How to use it
    user = Ordinary.create(folder)          a user id of its own, with a home, and 65536 subordinate ids
    subprocess.run(user.command("id"))      also with `ids=False`: a user without subordinate ids

What it is
    Each command gets a mount namespace in which /etc/passwd and its companions are copies that know the
    user; what the tests are run from (interpreter, checkout) is shown where the user may read it.

What it does not do
    It changes no file of the machine, and needs root.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from runtime_server.engines import processes

CHECKOUT = Path(__file__).resolve().parents[2]
FIRST_UID, FIRST_SUBID, SUBIDS = 30_000, 1_000_000_000, 65_536

# The file `needed` has lines of two paths: a directory that only root may enter, and what is needed below it.
_ENTER = """
set -e
scratch=$1 uid=$2 home=$3; shift 3
for file in passwd group subuid subgid; do mount --bind "$scratch/$file" "/etc/$file"; done
n=0
while IFS=' ' read -r hidden needed; do
    n=$((n + 1)); mkdir -p "$scratch/keep$n"; mount --bind "$needed" "$scratch/keep$n"
done <"$scratch/needed"
cut -d' ' -f1 "$scratch/needed" | sort -u | while read -r hidden; do
    mount -t tmpfs -o mode=755 tmpfs "$hidden"
done
n=0
while IFS=' ' read -r hidden needed; do
    n=$((n + 1)); mkdir -p "$needed"; mount --bind "$scratch/keep$n" "$needed"; umount "$scratch/keep$n"
done <"$scratch/needed"
cd "$home"
exec setpriv --reuid="$uid" --regid="$uid" --clear-groups "$@"
"""


@dataclass(frozen=True)
class Ordinary:
    """One such user. `scratch` holds its home and the files that make it up."""

    uid: int
    scratch: Path

    @property
    def name(self) -> str:
        return f"ordinary{self.uid}"

    @property
    def home(self) -> Path:
        return self.scratch / "home"

    @property
    def disk(self) -> Path:
        return Path(f"/var/tmp/orchestrate-{self.uid}")  # where the program under test puts its images

    @classmethod
    def create(cls, scratch: Path, number: int = 0, ids: bool = True) -> Self:
        """Of another id in each test process; `number` tells several of one process apart."""
        user = cls(FIRST_UID + os.getpid() % 10_000 * 2 + number, scratch)
        scratch.mkdir(mode=0o755)
        user.home.mkdir(mode=0o755)
        os.chown(user.home, user.uid, user.uid)
        first = FIRST_SUBID + (user.uid - FIRST_UID) * SUBIDS
        user._account(f"{user.name}:{first}:{SUBIDS}\n" if ids else "")
        (scratch / "needed").write_text("".join(f"{a} {b}\n" for a, b in _out_of_reach()))
        return user

    def _account(self, subids: str) -> None:
        passwd = f"{self.name}:x:{self.uid}:{self.uid}::{self.home}:/bin/sh\n"
        (self.scratch / "passwd").write_text(Path("/etc/passwd").read_text() + passwd)
        (self.scratch / "group").write_text(Path("/etc/group").read_text() + f"{self.name}:x:{self.uid}:\n")
        for file in ("subuid", "subgid"):
            (self.scratch / file).write_text(subids)

    def command(self, *argv: str, env: dict[str, str] | None = None) -> list[str]:
        """What root has to run for the user to run `argv`; the pid is that of `argv`."""
        paths = [str(self.scratch), str(self.uid), str(self.home)]
        own = {"HOME": str(self.home), "USER": self.name, "PATH": os.environ["PATH"], "LANG": "C.UTF-8"}
        own |= {"PYTHONPATH": str(CHECKOUT), "PYTHONDONTWRITEBYTECODE": "1"} | (env or {})
        settings = ["env", "-i", *(f"{key}={value}" for key, value in own.items())]
        inside = ["sh", "-c", _ENTER, "sh", *paths, *settings, *argv]
        return ["unshare", "--mount", "--propagation", "private", *inside]

    def python(self, *argv: str, env: dict[str, str] | None = None) -> list[str]:
        return self.command(sys.executable, *argv, env=env)

    def run(self, *argv: str, timeout_s: float = 100) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.python(*argv), capture_output=True, text=True, timeout=timeout_s, check=False
        )

    def processes(self) -> dict[int, str]:
        """What runs as this user or as one of its subordinate ids."""
        first = FIRST_SUBID + (self.uid - FIRST_UID) * SUBIDS
        owners = {pid: _owner(pid) for pid in processes.all_pids() if processes.started(pid)}
        mine = [pid for pid, uid in owners.items() if uid == self.uid or 0 <= uid - first < SUBIDS]
        return {pid: processes.command_line(pid).decode(errors="replace") for pid in mine}

    def remove(self) -> None:
        shutil.rmtree(self.disk, ignore_errors=True)
        shutil.rmtree(self.scratch, ignore_errors=True)


def _owner(pid: int) -> int:
    try:
        return Path(f"/proc/{pid}").stat().st_uid
    except OSError:
        return -1


def _out_of_reach() -> list[tuple[Path, Path]]:
    """What the tests need and only root may reach: (the directory that is closed, the path below it)."""
    needed = {Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve(), CHECKOUT}
    closed = {path: _closed(path) for path in sorted(needed)}
    return [(above, path) for path, above in closed.items() if above is not None]


def _closed(path: Path) -> Path | None:
    for folder in [*reversed(path.parents), path]:
        if not folder.stat().st_mode & stat.S_IXOTH:
            return folder
    return None
