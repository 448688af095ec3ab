"""Processes by pid: who is alive, what descends from whom, and how a whole tree is ended.

What it is
    The Linux calls that make "no process of the run is left" true. A process that becomes a *subreaper*
    inherits every orphan below it, so daemons, `setsid` children and container monitors cannot
    escape by double-forking; `end_descendants` then finds and ends them all.

How to use it
    become_subreaper(); child = Popen(..., preexec_fn=prepare_child()); ...; end_descendants(grace_s=5)

What it does not do
    It never looks for a process by its name. It sees this machine only, through /proc.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from orchestrator.identity import PARENT, STATE, start_time, stat_fields

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_PLAIN = (
    *(signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGPIPE),
    *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD),
)
_libc = ctypes.CDLL(None, use_errno=True)  # loaded now: after a fork it would be too late


# --- before exec -------------------------------------------------------------------------------------


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}): {os.strerror(number)}")


def become_subreaper() -> None:
    """From now on orphans below this process become its children, not init's."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(number: int = signal.SIGTERM) -> None:
    """Ask the kernel for this signal when the parent (the thread that forked us) dies."""
    _prctl(_PR_SET_PDEATHSIG, number)


def prepare_child(*, ignore: Collection[int] = ()) -> Callable[[], None]:
    """A `preexec_fn`: default signals, nothing blocked, TERM when the parent dies.

    A shell cannot trap what was ignored when it started, hence the reset. `ignore` keeps a signal from
    killing a program before it has installed its handler.
    """
    parent = os.getpid()

    def prepare() -> None:
        for number in _PLAIN:
            signal.signal(number, signal.SIG_IGN if number in ignore else signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        die_with_parent()
        if os.getppid() != parent:  # it died before we asked
            os.kill(os.getpid(), signal.SIGTERM)

    return prepare


# --- trees -------------------------------------------------------------------------------------------


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208 - one call, no objects


def descendants(root: int, spare: Collection[int] = (), without: Collection[int] = ()) -> list[int]:
    """Every live process below `root`, itself not included; zombies do not count.

    `spare` are pids that are left out although what is below them is not; `without` are left out with
    everything below them.
    """
    children = defaultdict(list)
    dead = set()
    for pid in _pids():
        if fields := stat_fields(pid):
            children[int(fields[PARENT])].append(pid)
            if fields[STATE] in "ZX":
                dead.add(pid)
    found, ahead = [], [root]
    while ahead:
        below = [pid for pid in children[ahead.pop()] if pid not in without]
        ahead += below
        found += [pid for pid in below if pid not in dead and pid not in spare]
    return found


def labelled(name: str, value: str) -> list[int]:
    """Live processes that were started with `name=value` in their environment: this one and those above
    it left out. For reaping by our own label, when nobody is left who knew the tree."""
    return [pid for pid, found in labels(name).items() if found == value]


def labels(name: str) -> dict[int, str]:
    """{pid: value} of every live process that was started with this variable; see `labelled`."""
    wanted = f"{name}=".encode()
    above = {os.getpid(), *_ancestors()}
    found = {p: [v for v in _environ(p) if v.startswith(wanted)] for p in _pids() if p not in above}
    return {p: os.fsdecode(v[0][len(wanted) :]) for p, v in found.items() if v and start_time(p)}


def _environ(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # gone, or another user's
        return []


def signal_all(pids: Collection[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def reap() -> dict[int, int]:
    """Collect every dead child: {pid: exit code, negative for a signal}."""
    codes = {}
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            codes[pid] = os.waitstatus_to_exitcode(status)
    return codes


def end_all(find: Callable[[], list[int]], grace_s: float, kill_s: float = 10.0) -> bool:
    """TERM what `find` returns, KILL what is left after `grace_s`, until it returns nothing.

    TERM goes once to each process that has no parent among them: a program ends its own helpers in
    its own order, and what it leaves behind is told in turn. KILL goes to all. Returns whether all
    are gone; it gives up after `kill_s` of KILL, which only an uninterruptible process outlives.
    """
    start, told, pause = time.monotonic(), set[int](), 0.01
    while pids := find():
        waited = time.monotonic() - start
        if waited > grace_s + kill_s:
            return False
        if waited >= grace_s:
            signal_all(pids, signal.SIGKILL)
        else:
            roots = {p for p in pids if _parent(p) not in pids} - told
            signal_all(roots, signal.SIGTERM)
            told |= roots
        time.sleep(pause)
        pause = min(pause * 1.3, 0.2)  # each look reads all of /proc
        reap()
    return True


def _parent(pid: int) -> int:
    fields = stat_fields(pid)
    return int(fields[PARENT]) if fields else 0


def _ancestors() -> Iterator[int]:
    """The parent of this process, its parent, and so on, without init."""
    pid = os.getppid()
    while pid > 1:
        yield pid
        pid = _parent(pid)


def is_above(pid: int) -> bool:
    """Whether a process is the parent of this one, or of its parent, and so on."""
    return pid in _ancestors()


def end_descendants(grace_s: float, spare: Collection[int] = (), without: Collection[int] = ()) -> bool:
    """End every process below this one, which must be a subreaper; see `end_all`.

    It also collects dead children, so their exit codes must have been read before.
    """
    reap()
    return end_all(lambda: descendants(os.getpid(), spare, without), grace_s)
