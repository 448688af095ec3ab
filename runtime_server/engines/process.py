"""The engine `process`: no sandbox at all, but the same agent. For laptops and debugging; asked for by name.

What it is
    The agent as PID 1 of a new process and mount namespace of this machine (`unshare`), so that nothing a
    command starts outlives it. Files, network and user are the server's own. Each sandbox has a private
    directory, at the same path for all: `WORK`, its working directory.

What it does not do
    **It confines nothing.** What runs in it can read and change whatever the user of the server can, the
    server's key included. It knows one image, this machine.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

from runtime_server.engines import SOCKET, EngineError, Image, Recipe
from runtime_server.engines.spawned import SpawnedEngine
from runtime_server.errors import NotFound
from runtime_server.wire import Code

log = logging.getLogger("runtime_server")
HERE = "this-machine"
UNCONFINED = (
    "UNCONFINED: the engine `process` isolates nothing. Commands run on this machine as the user of this "
    "server, with its files, its network and its keys in reach. For debugging only."
)
# A private directory at one path for all, in a mount namespace that nobody else sees.
_ENTER = 'mount --bind "$1" "$2" && shift 2 && exec "$@"'


class ProcessEngine(SpawnedEngine):
    """See the module's docstring."""

    name, runtime, confines = "process", "unshare", False

    async def prepare(self) -> tuple[str, ...]:
        if shutil.which("unshare") is None:
            raise EngineError("the engine process needs `unshare` (util-linux)")
        self.work.mkdir(mode=0o755)
        log.warning(UNCONFINED)
        return (UNCONFINED,)

    @property
    def work(self) -> Path:
        """Where every sandbox finds its own directory."""
        return self.state.storage / "work"

    def command(self, recipe: Recipe, layer: Path) -> list[str]:
        user = ["--user", "--map-root-user"] if os.getuid() else []
        unshare = ["unshare", *user, "--pid", "--mount", "--fork", "--kill-child", "--mount-proc"]
        enter = ["sh", "-c", _ENTER, "sh", str(layer), str(self.work)]
        return [*unshare, *enter, str(self.agent), *self.options(recipe), str(recipe.io / SOCKET)]

    def environment(self, recipe: Recipe) -> dict[str, str]:
        return {"HOME": str(self.work), **super().environment(recipe)}

    async def image(self, name: str) -> Image:
        if name not in (HERE, self.config.sandbox.image):
            raise NotFound(
                f"the engine process has no images, and {name!r} would be one: it is this machine, whatever "
                f"is asked for. Leave the image out, or name {HERE!r}.",
                Code.IMAGE_MISSING,
            )
        return Image(HERE, name, str(self.work))

    async def images(self) -> list[str]:
        return [HERE]
