"""Build hook: puts the compiled sandbox agent into the wheel, for every machine type a compiler can make.

What it is
    `runtime_server/agent/bin` is ignored by git, so hatch would leave it out; this compiles the agent and
    names the binaries. With the `ziglang` package (asked for in the isolated build environment) a wheel
    carries x86_64 and aarch64; `ORCHESTRATE_AGENT=host` asks for no download and uses the system's gcc, for
    this machine's type only. An editable installation gets this machine's binary in the checkout. A source
    distribution carries the source.

What it does not do
    It never fails a build for want of a compiler for another machine; without any compiler a wheel is
    refused, and an editable installation compiles (or explains) on first use.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

AGENT = "runtime_server/agent"


def load_build(root: Path) -> Any:
    """`runtime_server/agent/build.py` by its path: the package cannot be imported while it is built."""
    spec = importlib.util.spec_from_file_location("agent_build", root / AGENT / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def only_host() -> bool:
    return os.environ.get("ORCHESTRATE_AGENT") == "host"


class AgentHook(BuildHookInterface):  # type: ignore[type-arg]
    """hatch calls `dependencies` before and `initialize` at the start of a build."""

    def dependencies(self) -> list[str]:
        return [] if only_host() or self.target_name != "wheel" else ["ziglang>=0.13"]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        build = load_build(Path(self.root))
        if version == "editable":
            self._build(build, build.host_arch(), must=False)
            return
        for arch in (build.host_arch(),) if only_host() else build.ARCHES:
            if self._build(build, arch, must=arch == build.host_arch()):
                for name in (f"agent-{arch}", f"agent-{arch}.sha256"):
                    build_data["force_include"][f"{self.root}/{AGENT}/bin/{name}"] = f"{AGENT}/bin/{name}"

    def _build(self, build: Any, arch: str, must: bool) -> bool:
        store = Path(self.root) / AGENT / "bin"
        try:
            if build.current(arch, store) is None:
                build.build(arch, store)
        except build.BuildError as error:
            if must:
                raise
            self.app.display_warning(f"no sandbox agent for {arch}: {error}")
            return False
        return True
