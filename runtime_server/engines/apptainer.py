"""The engine `apptainer`: sandboxes on sites that have Apptainer or Singularity and no Podman.

What it is
    One `apptainer exec` for each sandbox, with the agent as PID 1 (`--no-init`) of a contained, networkless
    container on an overlay directory. Commands then go through the agent, not through the runtime: an
    `apptainer exec` for each would cost as much as a start. Images are SIF files or unpacked directories:
    a path is taken as it is, any other name is pulled once into `<image store>/../sif`.

Why not the package `hpc-sandbox`
    It is good at what this is not: commands by `singularity exec`, instances that run on when their owner
    dies, no network isolation unless asked. What is needed of it here is one command line.

What it does not do
    It was not run with a real Apptainer where it was built: none can be installed there. `docs/security.md`
    says what was.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
from pathlib import Path

from orchestrator.schema import Runtime
from runtime_server.engines import AGENT, IO, SOCKET, EngineError, Image, Recipe
from runtime_server.engines.spawned import SpawnedEngine
from runtime_server.errors import NotFound
from runtime_server.wire import Code

PROGRAMS = ("apptainer", "singularity")
CONTAIN = ("--containall", "--no-home", "--no-init", "--no-eval", "--no-umask")
NO_NETWORK = ("--net", "--network=none")
WRAP = ("unshare", "--user", "--map-root-user", "--net")  # where the site lets users have no `--net`


class ApptainerEngine(SpawnedEngine):
    """See the module's docstring."""

    name = "apptainer"
    ways = ("net", "wrapped")

    def __init__(self, config: Runtime, agent: Path, image_store: Path, orphan_s: int = 60) -> None:
        super().__init__(config, agent, orphan_s)
        self.sif = image_store.parent / "sif"
        self.program = ""
        self._pulls: dict[str, asyncio.Task[Path]] = {}

    async def prepare(self) -> tuple[str, ...]:
        self.program = next((found for name in PROGRAMS if (found := shutil.which(name))), "")
        if not self.program:
            raise EngineError(
                "neither apptainer nor singularity is installed on this node: load the module that has it "
                "(runtime.setup_commands), or use the engine podman"
            )
        self.runtime = Path(self.program).name
        return ("sandboxes run as this user: there is no other id inside, and `chown` and `su` fail",)

    def command(self, recipe: Recipe, layer: Path) -> list[str]:
        binds = ["--bind", f"{self.agent}:{AGENT}:ro", "--bind", f"{recipe.io}:{IO}:ro"]
        drop = ["--no-privs"] if os.getuid() == 0 else []
        net, wrap = (NO_NETWORK, ()) if self.way == "net" else ((), WRAP)
        contained = [*CONTAIN, *net, *drop, "--overlay", str(layer), *binds, "--pwd", "/"]
        return [*wrap, self.program, "--quiet", "exec", *contained, recipe.image, *self._agent(recipe)]

    def _agent(self, recipe: Recipe) -> list[str]:
        return [AGENT, *self.options(recipe), f"{IO}/{SOCKET}"]

    def environment(self, recipe: Recipe) -> dict[str, str]:
        """What is meant for the inside goes through the environment: no value is in a command line."""
        own = {"PATH": os.environ.get("PATH", ""), "HOME": os.environ.get("HOME", "/")}
        prefix = f"{self.runtime.upper()}ENV_"
        return own | {f"{prefix}{name}": value for name, value in recipe.env.items()}

    # --- images ---

    async def image(self, name: str) -> Image:
        found = Path(name) if name.startswith("/") else await self._pulled(name)
        if not found.exists():
            raise NotFound(
                f"there is no image at {found}: name a SIF file or a directory", Code.IMAGE_MISSING
            )
        return Image(str(found), name, "/", as_root=False)

    async def images(self) -> list[str]:
        return sorted(str(path) for path in self.sif.glob("*.sif")) if self.sif.is_dir() else []

    async def _pulled(self, name: str) -> Path:
        """One pull at a time for each name, also when the one who asked first has left."""
        target = self.sif / f"{re.sub(r'[^A-Za-z0-9._-]+', '_', name)}.sif"
        if target.exists():
            return target
        if name not in self._pulls:
            self._pulls[name] = asyncio.create_task(self._pull(name, target))
            self._pulls[name].add_done_callback(lambda _: self._pulls.pop(name, None))
        return await asyncio.shield(self._pulls[name])

    async def _pull(self, name: str, target: Path) -> Path:
        self.sif.mkdir(mode=0o700, parents=True, exist_ok=True)
        beside = target.with_suffix(f".{os.getpid()}.new")
        source = name if "://" in name else f"docker://{name}"
        command = [self.program, "--quiet", "pull", "--force", str(beside), source]
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
        )
        try:
            async with asyncio.timeout(float(self.config.pull_timeout)):
                said = (await process.communicate())[1]
        except TimeoutError:
            process.kill()
            await process.wait()
            said = f"it took longer than {self.config.pull_timeout} s".encode()
        if process.returncode or not beside.exists():
            beside.unlink(missing_ok=True)
            why = said.decode(errors="replace").strip()[-400:]
            raise NotFound(f"the image {name!r} cannot be pulled: {why}", Code.IMAGE_MISSING)
        return beside.replace(target)
