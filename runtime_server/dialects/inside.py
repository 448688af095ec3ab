"""What the dialects do in a sandbox beyond the server's own API: a command as it was, a file in its place.

What it is
    `run` gives the agent's own result, bytes and signals included. `put` writes as a program in the
    sandbox would: mode, owner and links of the file stay (the agent's own write replaces the file).

What it does not do
    No HTTP. SandboxError when the sandbox is over.
"""

from __future__ import annotations

import posixpath
import time
from collections.abc import Mapping, Sequence

from runtime_server.agent import Finished
from runtime_server.box import MAX_FILE, SHELL, Box
from runtime_server.errors import BadRequest, NotFound, SandboxError
from runtime_server.metrics import Metrics
from runtime_server.wire import Code

FOREVER_S = 86400.0 * 7
OUTPUT_MAX = 8 << 20
AGENT_SAID = b"sandbox agent: cannot "  # on stderr, when a program could not be started
_PUT = (
    '[ -d "$1" ] && exit 21; d=${1%/*}; '
    '[ -z "$d" ] || [ -d "$d" ] || mkdir -p "$d" || exit 22; '
    '[ -e "$1" ] || { : > "$1" && chmod "$2" "$1"; } || exit 23; cat > "$1"'
)
_KIND = 'if [ -d "$1" ]; then echo d; elif [ -f "$1" ]; then echo f; elif [ -e "$1" ]; then echo o; fi'


class Inside:
    """One sandbox, from the inside."""

    def __init__(self, box: Box, metrics: Metrics) -> None:
        self.box, self.metrics = box, metrics

    async def run(
        self,
        argv: Sequence[str],
        *,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        stdin: bytes | None = None,
        timeout_s: float = 60.0,
        max_output: int = OUTPUT_MAX,
    ) -> Finished:
        """To its end; a timeout kills it and is a result."""
        started = time.perf_counter()
        async with self.box.in_use():
            done = await self.box.agent.exec(
                argv,
                cwd=cwd or self.box.workdir,
                env=dict(env or {}),
                stdin=stdin,
                timeout_s=min(timeout_s, FOREVER_S),
                max_output=max_output,
            )
        took = time.perf_counter() - started
        self.metrics.executed(took, done.duration_ms / 1000)
        return done

    async def shell(
        self, text: str, *words: str, cwd: str | None = None, stdin: bytes | None = None
    ) -> Finished:
        """A line of sh with arguments, for our own use."""
        return await self.run([SHELL, "-c", text, "sh", *words], cwd=cwd, stdin=stdin)

    async def put(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Parents are made. `mode` is a new file's. NotFound, BadRequest with what the shell said."""
        done = await self.shell(_PUT, path, f"{mode:o}", stdin=data)
        if started(done):
            if done.exit_code:
                raise _refused(path, done)
            return
        await self.box.write_file(path, data, mode)  # an image without a shell

    async def get(self, path: str) -> bytes:
        return await self.box.read_file(path)

    async def kind(self, path: str) -> str:
        """`f` a file, `d` a directory, `o` something else, "" nothing."""
        done = await self.shell(_KIND, path)
        if not started(done):
            return await self._kind_without_shell(path)
        return done.stdout.data.decode().strip()

    async def _kind_without_shell(self, path: str) -> str:
        try:
            await self.get(path)
        except NotFound:
            return ""
        except SandboxError as error:
            return "d" if error.detail.get("errno") == 21 else "o"
        return "f"


def started(done: Finished) -> bool:
    """Whether the program itself ran at all."""
    return not (done.exit_code in (126, 127) and done.stderr.data.startswith(AGENT_SAID))


def _refused(path: str, done: Finished) -> SandboxError:
    if done.exit_code == 21:
        return BadRequest(f"{path} is a directory", Code.FILE_ERROR, errno=21)
    said = done.stderr.data.decode(errors="replace").strip().rpartition(": ")[2] or "it cannot be written"
    return BadRequest(f"{path}: {said}", Code.FILE_ERROR, errno=13)


def exit_status(done: Finished) -> int:
    """As Python's subprocess has it: the negative number of a signal."""
    return -done.signal if done.signal else done.exit_code


def join(base: str, path: str) -> str:
    return posixpath.normpath(posixpath.join(base, path))


__all__ = ["MAX_FILE", "Inside", "exit_status", "join", "started"]
