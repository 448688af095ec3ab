"""The UNCONFINED environment: commands run on this machine, in a temporary directory, in no sandbox.

What it is
    For tests and measurements on machines without Podman. A command gets its own process group, an
    empty stdin, a bounded output, a time limit that kills the group, and, when we are root, the user
    `nobody`. That is all the protection there is.

How to use it
    environment = LocalEnvironment()      # or open_environment("unconfined", …); never by default

What it does not do
    It confines nothing: no limits on memory or processes, the network and the files of this machine
    are there. Never give it a policy that you would not let type into a shell of yours.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from trainer.environments import CommandResult, Timings, Verdict, Workspace
from trainer.errors import Broken, Lost, TaskError
from trainer.tasks import Task

NOBODY = 65534
SETUP_TIMEOUT_S = 60.0
_PATH = "/usr/local/bin:/usr/bin:/bin"


@dataclass
class LocalWorkspace(Timings):
    """A temporary directory and a shell."""

    task: Task = field(kw_only=True)
    folder: Path = field(kw_only=True)

    async def run(self, command: str, timeout_s: float, max_output: int) -> CommandResult:
        try:
            return await _shell(command, self.folder, timeout_s, max_output)
        except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
            raise Broken(f"the working directory is gone: {error}") from error
        except OSError as error:
            if error.errno == errno.E2BIG:  # an impossible command line
                return CommandResult(str(error).encode(), 126)
            raise Lost(f"no process could be started: {error}") from error

    async def verify(self) -> Verdict:
        start = time.perf_counter()
        verify = self.task.verify
        try:
            _write(self.folder, verify.files)
            result = await self.run(verify.command, verify.timeout_s, 4096)
        except (OSError, TaskError) as error:  # a directory where a file must go, say: the policy's doing
            return Verdict(0.0, f"the hidden test could not be brought in: {error}")
        finally:
            self.add("verify_s", time.perf_counter() - start)
        return Verdict(
            float(result.exit_code == 0), "" if result.exit_code == 0 else "the hidden test failed"
        )


class LocalEnvironment:
    """See the module's docstring; implements `trainer.environments.Environment`."""

    @asynccontextmanager
    async def open(self, task: Task) -> AsyncIterator[Workspace]:
        start = time.perf_counter()
        folder = Path(tempfile.mkdtemp(prefix="unconfined-"))
        workspace = LocalWorkspace(task=task, folder=folder)
        try:
            await self._prepare(workspace)
            workspace.add("create_s", time.perf_counter() - start)
            yield workspace
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    async def wait_ready(self, timeout_s: float) -> None:
        """Nothing to wait for."""

    async def life(self) -> object:
        """This machine has but one."""
        return "local"

    async def close(self) -> None:
        """Nothing is left: each workspace removed itself."""

    async def _prepare(self, workspace: LocalWorkspace) -> None:
        _write(workspace.folder, workspace.task.setup.files)
        if os.geteuid() == 0:
            for path in [workspace.folder, *workspace.folder.rglob("*")]:
                os.chown(path, NOBODY, NOBODY)
        for command in workspace.task.setup.commands:
            result = await workspace.run(command, SETUP_TIMEOUT_S, 4096)
            if result.exit_code:
                raise Lost(f"set-up of task {workspace.task.id} failed: {command!r} gave {result.exit_code}")


def _write(folder: Path, files: Mapping[str, str]) -> None:
    for name, content in files.items():
        path = (folder / name).resolve()
        if not path.is_relative_to(folder.resolve()):
            raise TaskError(f"{name}: without a sandbox, a task's files must stay under its directory")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


async def _shell(command: str, folder: Path, timeout_s: float, max_output: int) -> CommandResult:
    """Run one command line. The output goes to unnamed files, so that no pipe can hold us up."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = await asyncio.create_subprocess_exec(
            *_argv(command),
            cwd=folder,
            env={"PATH": _PATH, "HOME": str(folder), "LC_ALL": "C.UTF-8"},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
        timed_out = False
        try:
            async with asyncio.timeout(timeout_s):
                await process.wait()
        except TimeoutError:
            timed_out = True
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
        kept = b"".join(os.pread(stream.fileno(), max_output, 0) for stream in (out, err))
    code = 124 if timed_out else _exit_code(process.returncode)
    return CommandResult(kept, code, timed_out)


def _argv(command: str) -> list[str]:
    """`sh` under a limit on file sizes (output included), and as nobody when we are root."""
    limited = ["/bin/sh", "-c", 'ulimit -f 20480; exec /bin/sh -c "$1"', "sh", command]
    if os.geteuid() != 0:
        return limited
    return ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--no-new-privs", *limited]


def _exit_code(returncode: int | None) -> int:
    """As a shell says it: 128 + signal when a signal ended it."""
    code = returncode or 0
    return 128 - code if code < 0 else code
