"""Runs one command on a host of a test cluster; to the caller it looks like a command of its own.

How to run it
    Cluster (cluster.py) does:  python -S enter.py SPEC COMMAND…
    SPEC is JSON: {"proc": "/proc/P/root/proc/N", "cwd", "uid", "gid", "groups", "terminal"}.
    Environment, standard streams and exit status are the command's; the usual signals are passed on to
    it, and it is killed when this process is. With "terminal" it gets a terminal of its own, for job control.

What it does not do
    It asks no permission: entering needs root, and the command runs with the ids that SPEC says.
"""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import signal
import sys
import termios
import tty
from typing import Any, NoReturn

import namespaces as ns

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT)


def enter(proc: str) -> None:
    """All namespaces are opened before the first is entered: their files vanish from view with the mounts."""
    descriptors = [(os.open(f"{proc}/ns/{name}", os.O_RDONLY), kind) for name, kind in ns.NAMES.items()]
    for descriptor, kind in descriptors:
        ns.enter(descriptor, kind)
        os.close(descriptor)


def become(spec: dict[str, Any], argv: list[str]) -> NoReturn:
    os.setgroups(spec["groups"])
    os.setresgid(spec["gid"], spec["gid"], spec["gid"])
    os.setresuid(spec["uid"], spec["uid"], spec["uid"])
    ns.die_with_parent()
    signal.pthread_sigmask(signal.SIG_SETMASK, set())
    for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT):  # Python's own settings end here
        signal.signal(number, signal.SIG_DFL)
    try:
        os.chdir(spec["cwd"])
        os.execvp(argv[0], argv)  # noqa: S606 - to become the command is the point
    except OSError as error:
        print(f"cannot run {argv[0]} in {spec['cwd']}: {error}", file=sys.stderr, flush=True)
        os._exit(127)


def run_with_streams(spec: dict[str, Any], argv: list[str]) -> int:
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)  # none is lost before the handlers are there
    if (pid := os.fork()) == 0:
        become(spec, argv)
    for number in PASSED_ON:
        signal.signal(number, lambda received, _: os.kill(pid, received))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    return os.waitpid(pid, 0)[1]


def run_with_terminal(spec: dict[str, Any], argv: list[str]) -> int:
    pid, terminal = pty.fork()
    if pid == 0:
        become(spec, argv)
    if not sys.stdin.isatty():
        return relay(pid, terminal)
    saved = termios.tcgetattr(0)

    def resize(*_: object) -> None:
        termios.tcsetwinsize(terminal, termios.tcgetwinsize(0))

    signal.signal(signal.SIGWINCH, resize)
    resize()
    tty.setraw(0, termios.TCSADRAIN)  # keeps what was typed ahead
    try:
        return relay(pid, terminal)
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, saved)


def relay(pid: int, terminal: int) -> int:
    """Bytes between our streams and the command's terminal, until the command ends."""
    sources = [0, terminal]
    with contextlib.suppress(OSError):  # Linux reports the end of the other side as EIO
        while True:
            ready, _, _ = select.select(sources, [], [])
            if terminal in ready:
                os.write(1, os.read(terminal, 65536))
            elif typed := os.read(0, 65536):
                os.write(terminal, typed)
            else:
                os.write(terminal, b"\x04")  # the end of a file, as a terminal says it
                sources.remove(0)
    return os.waitpid(pid, 0)[1]


def main() -> None:
    spec, argv = json.loads(sys.argv[1]), sys.argv[2:]
    enter(spec["proc"])
    status = run_with_terminal(spec, argv) if spec["terminal"] else run_with_streams(spec, argv)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)  # core dumps aside, die as the command did
    os._exit(os.WEXITSTATUS(status))


if __name__ == "__main__":
    main()
