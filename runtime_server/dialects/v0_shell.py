"""OpenHands V0's shell: one persistent bash for each sandbox, with the answers its agents are trained on.

What it is
    `Bash.run` takes one `run` action and says what a terminal shows of it. A command that is silent for too
    long, or over its time, runs on: the next actions wait for it, type to it or interrupt it.

What it does not do
    No HTTP. The texts are those of `openhands/runtime/utils/bash.py`; tests compare them with the package.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from runtime_server.agent import SessionEnded
from runtime_server.dialects.inside import Inside, started
from runtime_server.dialects.shells import Shell
from runtime_server.dialects.start import Told
from runtime_server.dialects.terminal import shown
from runtime_server.dialects.v0_split import commands

SENT_MAX = 1 << 20
STATIC_S = 120.0
TAG = "openhands"  # of the shell, by which a server that is started again knows it
_HINT = (
    "You may wait longer to see additional output by sending empty command '', "
    "send other commands to interact with the current process, "
    'send keys ("C-c", "C-z", "C-d") to interrupt/kill the previous command before sending your new command, '
    "or use the timeout parameter in execute_bash for future commands."
)
_BELOW = "[Below is the output of the previous command.]\n"
_END = b"\x1e"
_NOW = "printf '%s\\n' \"$!\" \"$PWD\"; command -v python 2>/dev/null; printf '\\036'"
_WHO = (
    "id -un 2>/dev/null || echo root; hostname 2>/dev/null || cat /etc/hostname 2>/dev/null || echo sandbox"
)
_INIT = (
    "[ -n \"$BASH_VERSION\" ] && shopt -s expand_aliases; PS1='$ '; "
    "[ -f ~/.bashrc ] && . ~/.bashrc >/dev/null 2>&1; cd {} 2>/dev/null; true"
)
_PARSES = 'for part in "$@"; do printf "%s\\n" "$part" | bash -n 2>/dev/null || exit 1; done'


class Run(BaseModel):
    """`args` of a `run` action."""

    command: str = ""
    is_input: bool = False
    blocking: bool = False
    is_static: bool = False
    cwd: str | None = None
    hidden: bool = False


@dataclass
class Metadata:
    """Of a command, as the client reads it; most of it is known only of one that is over."""

    exit_code: int = -1
    pid: int = -1
    username: str | None = None
    hostname: str | None = None
    working_dir: str | None = None
    py_interpreter_path: str | None = None
    prefix: str = ""
    suffix: str = ""


@dataclass
class Observed:
    """What a `run` action led to. `error` is set instead of all else when it was refused."""

    content: str = ""
    command: str = ""
    metadata: Metadata = field(default_factory=Metadata)
    error: str = ""


def is_key(command: str) -> bool:
    return command.startswith("C-") and len(command) == 3


def key_of(command: str) -> bytes:
    return bytes([ord(command[2].upper()) & 0x1F])


class Bash:
    """See the module's docstring."""

    def __init__(self, inside: Inside, told: Told) -> None:
        self.inside, self.told, self.cwd = inside, told, told.workdir
        self._shell: Shell | None = None
        self._user, self._host = "root", "sandbox"
        self._returned = ""  # of the command that runs: what has been told of its output
        self._left = ""  # output of one that ended when nobody looked
        self._pending = False  # a command was not over at the last answer
        self._code = 0  # `$?`, which our own questions would change

    async def run(self, action: Run, timeout_s: float) -> Observed:
        command = action.command.strip()
        if action.is_static:
            return await self._static(action, command, timeout_s)
        shell = await self._open()
        if not self._pending and (refusal := _nothing_runs(command, action.is_input)):
            return refusal
        if parts := await self._several(command):
            return Observed(error=_too_many(parts))
        if shell.running and command and not action.is_input:
            return self._refused(shell, command)
        if command:
            await self._send(shell, command, action.is_input)
        return await self._wait(shell, action, command, timeout_s)

    async def close(self) -> None:
        if self._shell is not None:
            await self._shell.close()

    # --- the shell ---

    async def _open(self) -> Shell:
        """The shell, or a new one where the last one ended."""
        box = self.inside.box
        if self._shell is None and (found := await Shell.found(box, TAG)) is not None:
            self._shell, self._pending = found, found.running
        if self._shell is None or self._shell.ended is not None:
            self._shell = shell = await Shell.open(box, self.told.workdir, TAG)
            await shell.run(_INIT.format(_quoted(self.told.workdir)), 30)
            await shell.run(_WHO, 10)
            self._user, self._host = [*shown(shell.seen.data).strip().split("\n"), "", ""][:2]
            self._pending = False
        await self._shell.quiet()
        return self._shell

    async def _several(self, command: str) -> list[str]:
        """The commands, when there are more than one and bash agrees."""
        if "\n" not in command or len(parts := commands(command)) < 2:
            return []
        done = await self.inside.shell(_PARSES, command, *parts)
        return parts if started(done) and done.exit_code == 0 else []

    async def _send(self, shell: Shell, command: str, is_input: bool) -> None:
        if shell.running:
            await shell.type(key_of(command) if is_key(command) else command.encode() + b"\n")
        elif not is_key(command):  # a key to an idle shell does nothing
            if self._pending:  # the one before has ended meanwhile
                self._left = _rest(shown(shell.seen.data), self._returned)
            self._returned = ""
            shell.begin(f"(exit {self._code}); {command}" if self._code else command)

    # --- waiting for it ---

    async def _wait(self, shell: Shell, action: Run, command: str, timeout_s: float) -> Observed:
        begun = time.monotonic()
        shell.changed = begun
        quiet_s = float("inf") if action.blocking else self.told.no_change_s
        deadline: Callable[[], float] = lambda: min(begun + timeout_s, shell.changed + quiet_s)  # noqa: E731
        if await shell.until(deadline):
            return await self._completed(shell, command)
        self._pending = True
        if time.monotonic() >= begun + timeout_s:
            said = f"The command timed out after {timeout_s} seconds."
        else:
            said = f"The command has no new output after {quiet_s:g} seconds."
        return self._unfinished(shell, command, f"\n[{said} {_HINT}]")

    async def _completed(self, shell: Shell, command: str) -> Observed:
        content = _rest(shown(shell.seen.data), self._returned)
        if self._left:
            content, self._left = f"{self._left}\n{content}", ""
        cut = shell.seen.total > SENT_MAX
        self._returned, self._pending = "", False
        metadata = await self._metadata(shell)
        note = f" CTRL+{command[-1].upper()} was sent." if is_key(command) else ""
        metadata.suffix = f"\n[The command completed with exit code {metadata.exit_code}.{note}]"
        if cut and len(content) > SENT_MAX:
            content = content[-SENT_MAX:]
            lines = len(content.splitlines())
            metadata.prefix = (
                "[Previous command outputs are truncated. "
                f"Showing the last {lines} lines of the output below.]\n"
            )
        return Observed(content.strip("\n").rstrip(), command, metadata)

    async def _metadata(self, shell: Shell) -> Metadata:
        """Of the command that is over, and where the shell is now."""
        try:
            code = self._code = (await shell.finished()).exit_code if shell.task is not None else 0
            now = await shell.ask(_NOW, _END, 10)
        except SessionEnded as ended:
            self._code = 0
            return Metadata(ended.exit_code, -1, self._user, self._host, self.told.workdir, "")
        pid, where, python = [*shown(now).split("\n"), "", "", ""][:3]
        self.cwd = where or self.cwd
        number = int(pid) if pid.isdigit() else -1
        return Metadata(code, number, self._user, self._host, self.cwd, python)

    def _unfinished(self, shell: Shell, command: str, suffix: str) -> Observed:
        """What there is of the output, less what has been told before."""
        whole = shown(shell.seen.data)
        content = _rest(whole, self._returned)
        metadata = Metadata(prefix=_BELOW if self._returned else "", suffix=suffix)
        self._returned = whole
        return Observed(content[-SENT_MAX:].strip("\n").rstrip(), command, metadata)

    def _refused(self, shell: Shell, command: str) -> Observed:
        said = (
            f'\n[Your command "{command}" is NOT executed. The previous command is still running - '
            "You CANNOT send new commands until the previous command is completed. "
            f"By setting `is_input` to `true`, you can interact with the current process: {_HINT}]"
        )
        return self._unfinished(shell, command, said)

    # --- one that stands alone ---

    async def _static(self, action: Run, command: str, timeout_s: float) -> Observed:
        """A fresh shell for this call only, killed when it is over its time."""
        cwd = action.cwd or self.told.workdir
        argv = ["bash", "-c", f"{command}\n"]
        env = {"GIT_PAGER": "cat", "PAGER": "cat"}
        merged = ["/bin/sh", "-c", 'exec "$@" 2>&1', "sh"]
        done = await self.inside.run([*merged, *argv], cwd=cwd, env=env, timeout_s=timeout_s or STATIC_S)
        metadata = Metadata(done.exit_code, -1, self._user, self._host, cwd, "")
        metadata.suffix = f"\n[The command completed with exit code {done.exit_code}.]"
        if done.timed_out:
            metadata = Metadata(suffix=f"\n[The command timed out after {timeout_s} seconds. {_HINT}]")
        return Observed(shown(done.stdout.data).strip("\n").rstrip(), command, metadata)


def _nothing_runs(command: str, is_input: bool) -> Observed | None:
    if not command:
        return Observed("ERROR: No previous running command to retrieve logs from.")
    return Observed("ERROR: No previous running command to interact with.") if is_input else None


def _too_many(parts: list[str]) -> str:
    listed = "\n".join(f"({number}) {part}" for number, part in enumerate(parts, 1))
    return (
        "ERROR: Cannot execute multiple commands at once.\n"
        "Please run each command separately OR chain them into a single command via && or ;\n"
        f"Provided commands:\n{listed}"
    )


def _rest(whole: str, told: str) -> str:
    return whole.removeprefix(told) if told else whole


def _quoted(path: str) -> str:
    return "'" + path.replace("'", "'\\''") + "'"


def described(metadata: Metadata) -> dict[str, Any]:
    """Without what is not known."""
    return {name: value for name, value in vars(metadata).items() if value is not None}
