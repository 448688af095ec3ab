"""SWE-ReX's shells: persistent bash sessions with the answers, exceptions and texts that its client expects.

What it is
    A command that is over time runs on; what it wrote comes with the interrupt that follows. Interactive
    programs are typed to, and an answer comes when one of the `expect` patterns matches.

What it does not do
    None of the real server's fixed waits, and one command holds up nobody in another session.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, RootModel

from runtime_server.agent import Finished, SessionEnded
from runtime_server.dialects.inside import FOREVER_S, Inside, started
from runtime_server.dialects.shells import INTERRUPT, Shell, within
from runtime_server.dialects.terminal import plain

PROMPT = "SHELLPS1PREFIX"
_PLAIN = re.compile(r"[\w./=:,@%+ -]*")
_RESERVED = re.compile(
    r"(^|[\s;])(if|then|else|elif|fi|case|esac|for|select|while|until|do|done|in|function|time|coproc)($|[\s;])"
)
_SYNTAX_S = 30.0


class Create(BaseModel):
    startup_source: list[str] = []
    session: str = "default"
    session_type: Literal["bash"] = "bash"
    startup_timeout: float = 1.0


class Run(BaseModel):
    action_type: Literal["bash"] = "bash"
    command: str
    session: str = "default"
    timeout: float | None = None
    is_interactive_command: bool = False
    is_interactive_quit: bool = False
    check: Literal["silent", "raise", "ignore"] = "raise"
    error_msg: str = ""
    expect: list[str] = []

    @property
    def interactive(self) -> bool:
        return self.is_interactive_command or self.is_interactive_quit


class Interrupt(BaseModel):
    action_type: Literal["bash_interrupt"]
    session: str = "default"
    timeout: float = 0.2
    n_retry: int = 3
    expect: list[str] = []


class Action(RootModel[Run | Interrupt]):
    """What `run_in_session` takes; told apart by `action_type`."""

    root: Annotated[Run | Interrupt, Field(discriminator="action_type")]


class Close(BaseModel):
    session: str = "default"
    session_type: Literal["bash"] = "bash"


class Raised(Exception):
    """An exception that the client raises by its name."""

    def __init__(self, class_path: str, message: str, extra: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.class_path, self.extra = class_path, extra or {}

    @classmethod
    def swerex(cls, name: str, message: str, extra: dict[str, Any] | None = None) -> Self:
        return cls(f"swerex.exceptions.{name}", message, extra)

    @property
    def body(self) -> dict[str, Any]:
        """The traceback stays empty: the client would log it as critical."""
        said = {
            "message": str(self),
            "class_path": self.class_path,
            "traceback": "",
            "extra_info": self.extra,
        }
        return {"swerexception": said}


class Sessions:
    """The shells of one sandbox, by name."""

    def __init__(self, inside: Inside) -> None:
        self.inside = inside
        self._shells: dict[str, Shell] = {}
        self._locks: dict[str, asyncio.Lock] = {}

    async def create(self, body: Create) -> dict[str, Any]:
        if body.session in self._shells:
            raise Raised.swerex("SessionExistsError", f"session {body.session} already exists")
        shell = await Shell.open(self.inside.box, self.inside.box.workdir, _tag(body.session))
        if body.session in self._shells:  # another request was faster
            await shell.close()
            raise Raised.swerex("SessionExistsError", f"session {body.session} already exists")
        self._shells[body.session] = shell
        output = ""
        if body.startup_source:
            line = " ; ".join(f"source {path}" for path in body.startup_source)
            shell.begin(line)
            if not await shell.until(within(max(body.startup_timeout, 1.0))):
                message = f"timeout after {body.startup_timeout} seconds while running command {line!r}"
                raise Raised("pexpect.exceptions.TIMEOUT", message)
            output = plain(shell.seen.data)
        return {"output": output, "session_type": "bash"}

    async def run(self, action: Run | Interrupt) -> dict[str, Any]:
        shell = await self._shell(action.session)
        if isinstance(action, Interrupt):
            return await _interrupt(shell, action)
        async with self._locks.setdefault(action.session, asyncio.Lock()):
            return await self._run(shell, action)

    async def close(self, body: Close) -> dict[str, Any]:
        shell = await self._shell(body.session)
        del self._shells[body.session]
        await shell.close()
        return {"session_type": "bash"}

    async def close_all(self) -> dict[str, Any]:
        shells = [*self._shells.values()]
        self._shells.clear()
        for shell in shells:
            await shell.close()
        return {}

    async def _shell(self, name: str) -> Shell:
        if name not in self._shells and (found := await Shell.found(self.inside.box, _tag(name))):
            self._shells.setdefault(name, found)
        if name not in self._shells:
            raise Raised.swerex("SessionDoesNotExistError", f"session {name!r} does not exist")
        return self._shells[name]

    async def _run(self, shell: Shell, action: Run) -> dict[str, Any]:
        if shell.ended is not None:
            raise _end_of_file()
        deadline = within(FOREVER_S if action.timeout is None else action.timeout)
        if action.interactive:
            return await _interact(shell, action, deadline)
        await self._check(action.command)
        # a command that was left running goes on in front of this one, as on a terminal
        if not await shell.until(deadline):
            raise _late(action)
        shell.begin(action.command)
        patterns = _patterns(action.expect)
        if not await shell.until(deadline, lambda: _first(patterns, shell)):
            raise _late(action)
        matched = _first(patterns, shell)
        if shell.running:
            assert matched is not None
            return _observed(plain(shell.seen.data[: matched.start()]), 0, matched.re.pattern.decode())
        return _judged(action, plain(shell.seen.data), await _outcome(shell))

    async def _check(self, command: str) -> None:
        """`bash -n` before it runs, unless no text of its kind can be wrong."""
        if _PLAIN.fullmatch(command) and not _RESERVED.search(command):
            return
        done = await self.inside.run(["bash", "-n"], stdin=f"{command}\n".encode(), timeout_s=_SYNTAX_S)
        if not started(done) or done.exit_code == 0:
            return
        out, err = (kept.data.decode(errors="backslashreplace") for kept in (done.stdout, done.stderr))
        message = (
            f"Error (exit code {done.exit_code}) while checking bash command \n{command!r}\n"
            f"---- Stderr ----\n{err}\n---- Stdout ----\n{out}"
        )
        raise Raised.swerex("BashIncorrectSyntaxError", message, {"bash_stdout": out, "bash_stderr": err})


def _tag(session: str) -> str:
    """By which a server that is started again knows the shell."""
    return f"swerex-{hashlib.sha256(session.encode()).hexdigest()[:32]}"


async def _outcome(shell: Shell) -> Finished:
    try:
        return await shell.finished()
    except SessionEnded:
        raise _end_of_file() from None


async def _interact(shell: Shell, action: Run, deadline: Callable[[], float]) -> dict[str, Any]:
    """Type to what runs, or start it; answer at the first pattern, or when the shell is back."""
    patterns = _patterns(action.expect)
    begun = 0
    if shell.running:
        begun = shell.seen.total
        await shell.type(action.command.encode() + b"\n")
    else:
        shell.begin(action.command)
    if not await shell.until(deadline, lambda: _first(patterns, shell, begun)):
        raise _late(action)
    matched = _first(patterns, shell, begun)
    data = shell.seen.data
    end = matched.start() if matched else len(data)
    output = plain(data[begun:end]).lstrip().removeprefix(action.command).strip()
    if not shell.running:
        await _outcome(shell)
    return _observed(output, 0, matched.re.pattern.decode() if matched else PROMPT)


async def _interrupt(shell: Shell, action: Interrupt) -> dict[str, Any]:
    """SIGINT so often, then SIGKILL; what the command wrote until its end."""
    for _ in range(max(1, action.n_retry)):
        if not shell.running:
            break
        await shell.type(INTERRUPT)
        await shell.until(within(max(action.timeout, 0.05)))
    if shell.running:
        await shell.kill()
    if shell.running:
        raise Raised("pexpect.exceptions.TIMEOUT", "Failed to interrupt session")
    if shell.task is not None:
        await _outcome(shell)
    output, shell.seen = plain(shell.seen.data).strip(), type(shell.seen)()
    return _observed(output, 0)


def _judged(action: Run, output: str, done: Finished) -> dict[str, Any]:
    code = done.exit_code
    if action.check == "ignore":
        return _observed(output, None)
    if action.check == "raise" and code:
        said = f"Command {action.command!r} failed with exit code {code}. Here is the output:\n{output!r}"
        message = f"{action.error_msg}: {said}" if action.error_msg else said
        raise Raised.swerex("NonZeroExitCodeError", message)
    return _observed(output, code)


def _observed(output: str, exit_code: int | None, matched: str = PROMPT) -> dict[str, Any]:
    return {
        "output": output,
        "exit_code": exit_code,
        "failure_reason": "",
        "expect_string": matched,
        "session_type": "bash",
    }


def _patterns(expect: list[str]) -> list[re.Pattern[bytes]]:
    try:
        return [re.compile(text.encode(), re.DOTALL) for text in expect]
    except re.error as error:
        raise Raised("builtins.ValueError", f"an expect pattern is no regular expression: {error}") from None


def _first(patterns: list[re.Pattern[bytes]], shell: Shell, begun: int = 0) -> re.Match[bytes] | None:
    """The match that comes first in the output, as a terminal would have seen it."""
    if not patterns:
        return None
    data = shell.seen.data
    found = [match for pattern in patterns if (match := pattern.search(data, begun))]
    return min(found, key=lambda match: match.start(), default=None)


def _late(action: Run) -> Raised:
    said = f"timeout after {action.timeout} seconds while running command {action.command!r}"
    return Raised.swerex("CommandTimeoutError", said)


def _end_of_file() -> Raised:
    return Raised(
        "pexpect.exceptions.EOF", "the shell of this session has ended: close it and create another"
    )


__all__ = ["Action", "Close", "Create", "Interrupt", "Raised", "Run", "Sessions"]
