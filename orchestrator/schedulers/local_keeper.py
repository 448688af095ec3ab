"""The keeper of a local job: parent of the batch script, and the supervisor's life insurance.

What it is
    A process between the supervisor and the script, forked anew for each life of the job. Keeper and
    supervisor are both subreapers, one above the other, and each notices the other's death at once
    by the end of a pipe; so whichever is killed, even by KILL, the other still stands above the
    whole tree, ends it, and records what happened.

What it does not do
    It decides nothing: time limits, cancels and requeues are the supervisor's.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from orchestrator.identity import Process
from orchestrator.processes import (
    become_subreaper,
    descendants,
    end_descendants,
    prepare_child,
    reap,
    signal_all,
)
from orchestrator.schedulers import JobSpec


class Keeper:
    """The supervisor's end: starts a keeper process and reads what it reports."""

    def __init__(self, spec: JobSpec, script: Path, environment: dict[str, str], kill_wait_s: float) -> None:
        self.spec, self.script, self.environment = spec, script, environment
        self.kill_wait_s = kill_wait_s
        self.shell: Process | None = None
        self.exit_code: int | None = None
        self.problem = ""
        self._text = b""

    def start(self, job_id: str, orphaned: Callable[[int | None], None]) -> Process:
        """Fork the keeper; it starts the script when `go` is called. `orphaned` is what the keeper
        calls, with the script's exit code, once it had to finish without a supervisor."""
        leash_read, self._leash = os.pipe()
        self.reports, report_write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(self._leash)
            os.close(self.reports)
            _main(_KeeperProcess(self, job_id, leash_read, report_write), orphaned)
        os.close(leash_read)
        os.close(report_write)
        os.set_blocking(self.reports, False)
        self.pid = pid
        return Process.of(pid)

    def go(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # already dead: the report pipe says so
            os.write(self._leash, b"g")

    def poll(self) -> bool:
        """Read what the keeper said. True once it is over: `exit_code` or `problem` say how."""
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(self.reports, 4096):
                self._text += chunk
                self._parse()
            if self.exit_code is None and not self.problem:
                self.problem = "the keeper of this job was killed"
        return self.exit_code is not None or bool(self.problem)

    def _parse(self) -> None:
        *lines, self._text = self._text.split(b"\n")
        for line in lines:
            word, _, rest = line.decode(errors="replace").partition(" ")
            if word == "shell":
                self.shell = Process.of(int(rest))
            elif word == "exit":
                self.exit_code = int(rest)
            elif word == "problem":
                self.problem = rest

    def close(self) -> None:
        os.close(self._leash)
        os.close(self.reports)


def _main(process: _KeeperProcess, orphaned: Callable[[int | None], None]) -> None:
    """Body of the forked process; never returns."""
    code = 1
    try:
        process.run(orphaned)
        code = 0
    except BaseException as error:  # a forked child must not unwind into the supervisor's code
        print(f"keeper: {error!r}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


class _KeeperProcess:
    """What runs after the fork."""

    def __init__(self, keeper: Keeper, job_id: str, leash: int, report: int) -> None:
        self.keeper, self.job_id, self.leash, self.report = keeper, job_id, leash, report
        self.alone, self.kill_at = False, math.inf

    def run(self, orphaned: Callable[[int | None], None]) -> None:
        become_subreaper()
        child_died, wake = os.pipe()
        os.set_blocking(wake, False)
        os.set_blocking(child_died, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        if not os.read(self.leash, 1):  # the supervisor died before it said go
            return orphaned(None)
        try:
            shell = self.launch()
        except (OSError, subprocess.SubprocessError) as error:
            return self.say(f"problem {error}".replace("\n", " "))
        self.say(f"shell {shell}")
        code = self.wait_for_shell(shell, child_died)
        end_descendants(max(0.0, self.kill_at - time.monotonic()) if self.alone else self.keeper.kill_wait_s)
        self.say(f"exit {code}")
        while os.read(self.leash, 1):  # until the supervisor has written down what we said, or is dead
            pass
        return orphaned(code)

    def launch(self) -> int:
        """Start the script with its logs appended; returns its pid. Raises OSError."""
        spec = self.keeper.spec
        interpreter = _interpreter(self.keeper.script)
        out, err = (_open_log(path.replace("%j", self.job_id)) for path in (spec.out, spec.err))
        try:
            process = subprocess.Popen(
                [*interpreter, str(self.keeper.script)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=spec.run_dir,
                env=self.keeper.environment,
                start_new_session=True,
                preexec_fn=prepare_child(),  # safe: this process has one thread
            )
        finally:
            os.close(out)
            os.close(err)
        process.returncode = 0  # reaped by hand below, among all the orphans
        return process.pid

    def wait_for_shell(self, shell: int, child_died: int) -> int:
        """Until the script has ended. Without a supervisor: TERM, then KILL after the usual wait."""
        while (codes := reap()).get(shell) is None:
            watched = [child_died] if self.alone else [child_died, self.leash]
            left = max(0.0, min(self.kill_at - time.monotonic(), 3600.0))
            readable, _, _ = select.select(watched, [], [], left)
            if child_died in readable:
                os.read(child_died, 4096)
            if self.leash in readable and not self.alone:
                self.alone, self.kill_at = True, time.monotonic() + self.keeper.kill_wait_s
                os.kill(shell, signal.SIGTERM)
            if self.alone and time.monotonic() >= self.kill_at:
                signal_all(descendants(os.getpid()), signal.SIGKILL)
                self.kill_at += 1.0
        return codes[shell]

    def say(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError):
            os.write(self.report, line.encode() + b"\n")


def _interpreter(script: Path) -> list[str]:
    """Words of the script's first line; run this way, a noexec filesystem does no harm."""
    with script.open("rb") as file:
        first = file.readline().decode(errors="replace").strip()
    if not first.startswith("#!") or not (words := first[2:].split(None, 1)):
        raise OSError(f"{script} does not begin with #!: the first line must name an interpreter")
    return words


def _open_log(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
