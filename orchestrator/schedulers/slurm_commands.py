"""How Slurm's commands are run: the seam between what is asked and where the commands live.

What it is
    `Commands` is a protocol of one method: run this, say what came back. `LocalCommands` runs them as
    processes of this machine, in an environment that is an allow-list. Another implementation may carry
    the same calls to a login node; nobody above this file knows the difference.

What it does not do
    It understands no answer (`slurm_text` does) and retries nothing (`slurm` does).
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Mapping, Sequence
from typing import Protocol

from orchestrator.frozen import dataclass
from orchestrator.schedulers.slurm_text import fields

NOT_FOUND, TIMED_OUT = 127, 124
"""Return codes of our own, the shell's and timeout(1)'s."""

PASSED = ("PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "SLURM_CONF")
"""What the commands may see of our environment. No SBATCH_*, SQUEUE_* or SLURM_* of an enclosing job:
SQUEUE_FORMAT changes what squeue prints, SBATCH_* override what a script says, and a foreign
SLURM_CPU_BIND reaches the job and breaks every step of it. SLURM_CONF says which cluster is meant."""

_AFTER_INTERRUPT_S = 10.0


@dataclass(frozen=True)
class Answer:
    """What came back of one command. `rc` is negative when a signal ended it."""

    rc: int
    out: str
    err: str

    @property
    def said(self) -> str:
        """The last words of an error, for a message: one line, without the command's name."""
        lines = [line.strip() for line in (self.err or self.out).splitlines() if line.strip()]
        text = lines[-1] if lines else f"exit code {self.rc}"
        return text.partition(": error: ")[2] or text.partition("error: ")[2] or text


class Commands(Protocol):
    """Runs one command where Slurm is. It never raises for what a command or a network can do."""

    def run(
        self,
        argv: Sequence[str],
        *,
        input: str = "",
        timeout: float = 30.0,
        env: Mapping[str, str] | None = None,
    ) -> Answer:
        """`env` is added to what the commands need themselves. No answer in time has rc TIMED_OUT."""
        ...


class LocalCommands:
    """The commands as processes of this machine."""

    def run(
        self,
        argv: Sequence[str],
        *,
        input: str = "",
        timeout: float = 30.0,
        env: Mapping[str, str] | None = None,
    ) -> Answer:
        try:
            process = subprocess.Popen(
                list(argv),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                env=environment(os.environ) | dict(env or {}),
                process_group=0,  # Ctrl-C is for us: half a submission is worse than a late one
            )
        except FileNotFoundError:
            return Answer(NOT_FOUND, "", f"{argv[0]} is not on the PATH of this machine")
        except OSError as error:
            return Answer(NOT_FOUND, "", f"{argv[0]} does not start: {error}")
        return _finish(process, input, timeout)


def _finish(process: subprocess.Popen[str], text: str, timeout: float) -> Answer:
    try:
        out, err = process.communicate(text, timeout)
    except subprocess.TimeoutExpired:
        out, err = _kill(process)
        name = process.args[0] if isinstance(process.args, list) else "the command"
        return Answer(TIMED_OUT, out, f"{err}\n{name} gave no answer within {timeout:g} s")
    except BaseException:  # an interrupt: what was asked may be on its way, so let it end
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_AFTER_INTERRUPT_S)
        _kill(process)
        raise
    return Answer(process.returncode, out, err)


def _kill(process: subprocess.Popen[str]) -> tuple[str, str]:
    process.kill()
    try:
        return process.communicate(timeout=2.0)
    except (subprocess.TimeoutExpired, ValueError):  # a grandchild holds the pipes, or they are closed
        return "", ""


def job_details(commands: Commands, job_id: str, timeout: float) -> dict[str, str]:
    """Everything that the controller tells of one job, by Slurm's own names; {} without an answer."""
    answer = commands.run(["scontrol", "-o", "show", "job", job_id], timeout=timeout)
    return fields(answer.out) if answer.rc == 0 else {}


def environment(ours: Mapping[str, str]) -> dict[str, str]:
    """The part of an environment that Slurm's commands see."""
    return {name: ours[name] for name in PASSED if name in ours}


def installed() -> bool:
    """Whether this machine has Slurm's commands; compute nodes may lack some of them."""
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)  # what shutil says, without importing it
    return any(os.access(f"{folder or '.'}/squeue", os.X_OK) for folder in folders)
