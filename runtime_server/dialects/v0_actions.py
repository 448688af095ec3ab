"""OpenHands V0's actions, as observations: what `/execute_action` answers.

What it is
    `Actions.act` never fails for what an agent did: a mistake is an observation too. `extras` holds exactly
    the keys that the client's classes know, for they refuse any other; what else there is to say stands
    beside it.

What it does not do
    No browser. SandboxError only when the sandbox is over.
"""

from __future__ import annotations

import asyncio
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from runtime_server.dialects.inside import Inside
from runtime_server.dialects.start import Told
from runtime_server.dialects.v0_editor import Edit, Editor, difference
from runtime_server.dialects.v0_files import BINARY, Failed, Read, Write, is_binary, read, write
from runtime_server.dialects.v0_python import Interpreter, NoPython
from runtime_server.dialects.v0_shell import Bash, Metadata, Observed, Run, described
from runtime_server.errors import SandboxError

TIMEOUT_S = 120.0
ACI = "oh_aci"
Observation = dict[str, Any]


class Cell(BaseModel):
    """`args` of a `run_ipython` action."""

    code: str = ""
    include_extra: bool = True


class Asked(BaseModel):
    """The envelope. `id` and `timestamp` are there when the action went through the event stream."""

    action: str
    args: dict[str, Any] = Field(default_factory=dict)
    timeout: float | None = None
    id: int | None = None
    timestamp: str | None = None

    @property
    def timeout_s(self) -> float:
        return self.timeout if self.timeout and self.timeout > 0 else TIMEOUT_S

    @property
    def hidden(self) -> bool:
        return bool(self.args.get("hidden"))


class Execute(BaseModel):
    action: Asked


class Actions:
    """Of one sandbox, one at a time."""

    def __init__(self, inside: Inside, told: Told) -> None:
        self.inside, self.told = inside, told
        self.bash = Bash(inside, told)
        self.editor = Editor(inside, told.workdir)
        self.python = Interpreter(inside)
        self._lock = asyncio.Lock()

    async def act(self, asked: Asked) -> Observation:
        async with self._lock:
            try:
                made = await self._act(asked)
            except Failed as failed:
                made = error(str(failed))
            except ValidationError as wrong:
                made = error(f"the arguments of {asked.action!r} are not valid: {_complaints(wrong)}")
            except SandboxError as failed:
                if failed.status not in (400, 404, 413) or self.inside.box.reason:
                    raise
                made = error(str(failed))
        return _never_an_error(made, asked) if asked.hidden else made

    async def _act(self, asked: Asked) -> Observation:
        kind, args = asked.action, asked.args
        if kind == "run":
            action = Run.model_validate(args)
            return ran(await self.bash.run(action, asked.timeout_s), action.hidden)
        if kind == "run_ipython":
            return await self._cell(Cell.model_validate(args), asked.timeout_s)
        if kind == "read":
            return await self._read(args)
        if kind == "write":
            action_ = Write.model_validate(args)
            await write(self.inside, action_, self.bash.cwd)
            return observation("write", "", {"path": _joined(self.bash.cwd, action_.path)})
        if kind == "edit":
            return await self._edit(Edit.model_validate(args))
        if kind in ("browse", "browse_interactive"):
            return error("Browser functionality is not supported or disabled.")
        return error(f"Action {kind} is not supported in the current runtime.", "AGENT_ERROR$BAD_ACTION")

    async def _cell(self, cell: Cell, timeout_s: float) -> Observation:
        if not self.told.jupyter:
            return error("JupyterRequirement not found. Unable to run IPython action.")
        try:
            text = await self.python.run(cell.code, self.bash.cwd, timeout_s)
        except NoPython as missing:
            return error(str(missing))
        if cell.include_extra:
            text += f"\n[Jupyter current working directory: {self.bash.cwd}]"
            text += f"\n[Jupyter Python interpreter: {self.python.path}]"
        return observation("run_ipython", text, {"code": cell.code})  # older clients know no more

    async def _read(self, args: dict[str, Any]) -> Observation:
        action = Read.model_validate(args)
        if action.impl_source != ACI:
            text = await read(self.inside, action, self.bash.cwd)
            path = _joined(self.bash.cwd, action.path)
            return observation("read", text, {"path": path, "impl_source": "default"})
        if await self._binary(action.path):
            raise Failed(BINARY)
        seen = await self.editor.edit(Edit(path=action.path, view_range=action.view_range))
        return observation("read", seen.output, {"path": action.path, "impl_source": ACI})

    async def _binary(self, path: str) -> bool:
        try:
            return path.startswith("/") and is_binary(await self.inside.get(path))
        except SandboxError:
            if self.inside.box.reason:
                raise
            return False

    async def _edit(self, action: Edit) -> Observation:
        edited = await self.editor.edit(action)
        extras = {
            "path": action.path,
            "prev_exist": action.command != "create",
            "old_content": action.old_str,
            "new_content": action.new_str,
            "impl_source": ACI,
            "diff": difference(edited.old, edited.new, action.path),
        }
        return observation("edit", edited.output, extras)


def observation(kind: str, content: str, extras: dict[str, Any]) -> Observation:
    return {"observation": kind, "content": content, "extras": extras, "infra": None}


def error(content: str, identity: str = "") -> Observation:
    return observation("error", content, {"error_id": identity})


def ran(seen: Observed, hidden: bool = False) -> Observation:
    if seen.error:
        return error(seen.error)
    extras = {"command": seen.command, "metadata": described(seen.metadata), "hidden": hidden}
    made = observation("run", seen.content, extras)
    return made | {"success": seen.metadata.exit_code == 0}


def _never_an_error(made: Observation, asked: Asked) -> Observation:
    """The client cannot build an error of a hidden action."""
    if made["observation"] != "error":
        return made
    command = str(asked.args.get("command", ""))
    metadata = Metadata(exit_code=1, suffix="\n[The command completed with exit code 1.]")
    return ran(Observed(made["content"], command, metadata), hidden=True)


def _joined(cwd: str, path: str) -> str:
    return path if path.startswith("/") else f"{cwd.rstrip('/')}/{path}"


def _complaints(wrong: ValidationError) -> str:
    return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in wrong.errors()[:5])


__all__ = ["Actions", "Asked", "Execute", "error", "observation", "ran"]
