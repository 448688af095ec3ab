"""The real program of a job, as a child of the job wrapper; and the signals that reach the wrapper.

What it is
    `Inbox` turns signals into flags and wakes a sleeping main loop; `Command` starts a program in a
    process group of its own, passes signals on by pid, and ends it together with everything below it.

How to use it
    with Inbox() as inbox: command = Command(["python3", "-m", "trainer"], inbox, env=..., cwd=...)
    while command.poll() is None: inbox.wait(0.5)
    command.end(stop_timeout_s=25)

What it does not do
    It knows no run and no peer. Both classes belong to the main thread. `end` ends everything below this
    process; where there are several commands, `stop` is for one of them.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Self

from orchestrator.processes import become_subreaper, end_descendants, prepare_child, reap

_LEFTOVERS_GRACE_S = 3.0

reaping = threading.Lock()
"""Held by whoever waits for a child of its own in another thread: meanwhile nobody reaps orphans."""

_unread: dict[int, int | None] = {}
"""Exit codes of commands; None until one is collected, perhaps by the look at another command."""


class Inbox:
    """Signals as flags: `stop` (TERM, INT), `warned` (USR1: the walltime is near), `orphaned` (stop, for our
    parent was killed)."""

    def __init__(self) -> None:
        self.stop = self.warned = self.orphaned = False
        self._parent = os.getppid()
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)

    def __enter__(self) -> Self:
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, self._on_stop)
        signal.signal(signal.SIGINT, self._on_stop)
        signal.signal(signal.SIGUSR1, self._on_warning)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # a handler, so that the wake-up byte is written
        return self

    def __exit__(self, *_: object) -> None:
        """The handlers stay: a late signal must not kill what is being written down."""
        signal.set_wakeup_fd(-1)

    def _on_stop(self, *_: object) -> None:
        """The kernel sends TERM too, when the parent has died; a scheduler sends it to a living stub."""
        self.orphaned = self.orphaned or (not self.stop and os.getppid() != self._parent)
        self.stop = True

    def _on_warning(self, *_: object) -> None:
        self.warned = True

    def wake(self) -> None:
        """From any thread: end the present or next `wait`."""
        with contextlib.suppress(BlockingIOError):
            os.write(self._write, b"\0")

    def wait(self, seconds: float) -> None:
        """Sleep until a signal arrives, a child ends, somebody wakes us, or for so long."""
        select.select([self._read], [], [], max(0.0, seconds))
        with contextlib.suppress(BlockingIOError):
            os.read(self._read, 4096)


class Command:
    """A running program. Raises OSError when it cannot be started."""

    def __init__(
        self, argv: list[str], inbox: Inbox, *, env: dict[str, str], cwd: Path, ignore: int | None = None
    ) -> None:
        become_subreaper()
        self.inbox = inbox
        self.exit_code: int | None = None
        # The heartbeat thread may run already. What `prepare_child` does after the fork takes no lock
        # that it could hold: the C library was loaded before, and the interpreter's lock is ours.
        self._process = subprocess.Popen(
            argv,
            env=env,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            process_group=0,
            preexec_fn=prepare_child(ignore=() if ignore is None else (ignore,)),
        )
        self.pid = self._process.pid
        self._process.returncode = 0  # reaped by `poll`, among the orphans
        _unread[self.pid] = None

    def poll(self) -> int | None:
        """The exit code (negative for a signal), None while it runs. Collects orphans on the way."""
        if self.exit_code is None:
            if reaping.acquire(blocking=False):
                try:
                    _collect()
                finally:
                    reaping.release()
            elif _unread[self.pid] is None:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                _unread[self.pid] = os.waitstatus_to_exitcode(status) if pid else None
            self.exit_code = _unread[self.pid]
            if self.exit_code is not None:
                del _unread[self.pid]
        return self.exit_code

    def send(self, number: int) -> None:
        """A signal to the program itself, by pid: it decides what its own helpers need."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def end(self, stop_timeout_s: float, number: int = signal.SIGTERM) -> int:
        """TERM, or another signal, and KILL after the timeout; then everything that is still below us, which
        gets what is left of the timeout: the scheduler's own patience ends soon after. The exit code."""
        deadline = time.monotonic() + stop_timeout_s
        code = self.stop(stop_timeout_s, number)
        end_descendants(min(max(0.0, deadline - time.monotonic()), _LEFTOVERS_GRACE_S))
        return code

    def stop(self, stop_timeout_s: float, number: int = signal.SIGTERM) -> int:
        """The same for this program and its process group only: orphans of it may be left."""
        self.send(number)
        if self.wait(stop_timeout_s) is None:
            self.kill()
        code = self.wait(_LEFTOVERS_GRACE_S)
        return -signal.SIGKILL if code is None else code

    def kill(self) -> None:
        """KILL to its process group."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    def wait(self, seconds: float) -> int | None:
        """The exit code, None when it still runs after so long."""
        deadline = time.monotonic() + seconds
        while self.poll() is None and (left := deadline - time.monotonic()) > 0:
            self.inbox.wait(min(left, 0.5))
        return self.exit_code


def _collect() -> None:
    """Reap whoever has died; orphans are nobody's, the others' codes are kept until they are asked for."""
    for pid, code in reap().items():
        if pid in _unread:
            _unread[pid] = code


def how(code: int) -> str:
    """How a program ended, in words: "exited with code 3", "was killed by SIGKILL"."""
    if code >= 0:
        return f"exited with code {code}"
    with contextlib.suppress(ValueError):
        return f"was killed by {signal.Signals(-code).name}"
    return f"was killed by signal {-code}"
