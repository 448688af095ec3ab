"""Gives a running, empty container its root directory: an overlay of an image's layers, in 2 ms.

How to run it
    python runtime_server/engines/dresser.py DIR      one JSON request a line on stdin, one answer on stdout
    `layers.py` starts it inside the namespaces of the engine's service and speaks to it. DIR is empty.

What it is
    dress   {"pid", "links", "lowers", "upper", "work", "options", "workdir"}   see `dress`
    freeze  {"source", "target"}                 copy a writable layer as it is; answers size and digest
    remove  {"path"}                             remove a tree, whoever of the mapped ids owns it
    The container's first process waits in a root directory that holds nothing. The overlay is mounted here,
    taken off again as a detached mount, moved into the container's mount namespace, and made its root with
    pivot_root, which takes the processes along that have the old root. So no mount of a sandbox is ever
    attached anywhere but in the sandbox: it ends with it, whatever is killed.

What it does not do
    It imports nothing of the project and is started as a file. It runs no code of the container, follows no
    link of the image (a `/proc` that is one is refused), and dresses nobody twice.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

NEWNS = 0x0002_0000
MS_NOSUID, MS_NODEV, MS_MOVE, MNT_DETACH = 2, 4, 0x2000, 2
OPEN_TREE, MOVE_MOUNT, PIVOT_ROOT, OPENAT2 = 428, 429, 155, 437
FSOPEN, FSCONFIG, FSMOUNT = 430, 431, 432
SET_FLAG, SET_STRING, CREATE, FSOPEN_CLOEXEC, MOUNT_NODEV = 0, 1, 6, 1, 4
VALUE_MAX = 256  # of one option, when the options are set one by one
CLONE, CLOEXEC, EMPTY_PATH, RECURSIVE, CWD = 1, os.O_CLOEXEC, 0x1000, 0x8000, -100
FROM_EMPTY_PATH = 4
RESOLVE_NO_MAGIC, RESOLVE_IN_ROOT, RESOLVE_NO_LINKS = 0x02, 0x10, 0x04
MOUNTS = ("proc", "sys", "dev")
AGENT = ".orchestrate"
NEW = "/new"  # a directory in the empty root
HOSTS = b"127.0.0.1\tlocalhost sandbox\n::1\tlocalhost\n"
HASHED_BYTES, HASHED_FILES = 64 << 20, 5000  # above that, what it holds would cost more than copying it
_libc = ctypes.CDLL(None, use_errno=True)
if os.uname().machine == "aarch64":
    PIVOT_ROOT = 41


class _How(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    arguments = [os.fsencode(text) for text in (source, target, kind)]
    _check(_libc.mount(*arguments, flags, os.fsencode(data)), f"mount {target}")


def _syscall(number: int, *arguments: object, what: str) -> int:
    return _check(_libc.syscall(number, *arguments), what)


def _enter(descriptor: int) -> None:
    _check(_libc.setns(descriptor, NEWNS), "setns")


def _in_root(root: int, path: str, flags: int, resolve: int = RESOLVE_IN_ROOT) -> int:
    """Open below `root` as if that were `/`, whatever links the image has."""
    how = _How(flags | os.O_CLOEXEC, 0, resolve | RESOLVE_NO_MAGIC)
    number = ctypes.c_long(OPENAT2)
    return _syscall(
        number.value, root, os.fsencode(path), ctypes.byref(how), ctypes.sizeof(how), what=f"open {path}"
    )


def detached(request: dict[str, Any], here: str) -> int:
    """The overlay as a mount that is attached nowhere."""
    os.chdir(request["links"])  # the layers by short names: the options have room for 4096 bytes
    values = {
        "lowerdir": ":".join(request["lowers"]),
        "upperdir": request["upper"],
        "workdir": request["work"],
    }
    flags = [name for name in request["options"].split(",") if name]
    if max(map(len, values.values())) < VALUE_MAX:
        with contextlib.suppress(OSError):  # the other way says what is wrong
            return _made(values, flags)
    return _taken_off(",".join([*(f"{name}={value}" for name, value in values.items()), *flags]), here)


def _made(values: dict[str, str], flags: list[str]) -> int:
    """It never was attached: nothing has to wait until it is off again."""
    opened = _syscall(FSOPEN, b"overlay", FSOPEN_CLOEXEC, what="fsopen")
    try:
        for name, value in values.items():
            _syscall(FSCONFIG, opened, SET_STRING, name.encode(), os.fsencode(value), 0, what=name)
        for name in flags:
            _syscall(FSCONFIG, opened, SET_FLAG, name.encode(), None, 0, what=name)
        _syscall(FSCONFIG, opened, CREATE, None, None, 0, what="overlay")
        return _syscall(FSMOUNT, opened, FSOPEN_CLOEXEC, MOUNT_NODEV, what="fsmount")
    finally:
        os.close(opened)


def _taken_off(data: str, here: str) -> int:
    """Mounted for an instant where only this process sees it."""
    _mount("overlay", here, "overlay", MS_NODEV, data)
    try:
        return _syscall(
            OPEN_TREE, CWD, os.fsencode(here), CLONE | CLOEXEC, what="open_tree (a kernel before 5.2?)"
        )
    finally:
        _check(_libc.umount2(os.fsencode(here), MNT_DETACH), "umount")


def furnish(root: int, workdir: str) -> None:
    """What is mounted or expected in every container, in an image that may lack it."""
    for name in MOUNTS:
        _directory(root, name)
    _directory(root, AGENT)
    inner = _in_root(root, AGENT, os.O_PATH | os.O_DIRECTORY, RESOLVE_NO_LINKS)
    try:
        _directory(inner, "io")
        with contextlib.suppress(FileExistsError):
            os.close(os.open("agent", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o555, dir_fd=inner))
        if not stat.S_ISREG(os.stat("agent", dir_fd=inner, follow_symlinks=False).st_mode):
            raise OSError(0, f"/{AGENT}/agent of the image is no file")
    finally:
        os.close(inner)
    _hosts(root)
    make_directories(root, workdir)


def _directory(parent: int, name: str) -> None:
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, 0o755, dir_fd=parent)
    if not stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
        raise OSError(0, f"/{name} of the image is no directory")


def _hosts(root: int) -> None:
    """An image's own are usually empty: engines mount theirs over it."""
    with contextlib.suppress(OSError):
        etc = _in_root(root, "etc", os.O_PATH | os.O_DIRECTORY, RESOLVE_NO_LINKS)
        try:
            flags = os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK
            file = os.open("hosts", flags, 0o644, dir_fd=etc)
            try:
                status = os.fstat(file)
                if stat.S_ISREG(status.st_mode) and not status.st_size:
                    os.write(file, HOSTS)
            finally:
                os.close(file)
        finally:
            os.close(etc)


def make_directories(root: int, path: str) -> None:
    """Like `mkdir -p`, inside of `root` only."""
    done = ""
    for part in [part for part in path.split("/") if part not in ("", ".", "..")]:
        done += f"/{part}"
        try:
            os.close(_in_root(root, done, os.O_PATH | os.O_DIRECTORY))
        except FileNotFoundError:
            parent = _in_root(root, done.rpartition("/")[0] or "/", os.O_PATH | os.O_DIRECTORY)
            try:
                os.mkdir(part, 0o755, dir_fd=parent)
            finally:
                os.close(parent)


def _move(source: str, target: str) -> None:
    """Mounts that a user namespace holds in place cannot be moved, but copied with all that is on them."""
    try:
        _mount(source, target, "", MS_MOVE)
    except OSError:
        flags = CLONE | CLOEXEC | RECURSIVE
        tree = _syscall(OPEN_TREE, CWD, source.encode(), flags, what=f"open_tree {source}")
        try:
            _syscall(MOVE_MOUNT, tree, b"", CWD, target.encode(), FROM_EMPTY_PATH, what=f"move {source}")
        finally:
            os.close(tree)


def _become_root(tree: int) -> None:
    """In the container's mount namespace."""
    _syscall(MOVE_MOUNT, tree, b"", CWD, NEW.encode(), FROM_EMPTY_PATH, what="move_mount")
    for name in MOUNTS:
        _move(f"/{name}", f"{NEW}/{name}")
    for name in ("agent", "io"):
        _move(f"/{AGENT}/{name}", f"{NEW}/{AGENT}/{name}")
    os.chdir(NEW)
    _syscall(PIVOT_ROOT, b".", b".", what="pivot_root")
    _check(_libc.umount2(b".", MNT_DETACH), "umount the empty root")


def dress(request: dict[str, Any], home: int, here: str) -> dict[str, Any]:
    """Make the overlay the root of the container whose first process is `pid`."""
    namespace = os.open(f"/proc/{request['pid']}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for name in ("upper", "work"):
            Path(request[name]).mkdir(mode=0o755)
        tree = detached(request, here)
        try:
            furnish(tree, request["workdir"])
            _enter(namespace)
            try:
                _become_root(tree)
            finally:
                _enter(home)
        finally:
            os.close(tree)
    finally:
        os.close(namespace)
    return {}


def freeze(request: dict[str, Any]) -> dict[str, Any]:
    """Copy a writable layer with owners, attributes, times and whiteouts; blocks are shared if possible."""
    source, target = request["source"], request["target"]
    command = ["cp", "-a", "--reflink=auto", "--", f"{source}/.", target]
    Path(target).mkdir(mode=0o755)
    environment = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        shutil.rmtree(target, ignore_errors=True)
        raise OSError(_number(done.stderr), done.stderr.strip()[-400:])
    return _contents(Path(target))


def _number(said: str) -> int:
    """Of what `cp` says, in English, whatever its user speaks."""
    known = {"No space left": errno.ENOSPC, "quota exceeded": errno.EDQUOT}
    return next((number for words, number in known.items() if words in said), errno.EIO)


def _contents(top: Path) -> dict[str, Any]:
    """How much it is; and the digest of all but times, where that is cheap."""
    paths = sorted(p for p in top.rglob("*"))
    sizes = {path: path.lstat() for path in paths}
    size = sum(status.st_blocks * 512 for status in sizes.values())
    if size > HASHED_BYTES or len(paths) > HASHED_FILES:
        return {"bytes": size, "digest": ""}
    digest = hashlib.sha256()
    for path, status in sizes.items():
        name = os.fsencode(path.relative_to(top))
        facts = (len(name), name, status.st_mode, status.st_uid, status.st_gid, status.st_rdev)
        digest.update(b"%d %s %o %d %d %d\0" % facts)
        digest.update(_content(path, status))
        for attribute in sorted(os.listxattr(path, follow_symlinks=False)):
            digest.update(attribute.encode() + os.getxattr(path, attribute, follow_symlinks=False))
    return {"bytes": size, "digest": digest.hexdigest()}


def _content(path: Path, status: os.stat_result) -> bytes:
    if stat.S_ISREG(status.st_mode):
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    return os.fsencode(path.readlink()) if stat.S_ISLNK(status.st_mode) else b""


def remove(request: dict[str, Any]) -> dict[str, Any]:
    shutil.rmtree(request["path"], ignore_errors=True)
    return {"left": Path(request["path"]).exists()}


def act(request: dict[str, Any], home: int, here: str) -> dict[str, Any]:
    if request["do"] == "dress":
        return dress(request, home, here)
    return freeze(request) if request["do"] == "freeze" else remove(request)


def main() -> int:
    here = sys.argv[1]  # an empty directory to mount on for an instant
    home = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    print("{}", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = act(request, home, here)
        except OSError as error:
            answer = {"errno": error.errno or 5, "error": str(error)}
        print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
