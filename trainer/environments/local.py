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
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from trainer.environments import CommandResult, Timings, Verdict, Workspace
from trainer.environments.local_shell import LocalShell, kept
from trainer.environments.places import LocalPlace
from trainer.errors import Broken, Lost, NoFile, TaskError
from trainer.rewards import judge
from trainer.tasks import Task

NOBODY = 65534
SETUP_TIMEOUT_S = 60.0
FILE_TIMEOUT_S = 30.0
_PATH = "/usr/local/bin:/usr/bin:/bin"


@dataclass
class LocalWorkspace(Timings):
    """A temporary directory and a shell."""

    task: Task = field(kw_only=True)
    folder: Path = field(kw_only=True)
    again: Callable[[Task], AbstractAsyncContextManager[Workspace]] = field(kw_only=True)
    """Opens another one, for a judge."""
    shell: LocalShell | None = None

    async def run(self, command: str, timeout_s: float, max_output: int) -> CommandResult:
        with _blamed():
            try:
                return await _shell(command, self.folder, timeout_s, max_output)
            except OSError as error:
                if error.errno == errno.E2BIG:  # an impossible command line
                    return CommandResult(str(error).encode(), 126)
                raise

    async def say(self, command: str, timeout_s: float, max_output: int) -> CommandResult:
        with _blamed():
            if self.shell is None or not self.shell.alive:
                self.shell = await LocalShell.start(_limited(), self.folder, _environment(self.folder))
            return await self.shell.run(command, timeout_s, max_output)

    async def read(self, path: str, max_bytes: int) -> bytes:
        script = f'test -f "$1" && exec head -c {max_bytes + 1} -- "$1"; echo "no such file" >&2; exit 1'
        data = await self._file(script, path, b"", max_bytes + 1)
        if len(data) > max_bytes:
            raise NoFile(f"{path} is longer than {max_bytes} bytes")
        return data

    async def write(self, path: str, data: bytes) -> None:
        await self._file('mkdir -p -- "$(dirname -- "$1")" && cat > "$1"', path, data, 4096)

    async def close(self) -> None:
        if self.shell is not None:
            await self.shell.close()

    async def _file(self, script: str, path: str, data: bytes, max_bytes: int) -> bytes:
        """A little script about one file, as the user whom commands run as. Raises NoFile."""
        with _blamed():
            result = await _shell(
                script, self.folder, FILE_TIMEOUT_S, max_bytes, (path.replace("\0", ""),), data
            )
        if result.exit_code:
            raise NoFile(f"{path}: {result.output.decode(errors='replace').strip()[-200:]}")
        return result.output

    async def verify(self, answer: str = "") -> Verdict:
        start = time.perf_counter()
        try:
            return await judge(self.task, LocalPlace(self), answer)
        finally:
            self.add("verify_s", time.perf_counter() - start)


class LocalEnvironment:
    """See the module's docstring; implements `trainer.environments.Environment`."""

    @asynccontextmanager
    async def open(self, task: Task) -> AsyncIterator[Workspace]:
        start = time.perf_counter()
        folder = Path(tempfile.mkdtemp(prefix="unconfined-"))
        workspace = LocalWorkspace(task=task, folder=folder, again=self.open)
        try:
            await self._prepare(workspace)
            workspace.add("create_s", time.perf_counter() - start)
            yield workspace
        finally:
            await workspace.close()
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


@contextlib.contextmanager
def _blamed() -> Iterator[None]:
    """Whose fault it is that no process could be started."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
        raise Broken(f"the working directory is gone: {error}") from error
    except OSError as error:
        raise Lost(f"no process could be started: {error}") from error


async def _shell(
    command: str,
    folder: Path,
    timeout_s: float,
    max_output: int,
    arguments: Sequence[str] = (),
    stdin: bytes = b"",
) -> CommandResult:
    """Run one command line. The output goes to unnamed files, so that no pipe can hold us up."""
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        given.write(stdin)
        given.seek(0)
        process = await asyncio.create_subprocess_exec(
            *_limited(),
            "/bin/sh",
            "-c",
            command,
            "sh",
            *arguments,
            cwd=folder,
            env=_environment(folder),
            stdin=given if stdin else asyncio.subprocess.DEVNULL,
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
        said = [kept(f.fileno(), 0, os.fstat(f.fileno()).st_size, max_output) for f in (out, err)]
    code = 124 if timed_out else _exit_code(process.returncode)
    return CommandResult(b"".join(part for part, _ in said), code, timed_out, sum(left for _, left in said))


def _environment(folder: Path) -> dict[str, str]:
    return {"PATH": _PATH, "HOME": str(folder), "LC_ALL": "C.UTF-8"}


def _limited() -> list[str]:
    """What stands before a command: a limit on file sizes (output included), and nobody when we are root."""
    limited = ["/bin/sh", "-c", 'ulimit -f 20480; exec "$@"', "sh"]
    if os.geteuid() != 0:
        return limited
    return ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--no-new-privs", *limited]


def _exit_code(returncode: int | None) -> int:
    """As a shell says it: 128 + signal when a signal ended it."""
    code = returncode or 0
    return 128 - code if code < 0 else code
