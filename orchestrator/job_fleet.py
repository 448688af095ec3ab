"""The servers of a runtime job on several nodes: one on each, started, watched, started again.

What it is
    `Fleet` stands in the runtime job where the one server stands otherwise. Every server registers itself in
    the run directory; the fleet asks each for its health, starts again the one that died or hangs, on its
    own node and with growing pauses, and keeps url and ready flag on one that answers. It is over when no
    server lives and none may be started again.

How to use it
    fleet = Fleet(attempt, inbox, command); fleet.poll(); fleet.lead; fleet.end(stop_timeout_s=25)

What it does not do
    It spreads no load (`runtime_server.fleet`, in the trainer, does) and decides nothing about the job
    (`job_runtime` does).
"""

from __future__ import annotations

import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Self

from orchestrator.command import Command, Inbox, how
from orchestrator.contract import Exit, ReadyFlag, ServerRecord
from orchestrator.job_core import Attempt
from orchestrator.job_launch import step_environment
from orchestrator.peer import ServerWatch, Watcher, server_health
from orchestrator.processes import end_descendants

_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
_STEADY_S = 600.0
"""A server that served for so long has its restarts anew: what killed it is not what kills it at once."""
_HOPELESS = (Exit.USAGE, Exit.NO_INPUT)
_SWEEP_S, _KILLED_S, _STEP_S = 20.0, 3.0, 40.0


class Member:
    """One server, in all its lives. `before` begins the command line of what is to run on its node."""

    def __init__(self, name: str, before: list[str], patience_s: float) -> None:
        self.name, self.before, self.patience_s = name, before, patience_s
        self.command: Command | None = None
        self.code: int | None = None
        self.restarts = 0
        self.again_at: float | None = None
        self.unclean = False  # its last life left things behind, which the next one takes over
        self.began()

    def began(self) -> None:
        """A new life: what is known of the server belongs to the one before."""
        self.watch = ServerWatch(self.patience_s)
        self.record: ServerRecord | None = None
        self.serving_since: float | None = None
        self.hangs = ""
        self.told_at: float | None = None

    @property
    def serving(self) -> bool:
        return self.serving_since is not None and self.command is not None and not self.hangs


class Fleet:
    """Used as a context manager, it watches the servers; `poll` and `end` are those of a `Command`."""

    def __init__(self, attempt: Attempt, inbox: Inbox, command: Sequence[str]) -> None:
        self.attempt, self.inbox, self.argv = attempt, inbox, list(command)
        self.run, self.settings = attempt.run, attempt.settings
        nodes, cpus = self.settings.runtime_nodes, self.settings.runtime_cpus
        places = attempt.inside.one_on_each_node(nodes, cpus) if attempt.inside else [[]] * nodes
        patience = self.settings.peer_grace
        self.members = [Member(str(i + 1), before, patience) for i, before in enumerate(places)]
        self.lead: Member | None = None
        self._led: ServerRecord | None = None
        self._watcher = Watcher(self._ask_all, min(1.0, self.members[0].watch.timeout_s), inbox.wake)
        self._asking = ThreadPoolExecutor(len(self.members), thread_name_prefix="fleet")

    def __enter__(self) -> Self:
        self._watcher.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._watcher.__exit__(*error)
        self._asking.shutdown(wait=False, cancel_futures=True)

    def start(self) -> None:
        """The run's key, which lives as long as the run, then every server. OSError when none can start."""
        if not self.run.read_text(self.run.runtime_api_key):
            self.run.publish(self.run.runtime_api_key, secrets.token_urlsafe(32), 0o600)
        self.run.servers.mkdir(exist_ok=True)
        for member in self.members:
            self.run.publish(self.run.server(member.name), "")
            self._begin(member)

    # --- as a command ---

    def poll(self) -> int | None:
        """Looks after every server. None while one lives or will; else how the last one ended."""
        for member in self.members:
            self._look(member)
        self._follow()
        if any(m.command is not None or m.again_at is not None for m in self.members):
            return None
        return next((m.code for m in reversed(self.members) if m.code), int(Exit.SOFTWARE))

    def end(self, stop_timeout_s: float) -> int:
        """TERM to every server, KILL after the timeout, then everything that is still below us. Negative when
        a server had to be killed, or was."""
        deadline = time.monotonic() + stop_timeout_s
        living = [(m, m.command) for m in self.members if m.command is not None]
        for _, command in living:
            command.send(signal.SIGTERM)
        for _, command in living:
            command.wait(max(0.0, deadline - time.monotonic()))
        for member, command in living:
            command.kill()
            member.code, member.command = command.wait(_KILLED_S), None
        end_descendants(min(max(0.0, deadline - time.monotonic()), _KILLED_S))
        for member, _ in living:
            member.unclean = member.unclean or _killed(member.code)
        return -signal.SIGKILL if any(_killed(member.code) for member, _ in living) else 0

    def sweep(self) -> None:
        """On every node where a server was killed and none came after it: remove what it left. Last of all,
        for what may still come back is spared, and nobody waits for this."""
        own = [] if self.settings.runtime_command else [sys.executable, "-m", "runtime_server", "--sweep"]
        command = self.settings.sweep_command or own
        nodes = {tuple(member.before) for member in self.members if member.unclean and command}
        for member in self.members:
            member.unclean = False
        lines = [["timeout", f"{_SWEEP_S:g}", *before, *command] for before in nodes]
        env, running = self._environment(), []
        for line in lines:
            try:
                running.append(subprocess.Popen(line, stdin=subprocess.DEVNULL, env=env, cwd=self.run.root))
            except OSError as error:
                self.attempt.say("sweep_failed", problem=str(error))
        for each in running:
            each.wait()

    @property
    def ready(self) -> bool:
        """Whether enough of them answer for the training to start."""
        return self._serving >= self._wanted

    @property
    def problem(self) -> str:
        """Why it is not ready."""
        return f"{self._serving} of {len(self.members)} servers answer, {self._wanted} must"

    @property
    def _serving(self) -> int:
        return sum(member.serving for member in self.members)

    @property
    def _wanted(self) -> int:
        return min(self.settings.runtime_ready_nodes, len(self.members))

    # --- one server ---

    def _begin(self, member: Member) -> None:
        member.began()
        member.again_at = None
        argv = [*self.argv, "--server", member.name]
        if member.before:  # a process of ours on that node, which leaves nothing of the step behind
            argv = [
                *member.before,
                *(sys.executable, "-m", "orchestrator.job", "step", f"{self.settings.stop_timeout:g}"),
                *argv,
            ]
        member.command = Command(argv, self.inbox, env=self._environment(), cwd=self.run.root)

    def _environment(self) -> dict[str, str]:
        return step_environment(self.attempt.environment(), self.settings)

    def _look(self, member: Member) -> None:
        if member.again_at is not None and time.monotonic() >= member.again_at:
            self.attempt.say("server_started_again", server=member.name, restart=member.restarts)
            self._begin(member)
        if member.command is None:
            return
        if member.hangs:
            self._put_down(member, member.command)
        if (code := member.command.poll()) is not None:
            self._ended(member, code)

    def _put_down(self, member: Member, command: Command) -> None:
        """A server that does not answer does not clean up either. On another node the process that we have
        there kills it; without `srun` nobody would be left to tell that one."""
        if not member.before:
            command.kill()
        elif member.told_at is None:
            member.told_at = time.monotonic()
            command.send(signal.SIGTERM)
        elif time.monotonic() - member.told_at > self.settings.stop_timeout + _STEP_S:
            command.kill()

    def _ended(self, member: Member, code: int) -> None:
        served = 0.0 if member.serving_since is None else time.monotonic() - member.serving_since
        if served >= _STEADY_S:
            member.restarts = 0
        may = member.restarts < self.settings.runtime_max_restarts and code not in _HOPELESS
        pause = min(_PAUSE_S * 2**member.restarts, _LONGEST_PAUSE_S)
        member.unclean = _killed(code) or bool(member.hangs)
        member.command, member.code, member.serving_since = None, code, None
        member.restarts += may
        member.again_at = time.monotonic() + pause if may else None
        why = member.hangs or f"the server {how(code)}"
        self.attempt.say("server_ended", server=member.name, reason=why, code=code, again=may)

    # --- what they say ---

    def _ask_all(self) -> str | None:
        """From a thread: who answers, and who does not any more. Never a verdict on the job."""
        list(self._asking.map(self._ask, self.members))
        return None

    def _ask(self, member: Member) -> None:
        if member.command is None or member.hangs:
            return
        if member.serving_since is not None:
            member.hangs = member.watch.probe() or ""
            if not member.hangs:
                return
        elif (record := self._fresh_record(member)) is not None:
            if server_health(self.run, record, member.watch.timeout_s).problem:
                return
            member.record, member.serving_since = record, time.monotonic()
            member.watch.serves(record.url, self.run.read_text(self.run.runtime_api_key))
        self.inbox.wake()

    def _fresh_record(self, member: Member) -> ServerRecord | None:
        record = self.run.read(self.run.server(member.name), ServerRecord)
        return record if record is not None and record.attempt == self.attempt.number else None

    def _follow(self) -> None:
        """Keep address and flag on a server that answers: whoever knows one server only finds it there."""
        if self.lead is not None and self.lead.serving and self.lead.record == self._led:
            return
        found = next((m for m in self.members if m.serving), None)
        if found is None or found.record is None or not (self.lead or self.ready) or self.attempt.superseded:
            return
        record = found.record
        flag = ReadyFlag(
            run_id=record.run_id,
            attempt=record.attempt,
            job_id=self.attempt.job_id,
            nonce=record.nonce,
            host=record.host,
            pid=record.pid,
            url=record.url,
        )
        self.run.publish(self.run.runtime_url, record.url)
        self.run.publish(self.run.ready_flag, flag)
        self.lead, self._led = found, record
        self.attempt.say("leads", server=found.name, url=record.url)


def _killed(code: int | None) -> bool:
    """Whether it could not clean up: a step says 128 and the signal."""
    return code is None or code < 0 or code == 128 + signal.SIGKILL
